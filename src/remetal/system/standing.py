"""Which bytes an array or a mapping stands on. Two of them may bear one identity: that of a disk and that of its copy.

Source: Linux Documentation/ABI (sysfs-block: partitions, slaves, loop devices).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TypeAlias

from remetal.system.blockdev import Span

_BLOCK = Path("/sys/class/block")
_NUMBERS = Path("/sys/dev/block")

_Place: TypeAlias = tuple[int, int, int]
"""The file system's number and the inode of a file, or 0 and the number of a disk; and the byte in it."""


def stands_on(device: Path, spans: Collection[Span]) -> bool:
    """Whether all that an array or a mapping is made of, directly or by others, lies where one of the spans begins."""
    places = {_place_of_span(span) for span in spans}
    below = list(_below(device.resolve().name))
    return bool(below) and all(_stands(name, places) for name in below)


def is_made_of(device: Path, disks: Collection[Path]) -> bool:
    """Whether an array or a mapping lies on these disks, disk files or open devices, and on nothing else."""
    return _lies_on(device.resolve().name, {_place_of_path(disk)[:2] for disk in disks})


def _lies_on(name: str, owners: Collection[tuple[int, int]]) -> bool:
    if _place_of_device(name)[:2] in owners:
        return True
    below = list(_below(name))
    if not below:
        return name.startswith("dm-")  # a mapping to nothing: zeros, errors
    return all(_lies_on(each, owners) for each in below)


def find_mapping_on(uuid: str, spans: Collection[Span]) -> Path | None:
    """Return the device-mapper device on these spans whose DM UUID is `uuid`, or begins with it if it ends with a dash.

    None if there is none there, whatever stands on other disks under the same identity.
    """
    for folder in sorted(_BLOCK.glob("dm-*")):
        found = _text(folder / "dm/uuid")
        same = found == uuid or (uuid.endswith("-") and found.startswith(uuid))
        if same and stands_on(Path("/dev", folder.name), spans):
            return Path("/dev", folder.name)
    return None


def _stands(name: str, places: Collection[_Place]) -> bool:
    if _place_of_device(name) in places:
        return True
    below = list(_below(name))
    return bool(below) and all(_stands(each, places) for each in below)


def _below(name: str) -> Iterator[str]:
    """Yield the names of the devices that one is made of."""
    return (each.name for each in (_BLOCK / name / "slaves").glob("*"))


def _place_of_span(span: Span) -> _Place:
    return _shifted(_place_of_path(span.path), span.start)


def _place_of_path(path: Path) -> _Place:
    try:
        found = path.stat()
    except OSError:
        return (-1, -1, 0)
    if not stat.S_ISBLK(found.st_mode):
        return (found.st_dev, found.st_ino, 0)
    number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    return _place_of_device((_NUMBERS / number).resolve().name)


def _place_of_device(name: str) -> _Place:
    """Return where a device begins: a partition in its disk, a loop device in what backs it, others in themselves."""
    folder = (_BLOCK / name).resolve()
    if (folder / "partition").exists():
        return _shifted(_place_of_device(folder.parent.name), int(_text(folder / "start") or 0) * 512)
    backing = _text(folder / "loop/backing_file")
    if backing:
        return _shifted(_place_of_path(Path(backing)), int(_text(folder / "loop/offset") or 0))
    major, _, minor = _text(folder / "dev").partition(":")
    return (0, os.makedev(int(major or 0), int(minor or 0)), 0)


def _shifted(place: _Place, by: int) -> _Place:
    return (place[0], place[1], place[2] + by)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
