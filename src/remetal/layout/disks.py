"""The disks of this machine: all, those that the running system uses, and whether one may be captured now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from remetal.errors import RefusedError
from remetal.layout.identity import SYS
from remetal.layout.model import Disk, GptTable, Layout, MbrTable, SpaceId, Swap
from remetal.layout.uses import Use, describe_use, disks_of_number, numbers_of_mount, probe_swaps
from remetal.system.blockdev import is_block_device, open_disk
from remetal.system.mounts import probe_mounts

_NO_DISKS = ("loop", "ram", "zram", "sr", "fd", "dm-", "md", "nbd", "mtdblock")
_SYSTEM_PLACES = frozenset({"/", "/usr", "/boot", "/boot/efi", "/efi", "/var", "/home", "/opt", "/srv"})


def find_disks(sys: Path = SYS) -> list[Path]:
    """Return all real disks of this machine, in the order of their names: no loop, RAM, optical or mapped ones."""
    names = []
    for folder in (sys / "block").iterdir():
        virtual = "/devices/virtual/block/" in f"{folder.resolve()}/"
        hidden = _number_in(folder / "hidden") or folder.name.startswith(_NO_DISKS)
        boot_part = folder.name.startswith("mmcblk") and not folder.name[len("mmcblk") :].isdigit()
        if not virtual and not hidden and not boot_part and _number_in(folder / "size"):
            names.append(folder.name)
    return [Path("/dev", name.replace("!", "/")) for name in sorted(names, key=lambda name: (len(name), name))]


def find_system_disks() -> list[Path]:
    """Return the disks that the running system uses: those under its own mounts, those in fstab, and its swap.

    A disk that somebody mounted by hand, such as the one with the repository, is not among them. Raises
    RefusedError if there is none: a recovery medium runs from memory.
    """
    places = _SYSTEM_PLACES | set(_fstab_places())
    numbers = {number for mount in probe_mounts() if str(mount.target) in places for number in numbers_of_mount(mount)}
    names = {disk for number in numbers for disk in disks_of_number(number)}
    for swap in probe_swaps():
        if is_block_device(swap):
            names |= {disk for disk in _disks_of_device(swap) if Path("/dev", disk) in find_disks()}
    disks = [disk for disk in find_disks() if disk.name in names]
    if not disks:
        raise RefusedError("the running system uses no disk of its own", hint="Name the disks to back up with --disk.")
    return disks


def check_capturable(layout: Layout, paths: Mapping[str, Path]) -> None:
    """Raise RefusedError if anything writes to the disks of a layout while they would be read, or one would lose bytes.

    `paths` are the disks by name. Volumes that are mounted read-only or not at all, and active swap space, which
    is not copied, do no harm. Neither do zeros behind the last whole sector of a disk file.
    """
    for disk in layout.disks:
        _check_end(disk, paths[disk.name])
    found = []
    for disk in layout.disks:
        for use in describe_use(paths[disk.name]):
            space = _space_at(layout, disk.name, use.start)
            harmless = use.what == "swap" and isinstance(layout.layer_on(space), Swap)
            if not use.read_only and not harmless:
                found.append(f"{space}: {use}" if space != disk.name else str(use))
    if found:
        raise RefusedError(
            f"what is written to while it is read cannot be captured whole: {'; '.join(dict.fromkeys(found))}",
            hint="Boot the recovery medium and back up from there, unmount it or remount it read-only "
            "(mount -o remount,ro PLACE), or back up a snapshot of it.",
        )


def _check_end(disk: Disk, path: Path) -> None:
    """Raise RefusedError if a disk file has data behind its last whole sector, which no disk could hold."""
    if is_block_device(path):
        return
    with open_disk(path) as io:
        rest = io.size() - disk.size
        lost = 0 < rest < disk.logical_sector and any(io.read(disk.size, rest))
    if lost:
        raise RefusedError(
            f"{path} does not end with a whole sector: its last {rest} bytes would be lost",
            hint=f"Was it cut off? If not, fill it up with zeros: truncate --size=%{disk.logical_sector} FILE",
        )


def _space_at(layout: Layout, name: str, start: int) -> SpaceId:
    table = layout.layer_on(name)
    if isinstance(table, (GptTable, MbrTable)):
        for partition in table.partitions:
            if partition.start == start:
                return f"{name}:{partition.number}"
    return name


def _disks_of_device(path: Path) -> set[str]:
    folder = SYS / "class" / "block" / path.resolve().name / "dev"
    if not folder.exists():
        return set()
    major, _, minor = folder.read_text().strip().partition(":")
    return disks_of_number((int(major), int(minor)))


def _fstab_places() -> list[str]:
    try:
        lines = Path("/etc/fstab").read_text(errors="replace").splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines if not line.lstrip().startswith("#")]
    return [each[1] for each in fields if len(each) >= 3]


def _number_in(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


__all__ = ["Use", "check_capturable", "describe_use", "find_disks", "find_system_disks"]
