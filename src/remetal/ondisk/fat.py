"""Size and use of FAT12, FAT16 and FAT32. Source: Microsoft, "FAT32 File System Specification", 2000."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from remetal.ondisk.bitmaps import PIECE, find_ranges, to_bytes
from remetal.ondisk.regions import BadStructureError, Read

_SECTORS = {512, 1024, 2048, 4096}
_CLUSTERS = {1 << bit for bit in range(8)}
_MAX_CLUSTERS_16 = 65525


@dataclass(frozen=True, slots=True)
class FatBootSector:
    """Sizes and places in bytes; `bits` is 12, 16 or 32; `serial` as blkid writes the UUID: `ABCD-0123`.

    `table_at` is where the table in use begins, `data_at` the first of the `clusters`.
    """

    table_at: int
    clusters: int
    data_at: int
    size: int
    used: int
    cluster_size: int
    bits: int
    serial: str
    sector_size: int


def parse_fat(read: Read, size: int) -> FatBootSector:
    """Parse the boot sector of a volume of `size` bytes. Raises BadStructureError if there is no sound one."""
    if size < 512:
        raise BadStructureError("the volume is too small for a FAT file system")
    data = read(0, 512)
    sector, cluster, reserved, fats, root_entries, total16, _, fat16 = struct.unpack_from("<HBHBHHBH", data, 11)
    total32, fat32 = struct.unpack_from("<II", data, 32)
    total, fat_sectors = total16 or total32, fat16 or fat32
    if sector not in _SECTORS or cluster not in _CLUSTERS or not reserved or not fats or not fat_sectors:
        raise BadStructureError("the boot sector of the FAT file system is damaged")
    root = -(-root_entries * 32 // sector)
    clusters = (total - reserved - fats * fat_sectors - root) // cluster
    if clusters <= 0 or total * sector > size or (fat16 and clusters >= _MAX_CLUSTERS_16):
        raise BadStructureError("the boot sector of the FAT file system describes another size")
    bits = 32 if fat16 == 0 else 12 if clusters < 4085 else 16
    serial_at = 67 if bits == 32 else 39
    (serial,) = struct.unpack_from("<I", data, serial_at)
    if fat_sectors * sector * 8 < clusters * bits:
        raise BadStructureError("the boot sector of the FAT file system describes too small a table")
    free = _free_clusters(read, reserved * sector, clusters, bits, sector, data)
    (flags,) = struct.unpack_from("<H", data, 40) if bits == 32 else (0,)
    active = flags & 0xF if flags & 0x80 else 0
    if active >= fats:
        raise BadStructureError("the boot sector of the FAT file system names a table that is not there")
    return FatBootSector(
        table_at=(reserved + active * fat_sectors) * sector,
        clusters=clusters,
        data_at=(reserved + fats * fat_sectors + root) * sector,
        size=total * sector,
        used=(total - free * cluster) * sector,
        cluster_size=cluster * sector,
        bits=bits,
        serial=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}",
        sector_size=sector,
    )


def read_used(read: Read, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and size in bytes of what is used on a volume of `size` bytes: all but free clusters, ascending.

    Raises BadStructureError if there is no sound FAT file system.
    """
    boot = parse_fat(read, size)
    pieces = (np.packbits(entries != 0, bitorder="little").tobytes() for entries in read_table(read, boot))
    used = find_ranges(pieces, boot.clusters, "little")
    return chain([(0, boot.data_at)], to_bytes(used, boot.data_at, boot.cluster_size))


def read_table(read: Read, boot: FatBootSector) -> Iterator[npt.NDArray[np.uint32]]:
    """Yield the table's entries, one per cluster, 0 for a free one, in pieces of whole bytes of a bitmap."""
    if boot.bits == 12:
        count = boot.clusters + 2
        raw = np.frombuffer(read(boot.table_at, -(-count // 2) * 3), np.uint8).astype(np.uint32).reshape(-1, 3)
        even, odd = raw[:, 0] | (raw[:, 1] & 0xF) << 8, raw[:, 1] >> 4 | raw[:, 2] << 4
        yield np.column_stack((even, odd)).reshape(-1)[2:count]
        return
    kind, mask = ("<u4", 0x0FFFFFFF) if boot.bits == 32 else ("<u2", 0xFFFF)
    width = boot.bits // 8
    for first in range(0, boot.clusters, PIECE):
        data = read(boot.table_at + (2 + first) * width, min(PIECE, boot.clusters - first) * width)
        yield np.frombuffer(data, kind).astype(np.uint32) & np.uint32(mask)


def _free_clusters(read: Read, fat_at: int, clusters: int, bits: int, sector: int, boot: bytes) -> int:
    """Return the number of free clusters: counted, but on FAT32 taken from the FSInfo sector (0 if unknown)."""
    if bits == 32:
        (place,) = struct.unpack_from("<H", boot, 48)
        info = read(place * sector, 512) if 0 < place * sector < fat_at else bytes(512)
        lead, struct_mark, free = *struct.unpack_from("<I", info), *struct.unpack_from("<II", info, 484)
        return free if lead == 0x41615252 and struct_mark == 0x61417272 and free <= clusters else 0
    if bits == 16:
        fat = read(fat_at, 2 * (clusters + 2))
        return memoryview(fat).cast("H").tolist()[2:].count(0)
    fat = read(fat_at, -(-3 * (clusters + 2) // 2) + 1)
    entries = (
        int.from_bytes(fat[3 * n // 2 : 3 * n // 2 + 2], "little") >> 4 * (n & 1) for n in range(2, clusters + 2)
    )
    return sum(entry & 0xFFF == 0 for entry in entries)
