"""The recovery system itself: Debian's own packages, stripped and squeezed, cached between builds.

Nothing of remetal is in it, so it stays valid until its recipe or the day's packages change.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from remetal.errors import RefusedError, RemetalError
from remetal.events import Note, Report, Step
from remetal.media.apt import AptSources
from remetal.media.grub import BIOS_MODULES, BIOS_SEARCH
from remetal.media.packages import LEFT_OUT, NEVER_INSTALLED
from remetal.system.locks import held_lock
from remetal.system.mounts import mounted
from remetal.system.run import ProgramFailedError, need_programs, run, start
from remetal.units import format_duration

_RECIPE = 1
"""Counts up when the building below changes what comes out."""

_KEPT = 3 * 24 * 3600
"""Seconds that an unused recovery system stays in the cache."""

EARLY_MODULES = ("loop", "squashfs", "overlay")
"""Kernel modules that the initramfs loads to reach the recovery system."""

COMPRESSION = ("-comp", "zstd", "-Xcompression-level", "10", "-b", "256K")
"""zstd, because under emulation xz would unpack at a tenth of its speed; past level 10, packing takes
five times as long for an image that is 7 % smaller."""


class BaseRoot(msgspec.Struct, frozen=True, kw_only=True):
    """A built recovery system: what it is, beside its files in `folder`.

    `modules` are the files of the early kernel modules in the order in which they are loaded; `built` is in
    seconds since the epoch.
    """

    folder: str
    suite: str
    python: tuple[int, int]
    kernel: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    built: float

    def path(self, name: str) -> Path:
        """Return the path of one of the files: root.squashfs, vmlinuz, busybox, bios.img, *.efi, a module."""
        return Path(self.folder) / name


def open_base(cache: Path, sources: AptSources, packages: Sequence[str], *, fresh: bool, report: Report) -> BaseRoot:
    """Return the recovery system for these sources and packages, building it if the cache has none or `fresh`.

    Takes some minutes and a network when it builds; waits for another that builds it. Raises RefusedError without
    root or the programs it needs, ProgramFailedError if a package cannot be had.
    """
    key = _recipe_key(sources, packages)
    place = cache / "media" / key
    lock = cache / "media" / f"{key}.lock"
    with held_lock(lock, what="the recovery system", waiting=lambda said: report(Note(f"{said}; waiting for it"))):
        _sweep(cache / "media", place)
        known = _find_built(place)
        if known is not None and not fresh:
            os.utime(place)
            age = format_duration(max(0.0, time.time() - known.built))
            report(Note(f"using the recovery system built {age} ago; --fresh builds it anew from today's packages"))
            return known
        if os.geteuid() != 0:
            raise RefusedError("building the recovery system needs root", hint="Run the same command with sudo.")
        need_programs("mmdebstrap", "mksquashfs", "depmod")
        with TemporaryDirectory(dir=cache / "media", prefix="building-") as work:
            built = _build(Path(work), place, sources, packages, report)
            shutil.rmtree(place, ignore_errors=True)
            (Path(work) / "out").rename(place)
    return built


def _sweep(folder: Path, wanted: Path) -> None:
    """Remove recovery systems of former recipes and what killed builds left, once nobody used them for days."""
    for old in folder.iterdir():
        if old.is_dir() and old != wanted and time.time() - old.stat().st_mtime > _KEPT:
            shutil.rmtree(old, ignore_errors=True)
            old.with_name(f"{old.name}.lock").unlink(missing_ok=True)


def _recipe_key(sources: AptSources, packages: Sequence[str]) -> str:
    recipe = (_RECIPE, sources, packages, NEVER_INSTALLED, LEFT_OUT, EARLY_MODULES, COMPRESSION, BIOS_MODULES)
    return sha256(msgspec.json.encode([*recipe, BIOS_SEARCH])).hexdigest()[:16]


def _find_built(place: Path) -> BaseRoot | None:
    try:
        return msgspec.json.decode((place / "base.json").read_bytes(), type=BaseRoot)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _build(work: Path, place: Path, sources: AptSources, packages: Sequence[str], report: Report) -> BaseRoot:
    root, out = work / "root", work / "out"
    out.mkdir()
    report(Step(f"Installing the recovery system ({sources.distribution} {sources.suite}, {len(packages)} packages)"))
    _install(root, work, sources, packages, report)
    kernel = _take_kernel(root, out)
    modules = _take_modules(root, kernel, out)
    _take_boot_files(root, out)
    report(Step("Packing the recovery system"))
    run(["mksquashfs", root, out / "root.squashfs", *COMPRESSION, *_EXCLUDING, *LEFT_OUT])
    base = BaseRoot(
        folder=str(place),
        suite=sources.suite,
        python=_python_version(root),
        kernel=kernel,
        modules=modules,
        packages=tuple(run(["chroot", root, "dpkg-query", "-W"]).text.replace("\t", " ").splitlines()),
        built=time.time(),
    )
    (out / "base.json").write_bytes(msgspec.json.encode(base))
    return base


_EXCLUDING = ("-noappend", "-no-progress", "-quiet", "-wildcards", "-e")


def _install(root: Path, work: Path, sources: AptSources, packages: Sequence[str], report: Report) -> None:
    """Let mmdebstrap install the packages into `root`. INITRD=No: the medium's initramfs is our own."""
    listing = work / "sources.list"
    listing.write_text("\n".join(sources.lines) + "\n")
    argv = [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in NEVER_INSTALLED),
        *(f"--aptopt={option}" for option in sources.options),
        f"--include={','.join(packages)}",
        sources.suite,
        str(root),
        str(listing),
    ]
    log = work / "mmdebstrap.log"
    with (
        start(argv, log=log, env={"INITRD": "No"}) as process,
        log.open(encoding="utf-8", errors="replace") as said,
    ):
        text = ""
        while True:
            ended = process.poll() is not None
            new = said.read()
            text += new
            for line in new.splitlines():
                if line.startswith("I: ") and line.endswith("..."):
                    report(Note(line.removeprefix("I: ")))
            if ended:
                break
            time.sleep(0.2)
    if process.returncode != 0:
        complaints = [line for line in text.splitlines() if line.startswith(("E:", "W:", "Err:"))]
        raise ProgramFailedError(argv, process.returncode, "\n".join(complaints or text.splitlines()[-6:]))


