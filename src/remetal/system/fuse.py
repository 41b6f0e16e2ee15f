"""One file of our own making, shown by the kernel for the length of a block.

This speaks the kernel's FUSE protocol itself, without libfuse: a mount whose root is a regular file, as the kernel
allows it, needs nine kinds of request, all of them answered here. So nothing has to be installed, no signal handler of
the process is replaced, and answers of up to 1 MiB leave without being copied once more; libfuse with a Python binding
gives a quarter of the throughput.

Whoever uses the file must be another program, or the kernel: a thread of ours that waits for its own answers could not
be killed (a waiting read of a mounted file system cannot be interrupted, and while it waits, the connection lives).

Source: <linux/fuse.h>, protocol 7.31, and Documentation/filesystems/fuse.rst. Byte order is the machine's own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from tempfile import mkdtemp
from typing import Protocol

from remetal.errors import RefusedError, RemetalError
from remetal.system.run import find_program, run
from remetal.units import KIB, MIB


class _Kind(IntEnum):
    """The requests that concern one open file (enum fuse_opcode)."""

    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    BATCH_FORGET = 42


_UNANSWERED = {_Kind.FORGET, _Kind.BATCH_FORGET, _Kind.INTERRUPT}
_VERSION = (7, 31)
_ASYNC_READ, _BIG_WRITES, _ASYNC_DIO, _MAX_PAGES = 1 << 0, 1 << 5, 1 << 15, 1 << 22
_MAX_READ, _MAX_WRITE = MIB, 128 * KIB
_BUFFER = _MAX_WRITE + 4 * KIB
_IN_FLIGHT = 64

_REQUEST = struct.Struct("=IIQQIIII")  # fuse_in_header
_ANSWER = struct.Struct("=IiQ")  # fuse_out_header
_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")
_ATTR_OUT = struct.Struct("=QII" + "QQQQQQIIIIIIIIII")
_OPEN_OUT = struct.Struct("=QII")
_READ_IN = struct.Struct("=QQI")
_WRITE_IN = struct.Struct("=QQIIQII")
_WRITE_OUT = struct.Struct("=II")
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")
_FOREVER = 1 << 30

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8  # <linux/mount.h>
_MNT_FORCE, _MNT_DETACH = 1, 2

Pieces = Sequence[bytes | memoryview]


class Content(Protocol):
    """What the file holds. Called from several threads at once; an OSError becomes the reader's error number."""

    size: int
    """In bytes; it never changes."""

    def read(self, offset: int, size: int) -> Pieces:
        """Return the bytes from `offset`, in pieces; `size` never leads beyond the end."""

    def write(self, offset: int, data: bytes) -> None:
        """Take bytes that were written at `offset`; never beyond the end."""


@contextmanager
def shown_file(content: Content, *, workers: int = 4) -> Iterator[Path]:
    """Show `content` as a regular file and yield its path; gone on leaving, even for those who have it open.

    `workers` is how many requests are answered at once. The mount is in the mount namespace of this process; when the
    process dies, the kernel fails whatever still waits for an answer. Needs root. Raises RefusedError if this kernel
    has no FUSE.
    """
    fd = _open_channel()
    folder = Path(mkdtemp(prefix="remetal-image-"))
    place = folder / "image"
    try:
        place.touch(mode=0o600)
        _mount(fd, place)
        answering = [threading.Thread(target=_answer, args=(fd, content), name="fuse") for _ in range(workers)]
        try:
            for thread in answering:
                thread.start()
            yield place
        finally:
            # Forced: what is still asked for fails at once, and the threads see the end.
            _LIBC.umount2(os.fsencode(place), _MNT_FORCE | _MNT_DETACH)
            for thread in answering:
                thread.join()
    finally:
        os.close(fd)
        with suppress(OSError):
            place.unlink()
            folder.rmdir()


_LIBC = ctypes.CDLL(None, use_errno=True)


