"""The layers that remetal knows, one file each. A new one is a file and a line in the tables below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec.structs

from remetal.layout.layers import btrfs, exfat, ext, f2fs, gpt, luks, lvm, mbr, md, ntfs, raw, swap, vfat, xfs
from remetal.layout.layers.contract import (
    ContainerKind,
    Content,
    GroupKind,
    GrowingKind,
    SpanningKind,
    TableKind,
    VolumeKind,
)
from remetal.layout.model import (
    Container,
    FileSystem,
    GptTable,
    Luks,
    MbrTable,
    MdArray,
    SpaceId,
    Table,
    Volume,
    VolumeGroup,
)
from remetal.ondisk.regions import Piece

TABLES: tuple[TableKind, ...] = (gpt, mbr)
"""In the order in which they are looked for."""

_VOLUMES: tuple[VolumeKind, ...] = (ext, vfat, xfs, ntfs, exfat, f2fs, swap)
_GROWING: tuple[GrowingKind, ...] = (ext, xfs, ntfs, f2fs)

CONTAINERS: Mapping[type[Container], ContainerKind[Any]] = {MdArray: md, VolumeGroup: lvm, Luks: luks}
"""What provides devices when it is opened, by the record that describes it."""

GROUPS: tuple[GroupKind, ...] = (md, lvm, luks, btrfs)
"""What stands on members that are found one by one."""

VOLUMES: Mapping[str, VolumeKind] = {name: kind for kind in _VOLUMES for name in kind.TYPES}
"""By blkid's name of the type."""

GROWING: Mapping[str, GrowingKind] = {name: kind for kind in _GROWING for name in kind.TYPES}
"""The file systems that can grow, by blkid's name of the type."""

SPANNING: Mapping[str, SpanningKind] = {"btrfs": btrfs}
"""The file systems that may span several spaces, by blkid's name of the type."""


def container_kind(container: Container) -> ContainerKind[Any]:
    """Return the functions for a container of this kind."""
    return CONTAINERS[type(container)]


def probe_volume(content: Content) -> Volume:
    """Describe what a space holds: as its kind does, or as raw bytes where blkid's type is not in the table.

    Raises BadStructureError if the kind's own file finds it damaged.
    """
    kind = VOLUMES.get(content.type)
    return raw.probe_volume(content) if kind is None else kind.probe_volume(content)


def encode_table(table: Table, size: int, sector: int) -> tuple[Piece, ...]:
    """Return the bytes of a table for a disk of `size` bytes; the first piece is sector 0 with the boot code.

    Raises BadStructureError if the partitions do not fit.
    """
    match table:
        case GptTable():
            return gpt.encode_table(table, size, sector)
        case MbrTable():
            return mbr.encode_table(table, size, sector)


def plan_growth(volume: FileSystem, rooms: Mapping[SpaceId, int]) -> FileSystem:
    """Return the file system as it will be when it has grown into its spaces of these sizes, in bytes.

    It is returned as it is if it cannot grow.
    """
    if volume.parts:
        return SPANNING[volume.type].plan_growth(volume, rooms)
    kind = GROWING.get(volume.type)
    return volume if kind is None else msgspec.structs.replace(volume, size=kind.plan_growth(volume, rooms[volume.on]))
