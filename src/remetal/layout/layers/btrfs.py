"""btrfs, on one device or on several: every allocated extent of each device is captured, and goes back to its place.

So profiles, subvolumes, snapshots and the default subvolume are what they were. Where a device is too small for that,
the file system shrinks on its way there (`remetal.image.shrink`), and keeps them as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

import msgspec.structs

from remetal.layout.layers.contract import Content, Found
from remetal.layout.layers.remaking import UNKNOWN
from remetal.layout.making import BtrfsMaking
from remetal.layout.model import FileSystem, Part, SpaceId
from remetal.ondisk.btrfs import Allocation, BtrfsSuperblock, parse_btrfs, read_allocation
from remetal.ondisk.regions import BadStructureError
from remetal.system.blockdev import Span, open_disk, probe_written
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import GIB, MIB, align_down, align_up, format_bytes

_LEAST = 256 * MIB
"""The kernel gives a device no smaller size than this (fs/btrfs/ioctl.c)."""
_RESERVED = MIB
"""What chunks leave alone at the start of a device."""
_SMALL = 50 * GIB
"""Up to this size of all devices together, chunks of metadata have at most 256 MiB (fs/btrfs/space-info.c)."""
_COLUMNS = {"raid0": (1, 0), "raid10": (2, 0), "raid5": (1, 1), "raid6": (1, 2)}
"""How many copies a chunk has of everything and how much parity, where it spreads its content over all devices."""
_STRIPE_STEP = 16 * MIB
"""To which the kernel rounds the tenth of the file system that a chunk may take (fs/btrfs/volumes.c)."""

TYPES: tuple[str, ...] = ("btrfs",)
PROGRAMS: tuple[str, ...] = ("btrfs",)


def probe_groups(members: Sequence[Content]) -> list[Found]:
    """Sort the devices by their file system, and describe each that is whole."""
    found: list[Found] = []
    families: dict[str, list[tuple[Content, BtrfsSuperblock]]] = {}
    for member in members:
        try:
            superblock = parse_btrfs(member.read, member.span.size)
        except BadStructureError as error:
            found.append(Found((member.space,), problem=f"{member.space} (btrfs) is captured whole: {error.message}"))
            continue
        families.setdefault(superblock.fsid, []).append((member, superblock))
    return [*found, *map(_describe, families.values())]


def _describe(members: list[tuple[Content, BtrfsSuperblock]]) -> Found:
    members = sorted(members, key=lambda each: each[1].devid)
    spaces = tuple(member.space for member, _ in members)
    newest = max((each for _, each in members), key=lambda each: each.generation)
    words = f"the btrfs {newest.fsid} on {', '.join(spaces)}"
    numbers = [each.devid for _, each in members]
    if len(set(numbers)) < len(numbers):
        return Found(
            spaces,
            problem=f"{words} is there twice, as copies of each other; they are captured whole",
            hint="Back up the disks of one copy only, with --disk.",
        )
    if len(members) < newest.devices:
        return Found(
            spaces,
            problem=f"{words} lacks {newest.devices - len(members)} of {newest.devices} devices",
            hint="Attach the missing disks, or name them, too, with --disk.",
            lacks_members=True,
        )
    problems = sorted({problem for _, each in members for problem in each.problems})
    if problems:
        return Found(spaces, problem=f"{words} is captured whole: {'; '.join(problems)}")
    return Found(spaces, _layer(members, newest))


def _layer(members: list[tuple[Content, BtrfsSuperblock]], newest: BtrfsSuperblock) -> FileSystem:
    devices = {each.devid: (member.read, member.span.size) for member, each in members}
    allocation = Allocation({}, frozenset())
    with suppress(BadStructureError):  # without it the file system is captured all the same, but cannot shrink
        allocation = read_allocation(devices, newest)
    return FileSystem(
        on=members[0][0].space,
        type="btrfs",
        size=sum(each.device_size for _, each in members),
        used=newest.bytes_used,
        block_size=newest.sector_size,
        uuid=newest.fsid,
        label=newest.label,
        features=newest.features,
        parts=tuple(
            Part(
                space=member.space,
                number=each.devid,
                size=each.device_size,
                allocated=min(sum(size for _, size in allocation.extents.get(each.devid, ())), each.device_size),
            )
            for member, each in members
        ),
        making=BtrfsMaking(chunks=tuple(sorted(allocation.kinds))) if allocation.kinds else None,
    )


def plan_growth(volume: FileSystem, rooms: Mapping[SpaceId, int]) -> FileSystem:
    """Return the file system with every device as large as its space allows."""
    parts = tuple(_grown(part, align_down(rooms[part.space], volume.block_size)) for part in volume.parts)
    return msgspec.structs.replace(volume, parts=parts, size=sum(part.size for part in parts))


def _grown(part: Part, size: int) -> Part:
    return msgspec.structs.replace(part, size=size) if size > part.size and size >= _LEAST else part


def plan_shrinking(volume: FileSystem, rooms: Mapping[SpaceId, int]) -> FileSystem | str:
    """Return the file system with no device larger than its space, or the sentence why it cannot be had so small."""
    if not isinstance(volume.making, BtrfsMaking):
        return UNKNOWN
    parts = tuple(_shrunk(part, align_down(rooms[part.space], volume.block_size)) for part in volume.parts)
    for part in parts:
        needed = part.allocated + _RESERVED + _elbow_room(volume, volume.making)
        if part.size < needed:
            return (
                f"what it has allocated on {part.space}, and some room to move that, take {format_bytes(needed)} "
                f"({needed} bytes) there, and there would be {format_bytes(part.size)}"
            )
        if part.size < _LEAST and part not in volume.parts:
            return f"no device of a btrfs can shrink below {format_bytes(_LEAST)}, and {part.space} would have to"
    return msgspec.structs.replace(volume, parts=parts, size=sum(part.size for part in parts))


def least_size(volume: FileSystem, part: Part) -> int:
    """Return the least bytes that a space needs for one of the devices, if the file system shrinks."""
    if not isinstance(volume.making, BtrfsMaking):
        return part.size
    needed = max(part.allocated + _RESERVED + _elbow_room(volume, volume.making), _LEAST)
    return min(part.size, align_up(needed, volume.block_size))


def _shrunk(part: Part, size: int) -> Part:
    return msgspec.structs.replace(part, size=min(part.size, size))


def _elbow_room(volume: FileSystem, making: BtrfsMaking) -> int:
    """Return what has to be free on a device for its chunks to be moved: one more chunk of each kind.

    Chunks move whole into free places, of which there are enough if all that is allocated fits; but each kind may
    have begun a chunk that it does not fill. Source: fs/btrfs/volumes.c, `decide_stripe_size_regular`.
    """
    sizes = {"data": GIB, "metadata": 256 * MIB if volume.size <= _SMALL else GIB, "system": 32 * MIB}
    room = 0
    for kind in making.chunks:
        content, _, profile = kind.partition(" ")
        copies, parities = _COLUMNS.get(profile, (len(volume.parts), 0))
        columns = max(len(volume.parts) // copies - parities, 1)
        stripe = min(sizes[content], align_up(volume.size // 10 // columns, _STRIPE_STEP))
        room += stripe * (2 if profile == "dup" else 1)
    return room


def apply_growth(volume: FileSystem, spans: Mapping[SpaceId, Span]) -> int:
    """Mount the file system and let each device grow to the size that it shall have; return the bytes written."""
    wanted = [part for part in volume.parts if _device_size(spans[part.space]) < part.size]
    if not wanted:
        return 0
    with ExitStack() as stack:
        devices = {
            part.space: stack.enter_context(attach_loop(spans[part.space], writable=True)) for part in volume.parts
        }
        before = sum(map(probe_written, devices.values()))
        try:
            # All are named: else the kernel may take the others from another copy of the same file system.
            options = ("skip_balance", *(f"device={device}" for device in devices.values()))
            with mounted(next(iter(devices.values())), kind="btrfs", options=options) as folder:
                run(["btrfs", "balance", "cancel", folder], allowed=range(256))
                for part in wanted:
                    run(["btrfs", "filesystem", "resize", f"{part.number}:{part.size}", folder])
        finally:
            for device in devices.values():
                run(["btrfs", "device", "scan", "--forget", device], allowed=range(256))
        return sum(map(probe_written, devices.values())) - before


def _device_size(span: Span) -> int:
    with open_disk(span.path) as disk:
        return parse_btrfs(disk.reader(span.start), span.size).device_size
