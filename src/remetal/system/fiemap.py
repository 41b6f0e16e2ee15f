"""Where files lie on the disk of their file system, as the kernel tells it, and opening them without leaving it.

Source: Linux Documentation/filesystems/fiemap.rst, <linux/fiemap.h>, <linux/fs.h>; openat2(2).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_FIEMAP = 0xC020660B
_MAP, _EXTENT = struct.Struct("=QQIIII"), struct.Struct("=QQQ16xI12x")
_AT_ONCE = 17
"""With so many, Python lets other threads go on meanwhile."""
_LAST, _UNWRITTEN, _MERGED = 0x1, 0x800, 0x1000
_ALONE = _LAST | _UNWRITTEN | _MERGED
"""What may be said of an extent whose bytes lie as they are in whole blocks of this one file: nothing but this."""

_GETXATTR = 0x801C581F
_XATTR = struct.Struct("=IIIII8x")
_REALTIME = 0x1

_OPENAT2 = 437
_HOW = struct.Struct("=QQQ")
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x1, 0x2, 0x4, 0x8
_STAY = _NO_XDEV | _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class FileExtent:
    """`size` bytes of a file from its byte `offset`, which lie from byte `place` of the file system's device.

    `alone`: they fill whole blocks, in which nothing else lies, and which no other file shares.
    """

    offset: int
    place: int
    size: int
    alone: bool


def probe_extents(file: int) -> Iterator[FileExtent]:
    """Yield the extents of an open file, in ascending order; holes are in none.

    Nothing is written to the disk before, so this does not wait for a frozen file system; and what was not written yet
    is not alone. Only ext2, ext3, ext4 and XFS count from the start of their device. Raises OSError where the file
    system does not tell.
    """
    start = 0
    while True:
        buffer = bytearray(_MAP.size + _AT_ONCE * _EXTENT.size)
        _MAP.pack_into(buffer, 0, start, (1 << 64) - 1 - start, 0, 0, _AT_ONCE, 0)
        fcntl.ioctl(file, _FIEMAP, buffer)
        count = _MAP.unpack_from(buffer)[3]
        flags = _LAST
        for number in range(count):
            offset, place, size, flags = _EXTENT.unpack_from(buffer, _MAP.size + number * _EXTENT.size)
            yield FileExtent(offset, place, size, not flags & ~_ALONE)
            start = offset + size
        if flags & _LAST:
            return


def is_realtime(file: int) -> bool:
    """Whether an open file lies on the realtime device of its XFS. Raises OSError where the file system has no word."""
    return bool(_XATTR.unpack(fcntl.ioctl(file, _GETXATTR, bytes(_XATTR.size)))[0] & _REALTIME)


def open_inside(folder: int, path: str) -> int:
    """Open what lies at `path` from an open folder, for reading; no link is followed, and no other mount entered.

    Nobody waits for the other end of a pipe, and no time of access is changed. Raises OSError, also if a link or a
    mount is in the way, and on kernels before 5.6.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOATIME
    how = _HOW.pack(flags, 0, _STAY)
    name = os.fsencode(path)
    found: int = _LIBC.syscall(_OPENAT2, folder, name, how, ctypes.c_size_t(len(how)))
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return found
