"""What uses a disk or a disk file right now: mounts, swap, arrays and mappings on it, locks of other programs.

Source: sysfs (block devices, their partitions and holders, loop devices), proc(5), fcntl(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from remetal.layout.identity import SYS
from remetal.system.blockdev import is_block_device
from remetal.system.mounts import Mount, find_mount_of, probe_mounts

Number: TypeAlias = tuple[int, int]

_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True)
class Use:
    """One user of a disk. `start` is the byte of the disk where the used part begins, as far as it is known.

    What is used lies at byte `offset` of `base`, which is the disk itself, or an array or a mapping on it.
    `what` is `mount`, `swap`, `lock` or `busy`; `where` a mount point or the device that stands between.
    """

    what: str
    where: str
    device: str
    start: int
    read_only: bool = False
    base: str = field(default="", compare=False)
    offset: int = field(default=0, compare=False)

    def __str__(self) -> str:
        match self.what:
            case "mount":
                return f"{self.device} is mounted {'read-only' if self.read_only else 'read-write'} at {self.where}"
            case "swap":
                return f"{self.device} is active swap space"
            case "lock":
                return f"another program has locked {self.device} (a running virtual machine?)"
            case _:
                return f"the kernel holds {self.device} in use"


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    start: int
    base: str
    offset: int


def describe_use(path: Path) -> list[Use]:
    """Return everything that uses the disk or disk file at `path`, directly or through layers above it."""
    nodes = _find_nodes(path)
    uses = [*_mount_uses(nodes), *_swap_uses(nodes)]
    if is_block_device(path):
        if not uses and _is_claimed(path):
            uses.append(Use("busy", "", str(path), 0))
    elif path.is_file() and _is_locked(path):
        uses.append(Use("lock", "", str(path), 0))
    return uses


def is_same_disk(first: Path, second: Path) -> bool:
    """Whether writing to one writes to the other: two names of one file or device, or a loop device and its file."""
    try:
        one, other = first.stat(), second.stat()
    except OSError:
        return first.resolve() == second.resolve()
    if (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino):
        return True
    below = _find_nodes(first) if stat.S_ISBLK(other.st_mode) else {}
    above = _find_nodes(second) if stat.S_ISBLK(one.st_mode) else {}
    return _number(other.st_rdev) in below or _number(one.st_rdev) in above


def disks_of_number(number: Number) -> set[str]:
    """Return the kernel names of the disks under a block device: through partitions, mappings, arrays, loops."""
    place = SYS / "dev" / "block" / f"{number[0]}:{number[1]}"
    if not place.exists():
        return set()
    folder = place.resolve()
    if (folder / "partition").exists():
        folder = folder.parent
    below = list((folder / "slaves").iterdir()) if (folder / "slaves").is_dir() else []
    if below:
        return {disk for each in below for disk in disks_of_number(_read_number(each / "dev"))}
    backing = _backing_file(folder)
    if backing is not None:
        try:
            found = backing.stat()
        except OSError:
            return set()
        return disks_of_number(_number(found.st_rdev if stat.S_ISBLK(found.st_mode) else found.st_dev))
    return {folder.name}


def numbers_of_mount(mount: Mount) -> set[Number]:
    """Return the block devices under a mount: one, or all devices of a btrfs."""
    numbers = {mount.device}
    if mount.source.startswith("/"):
        try:
            found = Path(mount.source).stat()
        except OSError:
            return numbers
        if stat.S_ISBLK(found.st_mode):
            numbers.add(_number(found.st_rdev))
    if mount.kind == "btrfs":
        for family in SYS.glob("fs/btrfs/*/devices"):
            members = {_read_number(member / "dev") for member in family.iterdir()}
            if members & numbers:
                numbers |= members
    return numbers


def holds(folder: Path, path: Path) -> bool:
    """Whether writing to `path` writes to the file system that is mounted at `folder`: it lies there, or on a disk
    file that does. Raises RemetalError if one of them cannot be looked at.
    """
    held = numbers_of_mount(find_mount_of(folder))
    waiting, seen = numbers_of_mount(find_mount_of(path)), set[Number]()
    while waiting:
        if waiting & held:
            return True
        seen |= waiting
        files = (_backing_file(SYS / "dev/block" / f"{major}:{minor}") for major, minor in waiting)
        waiting = {each for file in files if file for each in numbers_of_mount(find_mount_of(file))} - seen
    return False


def probe_swaps() -> list[Path]:
    """Return the block devices and files that are active swap space."""
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    return [Path(line.split()[0].replace("\\040", " ")) for line in lines if line.split()]


def _find_nodes(path: Path) -> dict[Number, _Node]:
    """Return every block device that stands on a disk or disk file, itself included."""
    nodes: dict[Number, _Node] = {}
    loops = list(_loops())
    try:
        found = path.stat()
    except OSError:
        return {}
    if stat.S_ISBLK(found.st_mode):
        _add_node(nodes, loops, _number(found.st_rdev), _Node(str(path), 0, str(path), 0))
    else:
        for number, offset, backing in loops:
            if (backing.st_dev, backing.st_ino) == (found.st_dev, found.st_ino):
                _add_node(nodes, loops, number, _Node("", offset, str(path), offset))
    return nodes


def _add_node(
    nodes: dict[Number, _Node],
    loops: list[tuple[Number, int, os.stat_result]],
    number: Number,
    node: _Node,
) -> None:
    """Add a device, which is called by its kernel name unless `node` names it, and all that stands on it."""
    if number in nodes:
        return
    folder = SYS / "dev" / "block" / f"{number[0]}:{number[1]}"
    if not folder.exists():
        return
    folder = folder.resolve()
    nodes[number] = node = replace(node, name=node.name or f"/dev/{folder.name.replace('!', '/')}")
    for entry in folder.iterdir():
        if (entry / "partition").exists():
            first = int((entry / "start").read_text()) * 512
            _add_node(
                nodes, loops, _read_number(entry / "dev"), _Node("", node.start + first, node.base, node.offset + first)
            )
    for holder in (folder / "holders").iterdir() if (folder / "holders").is_dir() else ():
        made = f"/dev/{holder.name.replace('!', '/')}"
        _add_node(nodes, loops, _read_number(holder / "dev"), _Node(made, node.start, made, 0))
    for loop, offset, backing in loops:
        if stat.S_ISBLK(backing.st_mode) and _number(backing.st_rdev) == number:
            _add_node(nodes, loops, loop, _Node("", node.start + offset, node.base, node.offset + offset))


def _loops() -> Iterator[tuple[Number, int, os.stat_result]]:
    """Yield every attached loop device: its number, its offset, and what it stands on."""
    for folder in (SYS / "block").glob("loop*"):
        backing = _backing_file(folder)
        if backing is None:
            continue
        try:
            yield _read_number(folder / "dev"), int((folder / "loop/offset").read_text()), backing.stat()
        except OSError:
            continue


def _backing_file(folder: Path) -> Path | None:
    try:
        text = (folder / "loop" / "backing_file").read_text()
    except OSError:
        return None
    return Path(text.removesuffix("\n"))


def _mount_uses(nodes: dict[Number, _Node]) -> Iterator[Use]:
    for mount in probe_mounts():
        for number in sorted(numbers_of_mount(mount) & nodes.keys()):
            node = nodes[number]
            yield Use("mount", str(mount.target), node.name, node.start, mount.read_only, node.base, node.offset)


def _swap_uses(nodes: dict[Number, _Node]) -> Iterator[Use]:
    for path in probe_swaps():
        if is_block_device(path):
            node = nodes.get(_number(path.stat().st_rdev))
            if node is not None:
                yield Use("swap", "", node.name, node.start, base=node.base, offset=node.offset)


def _is_claimed(path: Path) -> bool:
    """Whether the kernel or another program has the device, or a partition of it, for itself alone."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _is_locked(path: Path) -> bool:
    """Whether another program holds a record lock on a disk file, as QEMU does on the disks of its machines."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return False
    finally:
        os.close(fd)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _read_number(path: Path) -> Number:
    major, _, minor = path.read_text().strip().partition(":")
    return int(major), int(minor)


def _number(device: int) -> Number:
    return os.major(device), os.minor(device)