def _take_kernel(root: Path, out: Path) -> str:
    """Copy the newest kernel and return its release."""
    kernels = sorted((root / "boot").glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    if not kernels:
        raise RemetalError("the recovery system was installed without a kernel")
    shutil.copyfile(kernels[-1], out / "vmlinuz")
    return kernels[-1].name.removeprefix("vmlinuz-")


def _take_modules(root: Path, kernel: str, out: Path) -> tuple[str, ...]:
    folder = root / "usr/lib/modules" / kernel
    builtin = (folder / "modules.builtin").read_text()
    wanted = [name for name in EARLY_MODULES if f"/{name}.ko" not in builtin]
    names = []
    for path in plan_module_order((folder / "modules.dep").read_text(), wanted):
        source = folder / path
        name = Path(path).name
        for suffix, program in ((".xz", "xz"), (".zst", "zstd"), (".gz", "gzip")):
            if name.endswith(suffix):
                name = name.removesuffix(suffix)
                (out / name).write_bytes(run([program, "-dc", source]).stdout)
                break
        else:
            shutil.copyfile(source, out / name)
        names.append(name)
    return tuple(names)


def plan_module_order(dependencies: str, wanted: Sequence[str]) -> list[str]:
    """Return the files of the wanted modules and of all that they need, each behind what it needs.

    `dependencies` is the text of modules.dep (modules.dep(5)), which lists what a module needs in the reverse of
    the order of loading. Raises RemetalError for a module that the kernel does not have.
    """
    table: dict[str, tuple[str, list[str]]] = {}
    for line in dependencies.splitlines():
        path, _, needs = line.partition(":")
        table[Path(path).name.partition(".ko")[0].replace("-", "_")] = (path, needs.split())
    order: dict[str, None] = {}
    for name in wanted:
        if name not in table:
            raise RemetalError(f"the recovery system's kernel has no module '{name}'")
        file, others = table[name]
        order.update(dict.fromkeys([*reversed(others), file]))
    return list(order)


def _take_boot_files(root: Path, out: Path) -> None:
    """Copy what boots the medium: GRUB's images for BIOS, the signed shim and GRUB for UEFI."""
    bios, shim = root / "usr/lib/grub/i386-pc", root / "usr/lib/shim"
    (root / "boot/search.cfg").write_text(BIOS_SEARCH)
    image = ["grub-mkimage", "-O", "i386-pc-eltorito", "-p", "/boot/grub", "-c", "/boot/search.cfg"]
    run(["chroot", root, *image, "-o", "/boot/bios.img", *BIOS_MODULES])
    for source, name in (
        (root / "boot/bios.img", "bios.img"),
        (bios / "boot_hybrid.img", "boot_hybrid.img"),
        (root / "usr/bin/busybox", "busybox"),
        (shim / "shimx64.efi.signed", "bootx64.efi"),
        (shim / "mmx64.efi.signed", "mmx64.efi"),
        (root / "usr/lib/grub/x86_64-efi-signed/gcdx64.efi.signed", "grubx64.efi"),
    ):
        shutil.copyfile(source, out / name)


def _python_version(root: Path) -> tuple[int, int]:
    code = "import sys; print(*sys.version_info[:2])"
    major, minor = run(["chroot", root, "python3", "-IS", "-c", code]).text.split()
    return int(major), int(minor)


@contextmanager
def entered_root(layers: Sequence[Path]) -> Iterator[Path]:
    """Mount squashfs images over one another, the first on top, and yield the writable folder that shows them all.

    What is written there is forgotten on leaving.
    """
    with ExitStack() as stack:
        lower = [stack.enter_context(mounted(each, kind="squashfs", options=("loop", "ro"))) for each in layers]
        scratch = stack.enter_context(mounted(Path("tmpfs"), kind="tmpfs"))
        upper, work = scratch / "upper", scratch / "work"
        upper.mkdir()
        work.mkdir()
        options = (f"lowerdir={':'.join(map(str, lower))}", f"upperdir={upper}", f"workdir={work}")
        yield stack.enter_context(mounted(Path("overlay"), kind="overlay", options=options))
