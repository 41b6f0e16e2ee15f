"""How many chains of clusters a FAT holds: one for each file and folder with content. Source: as `ondisk.fat`."""

from __future__ import annotations

import struct

import numpy as np

from remetal.ondisk.fat import parse_fat, read_table
from remetal.ondisk.regions import Read

_ENDS = {12: 0xFF8, 16: 0xFFF8, 32: 0x0FFFFFF8}


def count_chains(read: Read, size: int) -> int:
    """Return the number of chains on a volume of `size` bytes: the ends of all of them, read from the table in use.

    Raises BadStructureError if there is no sound FAT file system.
    """
    boot = parse_fat(read, size)
    return sum(int(np.count_nonzero(piece >= _ENDS[boot.bits])) for piece in read_table(read, boot))


def read_root_entries(read: Read) -> int:
    """Return the places in the root folder of a sound FAT12 or FAT16; 0 where the root folder is a chain (FAT32)."""
    (entries,) = struct.unpack("<H", read(0, 512)[17:19])
    return int(entries)
