"""DOS partition tables as a layer."""

from __future__ import annotations

from remetal.layout.model import MbrTable, Partition, SpaceId
from remetal.ondisk import mbr
from remetal.ondisk.regions import Piece, Read

NAME = "dos"


def probe_table(read: Read, size: int, sector: int, on: SpaceId) -> tuple[MbrTable, tuple[str, ...]] | None:
    """Return the table, or None if sector 0 holds none. Raises BadStructureError for one that leads astray."""
    found = mbr.parse_mbr(read, size, sector)
    if found is None:
        return None
    partitions = tuple(
        Partition(
            number=entry.number,
            start=entry.start * sector,
            size=entry.sectors * sector,
            type=f"{entry.type:02x}",
            attributes=entry.status,
            record=entry.record * sector,
        )
        for entry in found.entries
    )
    table = MbrTable(on=on, signature=f"{found.signature:08x}", partitions=partitions, boot_code=found.boot_code)
    return table, ()


def encode_table(table: MbrTable, size: int, sector: int) -> tuple[Piece, ...]:
    """Return the bytes of the table for a disk of `size` bytes; the first piece is sector 0 with the boot code.

    Raises BadStructureError if the partitions do not fit.
    """
    entries = tuple(
        mbr.MbrEntry(
            number=partition.number,
            start=partition.start // sector,
            sectors=partition.size // sector,
            type=int(partition.type, 16),
            status=partition.attributes,
            record=partition.record // sector,
        )
        for partition in table.partitions
    )
    return mbr.encode_mbr(mbr.Mbr(int(table.signature, 16), table.boot_code, entries), size, sector)
