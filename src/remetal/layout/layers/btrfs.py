"""btrfs, on one device or on several: every allocated extent of each device is captured, and goes back to its place.

So profiles, subvolumes, snapshots and the default subvolume are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import msgspec.structs

from remetal.layout.layers.contract import Content, Found
from remetal.layout.model import FileSystem, Part, SpaceId
from remetal.ondisk.btrfs import BtrfsSuperblock, parse_btrfs
from remetal.ondisk.regions import BadStructureError
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import attach_loop, probe_written
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import MIB, align_down

_LEAST = 256 * MIB
"""The kernel gives a device no smaller size than this (fs/btrfs/ioctl.c)."""

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
    return FileSystem(
        on=members[0][0].space,
        type="btrfs",
        size=sum(each.device_size for _, each in members),
        used=newest.bytes_used,
        block_size=newest.sector_size,
        uuid=newest.fsid,
        label=newest.label,
        features=newest.features,
        parts=tuple(Part(space=member.space, number=each.devid, size=each.device_size) for member, each in members),
    )


def plan_growth(volume: FileSystem, rooms: Mapping[SpaceId, int]) -> FileSystem:
    """Return the file system with every device as large as its space allows."""
    parts = tuple(_grown(part, align_down(rooms[part.space], volume.block_size)) for part in volume.parts)
    return msgspec.structs.replace(volume, parts=parts, size=sum(part.size for part in parts))


def _grown(part: Part, size: int) -> Part:
    return msgspec.structs.replace(part, size=size) if size > part.size and size >= _LEAST else part


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
