"""The layers that remetal knows, one file each. A new one is a file and a line in the tables below."""

from __future__ import annotations

from collections.abc import Mapping

from remetal.layout.layers import ext, gpt, mbr, raw, swap, vfat, xfs
from remetal.layout.layers.contract import Content, GrowingKind, TableKind, VolumeKind
from remetal.layout.model import FileSystem, GptTable, MbrTable, Table, Volume
from remetal.ondisk.regions import Piece

TABLES: tuple[TableKind, ...] = (gpt, mbr)
"""In the order in which they are looked for."""

_VOLUMES: tuple[VolumeKind, ...] = (ext, vfat, xfs, swap)
_GROWING: tuple[GrowingKind, ...] = (ext, xfs)

VOLUMES: Mapping[str, VolumeKind] = {name: kind for kind in _VOLUMES for name in kind.TYPES}
"""By blkid's name of the type."""

GROWING: Mapping[str, GrowingKind] = {name: kind for kind in _GROWING for name in kind.TYPES}
"""The file systems that can grow, by blkid's name of the type."""


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


def plan_growth(volume: FileSystem, space: int) -> int:
    """Return the size that a file system can grow to in a space of `space` bytes; its own if it cannot grow."""
    kind = GROWING.get(volume.type)
    return volume.size if kind is None else kind.plan_growth(volume, space)
