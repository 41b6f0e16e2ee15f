"""Disks and ranges of disks: block devices, or regular files that stand for one.

A `Span` is the universal address of bytes in remetal: a range of one disk. Nothing above this module needs to
know whether the kernel has scanned a partition table, because partitions are spans of their disk.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from remetal.errors import RefusedError, RemetalError

# ioctl numbers: <linux/fs.h>
_BLKRRPART = 0x125F
_BLKFLSBUF = 0x1261
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKGETSIZE64 = 0x80081272
_BLKROGET = 0x125E

PAGE = 4096
"""Alignment in bytes of offsets, lengths and memory that direct I/O may need."""
_SECTOR = 512
"""In which sysfs counts, whatever the disk has."""


@dataclass(frozen=True, slots=True)
class Span:
    """`size` bytes from byte `start` of the disk at `path`."""

    path: Path
    start: int
    size: int

    def __str__(self) -> str:
        return str(self.path) if self.start == 0 else f"{self.path}@{self.start}"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Size and sector sizes of a disk, in bytes. A regular file has 512-byte sectors."""

    size: int
    logical_sector: int
    physical_sector: int


def is_block_device(path: Path) -> bool:
    """Whether `path` names a block device (False as well if it names nothing)."""
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def probe_geometry(path: Path) -> Geometry:
    """Read a disk's size and sector sizes.

    Raises RefusedError if there is no such disk, or `path` is neither a block device nor a regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RefusedError(
            f"cannot open the disk {path}: {os.strerror(error.errno or 0)}",
            hint="List the machine's disks with `remetal probe`.",
        ) from error
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode):
            return Geometry(os.fstat(fd).st_size, 512, 512)
        if not stat.S_ISBLK(mode):
            raise RefusedError(f"{path} is neither a block device nor a regular file")
        return Geometry(
            _ioctl_number(fd, _BLKGETSIZE64, "Q"),
            _ioctl_number(fd, _BLKSSZGET, "i"),
            _ioctl_number(fd, _BLKPBSZGET, "I"),
        )
    except OSError as error:
        raise RefusedError(f"{path} does not answer as a disk: {os.strerror(error.errno or 0)}") from error
    finally:
        os.close(fd)


def is_read_only(path: Path) -> bool:
    """Whether the kernel holds this block device read-only; False for regular files."""
    if not is_block_device(path):
        return False
    with open_disk(path) as disk:
        return bool(_ioctl_number(disk.fd, _BLKROGET, "i"))


class DiskIO:
    """Reads and writes at offsets of one open disk. Safe to share between threads.

    With direct I/O, offsets, lengths and buffers must be multiples of `PAGE` except that a read may end at
    the end of the disk; `aligned_buffer` makes fitting memory. Without, anything goes.
    """

    def __init__(self, path: Path, fd: int, direct: bool) -> None:
        self.path = path
        self.fd = fd
        self.direct = direct
        self._sparse = stat.S_ISREG(os.fstat(fd).st_mode)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer from byte `offset`; raises RemetalError at a read error or the disk's end."""
        if self.direct and len(buffer) % PAGE:
            buffer[:] = self.read(offset, len(buffer))
            return
        self._need(offset, len(buffer), self._fill(buffer, offset))

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from byte `offset`, whatever their alignment; errors as `read_into`."""
        first = offset - offset % PAGE
        buffer = aligned_buffer(-(-(offset + size - first) // PAGE) * PAGE)
        found = self._fill(buffer, first)
        self._need(offset, size, found - (offset - first))
        return bytes(buffer[offset - first : offset - first + size])

    def _fill(self, buffer: memoryview, offset: int) -> int:
        """Read until the buffer is full or the disk ends, and return the count of bytes."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.fd, [buffer[done:]], offset + done)
            except OSError as error:
                # Direct I/O at the odd end of a disk file is no longer aligned, and so no more allowed.
                if error.errno == errno.EINVAL and offset + done >= self.size():
                    return done
                raise RemetalError(
                    f"reading {self.path} at byte {offset + done} failed: {os.strerror(error.errno or 0)}",
                    hint="Look at `dmesg` for the disk's own errors.",
                ) from error
            if count == 0:
                return done
            done += count
        return done

    def _need(self, offset: int, size: int, found: int) -> None:
        if found < size:
            raise RemetalError(f"{self.path} ends at byte {offset + max(found, 0)}, before the expected data")

    def reader(self, start: int) -> Callable[[int, int], bytes]:
        """Return a function `read(offset, size)` whose offsets count from byte `start`."""
        return lambda offset, size: self.read(start + offset, size)

    def is_hole(self, offset: int, size: int) -> bool:
        """Whether these bytes of a disk file take no space, and so are zeros; always False for a block device."""
        if not self._sparse:
            return False
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA) >= offset + size
        except OSError as error:
            return error.errno == errno.ENXIO and offset + size <= self.size()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at byte `offset`.

        Raises RemetalError at a write error; what was written before stays.
        """
        view = memoryview(data)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self.fd, view[done:], offset + done)
            except OSError as error:
                raise RemetalError(
                    f"writing {self.path} at byte {offset + done} failed: {os.strerror(error.errno or 0)}",
                    hint="Free space where the disk file lies, then run the same command again."
                    if error.errno in {errno.ENOSPC, errno.EDQUOT}
                    else "Look at `dmesg` for the disk's own errors, then run the same command again.",
                ) from error

    def size(self) -> int:
        """Return the disk's size in bytes."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def sync(self) -> None:
        """Make everything written durable. Raises RemetalError if the disk cannot keep it."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise RemetalError(
                f"what was written to {self.path} did not reach it: {os.strerror(error.errno or 0)}",
                hint="Look at `dmesg` for the disk's own errors, then run the same command again.",
            ) from error


@contextmanager
def open_disk(path: Path, *, writable: bool = False, direct: bool = False, flush: bool = True) -> Iterator[DiskIO]:
    """Open a disk for the length of a `with` block; a writable one is made durable on a clean exit.

    `direct` bypasses the page cache where the file system allows it (tmpfs does not: then it is buffered). What that
    holds of a block device is written back and dropped before, unless `flush` is False: then what was written to it
    through the very same device is read all the same. Raises RefusedError if the disk cannot be opened.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    try:
        try:
            fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if not (direct and error.errno == errno.EINVAL):
                raise
            direct = False
            fd = os.open(path, flags)
    except OSError as error:
        raise RefusedError(
            f"cannot open the disk {path}: {os.strerror(error.errno or 0)}",
            hint=_who_may_open() if error.errno in {errno.EACCES, errno.EPERM} else "",
        ) from error
    try:
        if flush and direct and is_block_device(path) and not writable:
            _flush_buffers(fd)
        disk = DiskIO(path, fd, direct)
        yield disk
        if writable:
            disk.sync()
    finally:
        os.close(fd)


