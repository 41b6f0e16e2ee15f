"""Builds the disk of a real machine: Debian with systemd, GRUB, and files that backups are known to spoil.

The slow parts run at native speed on the host (packages, initramfs, files) or in User Mode Linux (the boot
loader, which wants real partitions); both are cached. `python -m lab.machine --output m.img` makes one by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lab import CHECKOUT
from lab.awkward import make_awkward
from lab.cache import cached
from lab.disk import read_partitions
from lab.proof import install_proof
from lab.root import Root, build_root, root_inputs
from lab.uml import disk_device, run_in_uml
from remetal.events import Report, Step
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import GIB, MIB, format_duration, parse_bytes

LOGIN = ("root", "remetal")
"""Who can log in to the lab machine, and with which password."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the machine is like. The same recipe makes the same machine, identities included.

    `table` is `gpt` (boots by BIOS and UEFI) or `mbr` (boots by BIOS; the data volume and swap are logical
    partitions). `size` is in bytes. With `fallback` off, the ESP lacks EFI/BOOT/BOOTX64.EFI, so that UEFI boots
    only by an entry in its NVRAM. `root` is what is installed.
    """

    name: str = "phoenix"
    table: Literal["gpt", "mbr"] = "gpt"
    size: int = 3 * GIB
    fallback: bool = True
    root: Root = field(default_factory=Root)

    def identity(self, part: str) -> str:
        """Return the UUID of one part of the machine."""
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{part}.{self.table}.{self.name}"))


@dataclass(frozen=True, slots=True)
class Part:
    """One partition: its number, its lines for sfdisk, and what is on it, mounted where."""

    number: int
    name: str
    table_line: str
    kind: str = ""
    place: str = ""
    options: str = "defaults"
    check: int = 0


_MOUNT = {"xfs": ("nouuid",)}
"""Mount options: the same machine may be under construction, or mounted, elsewhere on this host."""

_ROOT = ("ext4", "/", "errors=remount-ro", 1)
_ESP = ("vfat", "/boot/efi", "umask=0077", 1)


def plan_parts(recipe: Recipe) -> tuple[Part, ...]:
    """Return the machine's partitions in the order of their numbers; the one that can grow is the last."""
    if recipe.table == "mbr":
        return (
            Part(1, "root", f"start=1MiB, size={(recipe.size - 512 * MIB) // MIB}MiB, type=83, bootable", *_ROOT),
            Part(2, "extended", "type=5"),
            Part(5, "srv", "size=320MiB, type=83", "xfs", "/srv"),
            Part(6, "swap", "type=82", "swap"),
        )

    def line(name: str, size: str, kind: str) -> str:
        return f"{size}type={kind}, uuid={recipe.identity(name + '-partition')}, name={name}"

    return (
        Part(1, "bios", line("bios", "start=1MiB, size=1MiB, ", "21686148-6449-6E6F-744E-656564454649")),
        Part(2, "esp", line("esp", "size=64MiB, ", "U"), *_ESP),
        Part(3, "swap", line("swap", "size=128MiB, ", "S"), "swap"),
        Part(4, "srv", line("srv", "size=320MiB, ", "L"), "xfs", "/srv"),
        Part(5, "root", line("root", "", "L"), *_ROOT),
    )


def build_machine(recipe: Recipe, report: Report) -> Path:
    """Return the machine's disk file from the cache, building it first if need be. Nobody may write to it.

    Takes a minute or two the first time, packages and downloads included. Needs root.
    """

    def build(path: Path) -> None:
        root = build_root(recipe.root, report)
        report(Step(f"Building the disk of the machine '{recipe.name}' ({recipe.table})"))
        path.touch()
        with path.open("r+b") as file:
            file.truncate(recipe.size)
        parts = plan_parts(recipe)
        _make_partitions(path, recipe, parts)
        spans = read_partitions(path)
        for part in parts:
            _make_file_system(recipe, part, spans)
        with _mounted_parts(parts, spans, skipped="vfat") as folder:
            run(
                [
                    "tar",
                    "--extract",
                    "--numeric-owner",
                    "--xattrs",
                    "--xattrs-include=*",
                    "--file",
                    root,
                    "-C",
                    folder,
                ]
            )
            _configure(folder, recipe, parts)
        report(Step("Installing its boot loader in User Mode Linux"))
        run_in_uml(_plan_boot_loader(recipe, parts), disks=[path])

    return cached(f"machine-{recipe.name}-{recipe.table}", [*root_inputs(recipe.root), *_inputs(recipe)], build)


def copy_machine(recipe: Recipe, output: Path, report: Report) -> None:
    """Make `output` a sparse copy of the machine's disk that may be written to."""
    disk = build_machine(recipe, report)
    output.parent.mkdir(parents=True, exist_ok=True)
    run(["cp", "--sparse=always", "--reflink=auto", disk, output])


def _inputs(recipe: Recipe) -> Iterator[str]:
    yield json.dumps(asdict(recipe))
    for name in (
        "machine.py",
        "awkward.py",
        "proof.py",
        "manifest.py",
        "guest/proof.py",
        "guest/lab-proof.service",
    ):
        yield (CHECKOUT / "lab" / name).read_text()


def _make_partitions(disk: Path, recipe: Recipe, parts: tuple[Part, ...]) -> None:
    if recipe.table == "gpt":
        head = f"label: gpt\nlabel-id: {recipe.identity('disk')}\n"
    else:
        head = f"label: dos\nlabel-id: 0x{recipe.identity('disk')[:8]}\n"
    script = head + "".join(f"{part.number}: {part.table_line}\n" for part in parts)
    run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk], input=script.encode())


