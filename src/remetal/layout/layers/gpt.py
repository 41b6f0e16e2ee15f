"""GUID partition tables as a layer."""

from __future__ import annotations

from remetal.layout.model import GptTable, Partition, SpaceId
from remetal.ondisk import gpt
from remetal.ondisk.regions import Piece, Read

NAME = "gpt"


def probe_table(read: Read, size: int, sector: int, on: SpaceId) -> tuple[GptTable, tuple[str, ...]] | None:
    """Return the table and what is wrong with it, or None. Raises BadStructureError if both copies are damaged."""
    found = gpt.parse_gpt(read, size, sector)
    if found is None:
        return None
    partitions = tuple(
        Partition(
            number=entry.number,
            start=entry.first * sector,
            size=(entry.last - entry.first + 1) * sector,
            type=entry.type_guid,
            uuid=entry.unique_guid,
            name=entry.name,
            attributes=entry.attributes,
        )
        for entry in found.entries
    )
    table = GptTable(
        on=on,
        disk_guid=found.disk_guid,
        entry_count=found.entry_count,
        partitions=partitions,
        first_usable=found.first_usable * sector,
        protective_mbr=found.protective_mbr,
    )
    return table, found.problems


def encode_table(table: GptTable, size: int, sector: int) -> tuple[Piece, ...]:
    """Return the bytes of the table for a disk of `size` bytes; the first piece is sector 0 with the boot code.

    Raises BadStructureError if the partitions do not fit.
    """
    entries = tuple(
        gpt.GptEntry(
            number=partition.number,
            type_guid=partition.type,
            unique_guid=partition.uuid,
            first=partition.start // sector,
            last=(partition.start + partition.size) // sector - 1,
            attributes=partition.attributes,
            name=partition.name,
        )
        for partition in table.partitions
    )
    record = gpt.Gpt(table.disk_guid, table.entry_count, table.first_usable // sector, entries, table.protective_mbr)
    return gpt.encode_gpt(record, size, sector)
