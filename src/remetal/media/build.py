"""Building the recovery medium, from packages to ISO."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from remetal import __version__
from remetal.errors import RefusedError, UsageError
from remetal.events import Report, Step, silent
from remetal.media.answer import parse_answer
from remetal.media.apt import probe_apt_sources
from remetal.media.grub import plan_menu
from remetal.media.iso import write_iso
from remetal.media.own import TREE, build_own_layer
from remetal.media.packages import recovery_packages
from remetal.media.root import BaseRoot, open_base
from remetal.ondisk.cpio_write import Entry, write_archive
from remetal.system.run import need_programs


@dataclass(frozen=True, slots=True)
class MediumRequest:
    """What to build: the ISO's path, an answer file to bake in, additional kernel arguments, the Debian or Ubuntu
    suite (None: this host's), additional packages, and whether to take today's packages instead of the cache's.
    """

    output: Path
    answer: Path | None = None
    append: str = ""
    suite: str | None = None
    packages: tuple[str, ...] = ()
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Medium:
    """A built medium: its path, size in bytes, the seconds it took, and what is on it."""

    path: Path
    size: int
    seconds: float
    suite: str
    kernel: str
    packages: int


def cache_folder() -> Path:
    """Return where built recovery systems are kept: $REMETAL_CACHE or /var/cache/remetal."""
    return Path(os.environ.get("REMETAL_CACHE") or "/var/cache/remetal")


def build_medium(request: MediumRequest, report: Report = silent) -> Medium:
    """Build a recovery medium as one hybrid ISO.

    Raises UsageError or RefusedError for a request that cannot be met, before anything is built.
    """
    began = time.monotonic()
    need_programs("mmdebstrap", "mksquashfs", "xorriso", "mformat", "mcopy", "mmd")
    answer = _read_answer(request.answer)
    plan_menu("", 0, request.append)
    if not request.output.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {request.output.absolute().parent} to write the ISO to")
    if os.geteuid() != 0:
        raise RefusedError("building a recovery medium needs root", hint="Run the same command with sudo.")
    sources = probe_apt_sources(request.suite)
    packages = (*recovery_packages(sources.distribution), *request.packages)
    cache = cache_folder()
    base = open_base(cache, sources, packages, fresh=request.fresh, report=report)
    with TemporaryDirectory(dir=cache / "media", prefix="medium-") as work:
        own = build_own_layer(base, Path(work), answer, report)
        report(Step("Writing the ISO"))
        initrd = Path(work) / "initrd.img"
        write_initrd(initrd, base, own)
        identity = secrets.token_hex(8)
        files = {"remetal/vmlinuz": base.path("vmlinuz"), "remetal/initrd.img": initrd}
        texts = {
            "boot/grub/grub.cfg": plan_menu(identity, initrd.stat().st_size, request.append),
            ".disk/info": f"remetal {__version__} recovery medium ({base.suite})\n",
            f".disk/{identity}": "",
            "remetal/packages.txt": "\n".join(base.packages) + "\n",
        }
        write_iso(request.output, Path(work), base, files, texts)
    return Medium(
        path=request.output,
        size=request.output.stat().st_size,
        seconds=time.monotonic() - began,
        suite=base.suite,
        kernel=base.kernel,
        packages=len(base.packages),
    )


def write_initrd(output: Path, base: BaseRoot, own: Path) -> None:
    """Write the one file that is loaded beside the kernel: our init, its modules, and both squashfs images."""
    folders = ("bin", "dev", "modules", "proc", "sys")
    scripts = sorted((TREE / "initramfs").iterdir())
    members = [
        *(Entry(name, None) for name in folders),
        Entry("bin/busybox", base.path("busybox")),
        *(Entry(script.name, script.read_bytes()) for script in scripts),
        *(Entry(f"modules/{name}", base.path(name), 0o644) for name in base.modules),
        Entry("modules/order", "".join(f"{name}\n" for name in base.modules).encode(), 0o644),
        Entry("root.squashfs", base.path("root.squashfs"), 0o600),
        Entry("own.squashfs", own, 0o600),
    ]
    with output.open("wb") as file:
        write_archive(file, members)


def _read_answer(path: Path | None) -> bytes | None:
    """Return the bytes of an answer file that is known to be a good one."""
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
    parse_answer(data, str(path))
    return data