def _who_may_open() -> str:
    if os.geteuid():
        return "remetal needs to run as root."
    return "Root may not, so this is a container, or a service that is confined: run remetal on its host."


def aligned_buffer(size: int) -> memoryview:
    """Return `size` bytes of zeroed, page-aligned memory that direct I/O can use."""
    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]


def flush_cache(path: Path) -> None:
    """Write back and drop what the kernel caches of a block device, so that nobody reads stale bytes."""
    if is_block_device(path):
        with open_disk(path) as disk:
            _flush_buffers(disk.fd)


def drop_cache(path: Path, places: Iterable[tuple[int, int]]) -> None:
    """Drop what the kernel caches of these bytes of a block device: pairs of first byte and size.

    What is to be written back stays, since it is newer than the disk. Raises RefusedError if the disk is gone.
    """
    with open_disk(path) as disk:
        for start, size in places:
            os.posix_fadvise(disk.fd, start, size, os.POSIX_FADV_DONTNEED)


def probe_written(device: Path) -> int:
    """Return the bytes that the kernel has written to a block device so far (Documentation/block/stat.rst)."""
    return _statistics(device)[6] * _SECTOR


def probe_changed(device: Path) -> int | None:
    """Return the bytes that were written to a block device so far, or discarded; None if the kernel does not count.

    Source: Documentation/block/stat.rst and queue-sysfs.rst (`iostats`).
    """
    folder = Path("/sys/class/block", device.name).resolve()
    disk = folder if (folder / "queue").is_dir() else folder.parent
    if (disk / "queue/iostats").read_text().strip() != "1":
        return None
    counts = _statistics(device)
    return (counts[6] + sum(counts[13:14])) * _SECTOR


def _statistics(device: Path) -> list[int]:
    return [int(each) for each in Path("/sys/class/block", device.name, "stat").read_text().split()]


def find_partition(span: Span) -> Path | None:
    """Return the device that is a span of a block device: itself, or a partition of it; None if the kernel has none."""
    if not is_block_device(span.path):
        return None
    number = span.path.stat().st_rdev
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    starts = {folder: 0} | {each.parent: int(each.read_text()) * _SECTOR for each in folder.glob("*/start")}
    for each, start in starts.items():
        if (start, int((each / "size").read_text()) * _SECTOR) == (span.start, span.size):
            return Path("/dev", each.name.replace("!", "/"))
    return None


def reread_partitions(path: Path) -> None:
    """Ask the kernel to look at a disk's partition table again; regular files need nothing.

    Raises RefusedError if a partition is in use.
    """
    if not is_block_device(path):
        return
    with open_disk(path, writable=True) as disk:
        try:
            fcntl.ioctl(disk.fd, _BLKRRPART)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise RefusedError(
                    f"the kernel still uses a partition of {path}", hint="Unmount it, or reboot."
                ) from error
            if error.errno not in {errno.EINVAL, errno.ENOTTY}:
                raise RemetalError(
                    f"the kernel does not read the partition table of {path}: {os.strerror(error.errno or 0)}"
                ) from error


def _flush_buffers(fd: int) -> None:
    os.fsync(fd)
    try:
        fcntl.ioctl(fd, _BLKFLSBUF)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM}:
            raise


def _ioctl_number(fd: int, request: int, code: str) -> int:
    answer = fcntl.ioctl(fd, request, b"\0" * struct.calcsize(code))
    return int(struct.unpack(code, answer)[0])
