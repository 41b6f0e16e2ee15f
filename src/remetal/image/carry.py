"""A program of our own beside rsync: what it leaves out when it copies a file system.

    python3 -I carry.py release TARGET          lets everything in TARGET be changed again
    python3 -I carry.py carry SOURCE TARGET     carries over flags, project ids, FAT attributes, and allocation

A program and not a function, because the source is a file system that this very process shows to the kernel (see
`remetal.system.fuse`). It uses nothing but Python's own library, and stays on the one file system. It prints as JSON
what could not be carried over: {"flags": number of files, "example": a path}.

Sources: ioctl_iflags(2), ioctl_fsgetxattr in xfsctl(3), <linux/fs.h>, <linux/msdos_fs.h>, fallocate(2).
"""

# ruff: noqa: PTH118 - names are bytes, which a Path does not take

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602
_GETXATTR, _SETXATTR = 0x801C581F, 0x401C5820
_FAT_GET, _FAT_SET = 0x80047210, 0x40047211

_IMMUTABLE, _APPEND = 0x10, 0x20
_FLAGS = 0x2083C4FF
"""Those that a person sets on files with content: chattr's s u c S i a d A m j t D T C P."""
_LOCKS = _IMMUTABLE | _APPEND

_XATTR = struct.Struct("=IIIII8x")  # struct fsxattr: flags, extent size, number of extents, project, CoW extent size
_XFLAGS = 0x1BFE0 & ~0x18  # without immutable and append-only, which come last
_FAT_ATTRIBUTES = 0x27  # read-only, hidden, system, archive

_UNABLE = {errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM}
_PIECE = 1 << 20


def carry(source: bytes, target: bytes) -> dict[str, object]:
    """Make flags, project ids and allocation in `target` what they are in `source`; return what was not possible."""
    lost, example = 0, ""
    for name, status in _walk(source):
        here, there = os.path.join(source, name), os.path.join(target, name)
        copy = os.lstat(there)
        if stat.S_IFMT(copy.st_mode) != stat.S_IFMT(status.st_mode):
            raise OSError(errno.ESTALE, "was not copied", os.fsdecode(there))
        if stat.S_ISREG(status.st_mode) and _is_thinner(copy, status):
            _fill(there, status)
        if not _carry_flags(here, there):
            lost, example = lost + 1, example or os.fsdecode(name)
    return {"flags": lost, "example": example}


def release(target: bytes) -> None:
    """Take the flags away that keep files from being written or removed."""
    for name, _ in _walk(target):
        with _opened(os.path.join(target, name)) as fd:
            flags = _get(fd, _GETFLAGS, 8)
            if flags & _LOCKS:
                fcntl.ioctl(fd, _SETFLAGS, struct.pack("=Q", flags & ~_LOCKS))


def _walk(root: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield the relative name and status of every regular file and folder, the root itself as the empty name."""
    top = os.lstat(root)
    yield b"", top
    waiting = [b""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(os.path.join(root, folder)) as children:
            for child in children:
                status = child.stat(follow_symlinks=False)
                name = os.path.join(folder, child.name)
                if stat.S_ISDIR(status.st_mode) and status.st_dev == top.st_dev:
                    waiting.append(name)
                    yield name, status
                elif stat.S_ISREG(status.st_mode):
                    yield name, status


def _is_thinner(copy: os.stat_result, original: os.stat_result) -> bool:
    """Whether a file has holes that the original has not: a swap file with holes cannot be used."""
    return original.st_blocks * 512 >= original.st_size > copy.st_blocks * 512


def _fill(path: bytes, original: os.stat_result) -> None:
    """Allocate a whole file, as zeros where there is nothing yet, and give it back its times."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            os.posix_fallocate(fd, 0, original.st_size)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            _write_holes(fd, original.st_size)
        os.utime(fd, ns=(original.st_atime_ns, original.st_mtime_ns))
    finally:
        os.close(fd)


def _write_holes(fd: int, size: int) -> None:
    position = os.lseek(fd, 0, os.SEEK_HOLE)
    while position < size:
        try:
            end = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end
            end = size
        while position < end:
            position += os.pwrite(fd, bytes(min(_PIECE, end - position)), position)
        position = os.lseek(fd, end, os.SEEK_HOLE) if end < size else size


def _carry_flags(here: bytes, there: bytes) -> bool:
    """Make a file's flags those of the original; return False if its file system does not take all of them."""
    with _opened(here) as source, _opened(there) as target:
        whole = _carry_extended(source, target)
        attributes, old = _get(source, _FAT_GET, 4), _get(target, _FAT_GET, 4)
        if (attributes ^ old) & _FAT_ATTRIBUTES:
            whole &= _set(target, _FAT_SET, struct.pack("=I", old & ~_FAT_ATTRIBUTES | attributes & _FAT_ATTRIBUTES))
        flags, old = _get(source, _GETFLAGS, 8) & _FLAGS, _get(target, _GETFLAGS, 8)
        if flags != old & _FLAGS:
            whole &= _set(target, _SETFLAGS, struct.pack("=Q", old & ~_FLAGS | flags))
            whole &= _get(target, _GETFLAGS, 8) & _FLAGS == flags
        return whole


def _carry_extended(source: int, target: int) -> bool:
    """Carry over the project id, and the hints that XFS keeps for a file."""
    try:
        flags, extent, _, project, copy_extent = _XATTR.unpack(fcntl.ioctl(source, _GETXATTR, bytes(_XATTR.size)))
        old = _XATTR.unpack(fcntl.ioctl(target, _GETXATTR, bytes(_XATTR.size)))
    except OSError as error:
        if error.errno in _UNABLE:
            return True
        raise
    wanted = (flags & _XFLAGS, extent, project, copy_extent)
    if wanted == (old[0] & _XFLAGS, old[1], old[3], old[4]):
        return True
    return _set(target, _SETXATTR, _XATTR.pack(old[0] & ~_XFLAGS | wanted[0], extent, 0, project, copy_extent))


@contextmanager
def _opened(path: bytes) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _get(fd: int, request: int, size: int) -> int:
    """Return flags, 0 on a file system that has none. The kernel writes 32 bits, whatever the number says."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, request, bytes(size))[:4], sys.byteorder)
    except OSError as error:
        if error.errno in _UNABLE:
            return 0
        raise


def _set(fd: int, request: int, value: bytes) -> bool:
    try:
        fcntl.ioctl(fd, request, value)
    except OSError as error:
        if error.errno in _UNABLE:
            return False
        raise
    return True


if __name__ == "__main__":
    folders = [os.fsencode(word) for word in sys.argv[2:]]
    try:
        if sys.argv[1] == "release":
            release(*folders)
        else:
            json.dump(carry(*folders), sys.stdout)
    except OSError as error:
        sys.exit(f"{os.fsdecode(error.filename or b'')}: {error.strerror}")