def _make_file_system(recipe: Recipe, part: Part, spans: dict[int, Span]) -> None:
    if not part.kind:
        return
    identity = recipe.identity(part.name)
    with attach_loop(spans[part.number], writable=True) as device:
        argv = {
            "ext4": ["mkfs.ext4", "-q", "-L", part.name, "-U", identity, "-E", f"hash_seed={identity}"],
            "xfs": ["mkfs.xfs", "-q", "-L", part.name, "-m", f"uuid={identity}"],
            "vfat": ["mkfs.vfat", "-F", "32", "-n", part.name.upper(), "-i", _fat_serial(recipe)],
            "swap": ["mkswap", "-q", "-L", part.name, "-U", identity],
        }[part.kind]
        run([*argv, device])


def _fat_serial(recipe: Recipe) -> str:
    return recipe.identity("esp")[:8]


def _fstab_identity(recipe: Recipe, part: Part) -> str:
    if part.kind == "vfat":
        serial = _fat_serial(recipe).upper()
        return f"{serial[:4]}-{serial[4:]}"
    return recipe.identity(part.name)


@contextmanager
def _mounted_parts(parts: tuple[Part, ...], spans: dict[int, Span], *, skipped: str) -> Iterator[Path]:
    """Mount the machine's file systems, but none of the type `skipped`, and yield the root's folder."""
    with ExitStack() as stack:
        root = next(part for part in parts if part.place == "/")
        device = stack.enter_context(attach_loop(spans[root.number], writable=True))
        folder = stack.enter_context(mounted(device, kind=root.kind))
        for part in parts:
            if part.place in {"", "/"} or part.kind == skipped:
                continue
            target = folder / part.place.lstrip("/")
            target.mkdir(parents=True, exist_ok=True)
            device = stack.enter_context(attach_loop(spans[part.number], writable=True))
            stack.enter_context(mounted(device, kind=part.kind, options=_MOUNT.get(part.kind, ()), target=target))
        yield folder


def _configure(folder: Path, recipe: Recipe, parts: tuple[Part, ...]) -> None:
    etc = folder / "etc"
    (etc / "hostname").write_text(f"{recipe.name}\n")
    (etc / "hosts").write_text(f"127.0.0.1\tlocalhost\n127.0.1.1\t{recipe.name}\n")
    (etc / "machine-id").write_text(uuid.UUID(recipe.identity("machine")).hex + "\n")
    (folder / "var/lib/dbus/machine-id").symlink_to("/etc/machine-id")
    fstab = ["# <file system> <mount point> <type> <options> <dump> <pass>"]
    for part in sorted((part for part in parts if part.kind), key=lambda part: part.place or "~"):
        place, options = (part.place, part.options) if part.place else ("none", "sw")
        fstab.append(f"UUID={_fstab_identity(recipe, part)}\t{place}\t{part.kind}\t{options}\t0\t{part.check}")
        if part.place:
            (folder / part.place.lstrip("/")).mkdir(parents=True, exist_ok=True)
    (etc / "fstab").write_text("\n".join(fstab) + "\n")
    install_proof(folder)
    make_awkward(folder / "opt/awkward", seed=b"root")
    make_awkward(folder / "srv/awkward", seed=b"srv")


def _plan_boot_loader(recipe: Recipe, parts: tuple[Part, ...]) -> str:
    """Return the script that installs GRUB from inside the machine's own system."""
    mounts = [part for part in sorted(parts, key=lambda part: part.place) if part.place]
    lines = ["root=$(mktemp -d)"]
    lines += [f"mount -t {part.kind} {disk_device(0, part.number)} $root{part.place}" for part in mounts]
    lines += [f"mount --rbind /{name} $root/{name}" for name in ("dev", "proc", "sys")]
    scheme = "part_gpt" if recipe.table == "gpt" else "part_msdos"
    install = "chroot $root grub-install --no-floppy"
    modules = f"{scheme} ext2 biosdisk search_fs_uuid"
    lines.append(f'{install} --target=i386-pc --modules="{modules}" {disk_device(0)}')
    if recipe.table == "gpt":
        fallback = " --force-extra-removable" if recipe.fallback else ""
        lines.append(f"{install} --target=x86_64-efi --no-nvram{fallback} {disk_device(0)}")
    lines += ["chroot $root update-grub", "umount --recursive $root", "rmdir $root"]
    return "\n".join(lines)


def main() -> None:
    """Make a machine's disk where the command line says."""
    parser = argparse.ArgumentParser(prog="python -m lab.machine", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the disk file to make")
    parser.add_argument("--table", choices=("gpt", "mbr"), default="gpt")
    parser.add_argument("--size", type=parse_bytes, default=Recipe().size, help="such as 3GiB (the default)")
    parser.add_argument("--name", default=Recipe().name, help="its host name")
    options = parser.parse_args()
    began = time.monotonic()
    recipe = Recipe(name=options.name, table=options.table, size=options.size)
    copy_machine(recipe, options.output, lambda event: print(getattr(event, "title", event), file=sys.stderr))
    print(f"{options.output}: {format_duration(time.monotonic() - began)}; log in as {LOGIN[0]} / {LOGIN[1]}")


if __name__ == "__main__":
    main()