def _open_channel() -> int:
    """Open the kernel's device, which may need its module first."""
    for attempt in range(2):
        try:
            return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if attempt == 0 and error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO} and find_program("modprobe"):
                run(["modprobe", "fuse"], allowed=range(256))
                continue
            raise RefusedError(
                f"this kernel does not show files that a program makes: /dev/fuse: {os.strerror(error.errno or 0)}",
                hint="Load its module `fuse`, or use the recovery medium.",
            ) from error
    raise AssertionError("the second attempt returns or raises")


def _mount(fd: int, place: Path) -> None:
    options = f"fd={fd},rootmode={stat.S_IFREG:o},user_id={os.getuid()},group_id={os.getgid()},max_read={_MAX_READ}"
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    if _LIBC.mount(b"remetal", os.fsencode(place), b"fuse.remetal", flags, options.encode()) != 0:
        raise RemetalError(f"cannot mount an image on {place}: {os.strerror(ctypes.get_errno())}")


def _answer(fd: int, content: Content) -> None:
    """Answer requests until the file is unmounted or the kernel gave the connection up."""
    buffer = memoryview(bytearray(_BUFFER))
    while True:
        try:
            count = os.readv(fd, [buffer])
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.EINTR, errno.EAGAIN}:  # the request was taken back
                continue
            return
        _, kind, unique, *_ = _REQUEST.unpack_from(buffer)
        if kind in _UNANSWERED:
            continue
        try:
            pieces, status = _serve(kind, buffer[_REQUEST.size : count], content), 0
        except OSError as error:
            pieces, status = [], -(error.errno or errno.EIO)
        except Exception:  # noqa: BLE001 - without an answer, whoever asked would wait for ever
            pieces, status = [], -errno.EIO
        size = _ANSWER.size + sum(map(len, pieces))
        with suppress(OSError):  # nobody waits any more
            os.writev(fd, [_ANSWER.pack(size, status, unique), *pieces])


def _serve(kind: int, body: memoryview, content: Content) -> Pieces:
    """Return the answer to a request. Raises OSError for what this file cannot do."""
    match kind:
        case _Kind.READ:
            _, offset, size = _READ_IN.unpack_from(body)
            return content.read(offset, max(min(size, content.size - offset), 0))
        case _Kind.WRITE:
            _, offset, size, *_ = _WRITE_IN.unpack_from(body)
            if offset + size > content.size:
                raise OSError(errno.ENOSPC, "beyond the end")
            content.write(offset, bytes(body[_WRITE_IN.size : _WRITE_IN.size + size]))
            return [_WRITE_OUT.pack(size, 0)]
        case _Kind.INIT:
            return [_init(body)]
        case _Kind.GETATTR:
            return [_attributes(content)]
        case _Kind.OPEN:
            return [_OPEN_OUT.pack(0, 0, 0)]
        case _Kind.STATFS:
            return [_STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0)]
        case _Kind.RELEASE | _Kind.FLUSH:
            return []
        case _:  # for FSYNC, too: the kernel then knows that there is nothing to wait for
            raise OSError(errno.ENOSYS, "not for this file")


def _init(body: memoryview) -> bytes:
    _, _, read_ahead, flags = _INIT_IN.unpack_from(body)
    wanted = (_ASYNC_READ | _BIG_WRITES | _ASYNC_DIO | _MAX_PAGES) & flags
    limits = (_IN_FLIGHT, _IN_FLIGHT * 3 // 4, _MAX_WRITE, 1, _MAX_READ // (4 * KIB), 0, 0, 0)
    return _INIT_OUT.pack(*_VERSION, read_ahead, wanted, *limits)


def _attributes(content: Content) -> bytes:
    mode = stat.S_IFREG | 0o600
    times = (0,) * 6
    owner = (os.getuid(), os.getgid())
    return _ATTR_OUT.pack(
        _FOREVER, 0, 0, 1, content.size, -(-content.size // 512), *times, mode, 1, *owner, 0, 4 * KIB, 0
    )
