"""For what sectors something was made that only its own system opens.

Sources: Linux include/uapi/linux/bcache.h as of 5.12 (struct cache_sb_disk; block_size in units of 512 bytes); the
boot sector of BitLocker, which is that of NTFS and FAT (libbde's documentation).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from remetal.ondisk.regions import Read

_U16 = struct.Struct("<H")
_LEAST, _MOST = 512, 65536


def read_sector(kind: str, read: Read) -> int:
    """Return the largest sector in bytes that content of this type, as blkid names it, works on; 0 if unknown."""
    if kind not in _READERS:
        return 0
    sector = _READERS[kind](read)
    return sector if _LEAST <= sector <= _MOST and not sector & (sector - 1) else 0


def _read_bcache(read: Read) -> int:
    return 512 * _number_at(read, 4096 + 192)


def _read_bitlocker(read: Read) -> int:
    return _number_at(read, 11)


def _number_at(read: Read, place: int) -> int:
    found = read(place, _U16.size)
    return int(_U16.unpack(found)[0]) if len(found) == _U16.size else 0


_READERS: Mapping[str, Callable[[Read], int]] = {"bcache": _read_bcache, "BitLocker": _read_bitlocker}
