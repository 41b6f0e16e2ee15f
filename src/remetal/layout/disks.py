"""The disks of this machine: all of them, and whether one may be captured now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from remetal.errors import RefusedError
from remetal.layout.identity import SYS, describe_disk, find_kernel_name, find_parts
from remetal.layout.model import Disk, FileSystem, GptTable, Layout, Luks, MbrTable, MdArray, SpaceId, Swap, VolumeGroup
from remetal.layout.sameness import are_paths
from remetal.layout.uses import Use, describe_use
from remetal.system.blockdev import is_block_device, open_disk

_NO_DISKS = ("loop", "ram", "zram", "sr", "fd", "dm-", "md", "nbd", "mtdblock")


def find_disks(sys: Path = SYS) -> list[Path]:
    """Return all real disks of this machine, in the order of their names: no loop, RAM, optical or mapped ones.

    A multipath device is a disk, its paths are not; a volume of a firmware RAID (Intel, DDF) is one, its members
    are not. Of several paths that nothing has joined, only the first counts.
    """
    return [device_of(name) for name in find_disk_names(sys)]


def find_disk_names(sys: Path = SYS) -> list[str]:
    """Return the kernel names of all real disks, as `find_disks` does."""
    names = {*_real_names(sys), *_find_stand_ins(sys)} - find_covered(sys).keys()
    return sorted(names, key=_in_order)


def find_covered(sys: Path = SYS) -> dict[str, str]:
    """Return what another device stands for, and that device, by kernel names. Nobody may write to it by itself.

    Such are the paths of a multipath device, the members of a firmware RAID, and further paths to a disk whose
    first path is taken for it.
    """
    covered = {part: name for name, parts in _find_stand_ins(sys).items() for part in parts}
    firsts: list[tuple[str, Disk]] = []
    for name in _real_names(sys):
        if name in covered:
            continue
        disk = describe_disk(name, sys)
        first = next((other for other, known in firsts if are_paths(known, disk)), None)
        if first is None:
            firsts.append((name, disk))
        else:
            covered[name] = first
    return covered


def describe_stand_in(path: Path, sys: Path = SYS) -> str:
    """Return that a disk must not be used by itself, because another device stands for it; nothing if none does."""
    name = find_kernel_name(path)
    stand_in = find_covered(sys).get(name, "") if is_block_device(path) else ""
    if not find_parts(stand_in, sys):
        return ""
    what = "a path of the multipath device" if stand_in.startswith("dm-") else "a member of the firmware RAID volume"
    return f"it is {what} {device_of(stand_in)}, which is to be named in its place"


def check_capturable(
    layout: Layout,
    devices: Mapping[SpaceId, Path],
    will_hold: Callable[[SpaceId, Use], bool] = lambda space, use: False,
) -> None:
    """Raise RefusedError if anything writes to the disks of a layout while they would be read, or one would lose bytes.

    `devices` are the disks and the open devices by name. `will_hold` tells of a volume that is mounted read-write
    whether its file system will be held still, so that it may be. Volumes that are mounted read-only or not at all, and
    active swap space, which is not copied, do no harm. Neither do containers that are open, nor zeros behind the last
    whole sector of a disk file.
    """
    for disk in layout.disks:
        _check_end(disk, devices[disk.name])
    found = []
    for disk in layout.disks:
        stand_in = describe_stand_in(devices[disk.name])
        if stand_in:
            raise RefusedError(
                f"{devices[disk.name]} cannot be captured by itself: {stand_in}", hint="List disks: `remetal probe`."
            )
        for space, use in _find_uses(layout, devices, disk):
            harmless = (use.what == "swap" and isinstance(layout.layer_on(space), Swap)) or (
                use.what == "busy" and _holds_container(layout, disk.name)
            )
            if not use.read_only and not harmless and not will_hold(space, use):
                found.append(f"{space}: {use}" if space != disk.name else str(use))
    if found:
        raise RefusedError(
            f"what is written to while it is read cannot be captured whole: {'; '.join(dict.fromkeys(found))}",
            hint="Boot the recovery medium and back up from there, unmount it or remount it read-only "
            "(mount -o remount,ro PLACE), or back up a snapshot of it.",
        )


def _find_uses(layout: Layout, devices: Mapping[SpaceId, Path], disk: Disk) -> Iterator[tuple[SpaceId, Use]]:
    """Yield everything that uses a disk of a layout, and the space that it uses, as far as that is known."""
    for use in describe_use(devices[disk.name]):
        yield _space_of(use, layout, devices, disk.name), use


def find_mounted(layout: Layout, devices: Mapping[SpaceId, Path]) -> Iterator[tuple[FileSystem, Use]]:
    """Yield the file systems of a layout that are mounted, once for each place, with what uses them there.

    Only those count that begin on the device where the layout says so; `devices` are the disks and the open devices.
    """
    paths = {name: path.resolve() for name, path in devices.items()}
    for disk in layout.disks:
        for space, use in _find_uses(layout, devices, disk):
            layer = layout.layer_on(space)
            if use.what == "mount" and isinstance(layer, FileSystem):
                device, start, _ = layout.place(space)
                if (paths.get(device.name), start) == (Path(use.base).resolve(), use.offset):
                    yield layer, use


def _find_stand_ins(sys: Path) -> dict[str, tuple[str, ...]]:
    """Return every device that stands for others, and these."""
    found = {name: find_parts(name, sys) for name in _names_with_size(sys)}
    return {name: parts for name, parts in found.items() if parts}


def _real_names(sys: Path) -> list[str]:
    """Return the kernel names of everything that drives hardware, each path and each member by itself."""
    names = []
    for name in _names_with_size(sys):
        folder = sys / "block" / name
        virtual = "/devices/virtual/block/" in f"{folder.resolve()}/"
        hidden = _number_in(folder / "hidden") or name.startswith(_NO_DISKS)
        boot_part = name.startswith("mmcblk") and not name[len("mmcblk") :].isdigit()
        if not virtual and not hidden and not boot_part:
            names.append(name)
    return names


def _names_with_size(sys: Path) -> list[str]:
    names = [folder.name for folder in (sys / "block").iterdir() if _number_in(folder / "size")]
    return sorted(names, key=_in_order)


def device_of(name: str) -> Path:
    """Return the device with this kernel name."""
    return Path("/dev", name.replace("!", "/"))


def _in_order(name: str) -> tuple[int, str]:
    return len(name), name


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


def _holds_container(layout: Layout, disk: str) -> bool:
    """Whether something on a disk is open as a container: then the kernel holds the disk, and nobody writes to it."""
    containers = (layer for layer in layout.layers if isinstance(layer, (MdArray, VolumeGroup, Luks)))
    return any(disk in layout.disks_under(space) for layer in containers for space in layer.spaces)


def _space_of(use: Use, layout: Layout, devices: Mapping[SpaceId, Path], disk: str) -> SpaceId:
    """Return the space that is used: on the open device that it lies on, or as far as it is known on the disk."""
    base = Path(use.base).resolve() if use.base else None
    for name, path in devices.items():
        if path.resolve() == base:
            return _space_at(layout, name, use.offset)
    return _space_at(layout, disk, use.start)


def _space_at(layout: Layout, name: str, start: int) -> SpaceId:
    table = layout.layer_on(name)
    if isinstance(table, (GptTable, MbrTable)):
        for partition in table.partitions:
            if partition.start == start:
                return f"{name}:{partition.number}"
    return name


def _number_in(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


__all__ = ["Use", "check_capturable", "describe_stand_in", "describe_use", "find_disks"]
