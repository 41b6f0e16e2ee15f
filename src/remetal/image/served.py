"""An image as a file that can be mounted, without restoring it anywhere.

Chunks are fetched when they are asked for, a few ahead of whoever reads on, and a small cache keeps the latest. What
is written to the file, as by a file system that replays its journal, goes to a scratch in memory and is forgotten;
only where the file begins with a place on a disk, what is written there lasts.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from remetal.errors import DamagedError, RemetalError
from remetal.events import Progress, Report, silent
from remetal.repository.maps import ZERO_ID
from remetal.repository.reader import Reader
from remetal.repository.snapshots import ImageRecord
from remetal.system.blockdev import DiskIO, Span, open_disk
from remetal.system.fuse import Content, Pieces, shown_file
from remetal.system.processors import probe_processors
from remetal.units import GIB, KIB, MIB

CACHE = 64 * MIB
"""Bytes of decoded chunks that are kept."""

AHEAD = 4 * MIB
"""Bytes that are fetched ahead of somebody who reads on from where he was."""

MAX_SCRATCH = 1 * GIB
"""Bytes that may be written over the image: as many as the largest usual journal holds."""

_PAGE = 4 * KIB
_ID_SIZE = len(ZERO_ID)


@contextmanager
def served_image(
    reader: Reader, image: ImageRecord, *, part: str, head: Span | None = None, report: Report = silent
) -> Iterator[Path]:
    """Show an image as a regular file of `image.size` bytes for the length of a block, and yield its path.

    The file may be read and written by other programs and by loop devices (see `remetal.system.fuse`), of which the
    last must be gone before the block is left; holes read as zeros. `part` names the image in progress events, which
    count bytes that were fetched. Nothing that is written lasts, but for the first `head.size` bytes if `head` is
    given: these are not the image's, but those of that place on a disk. Needs root. Whatever could not be read back as
    it was stored reads as an I/O error, and is raised at the end of the block as what it was: DamagedError, or
    UnavailableError if the store was lost; likewise RemetalError if the disk failed.
    """
    workers = probe_processors()
    report(Progress(part, 0, image.used))
    with ThreadPoolExecutor(workers, thread_name_prefix="serve") as pool:
        content = _Content(reader, image, pool, part, report)
        try:
            # More threads than processors: most of those who answer wait for a chunk.
            with _headed(content, head) as shown, shown_file(shown, workers=2 * workers) as path:
                yield path
        except RemetalError as error:
            if content.problem is not None:
                raise content.problem from error
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    if content.problem is not None:
        raise content.problem
    report(Progress(part, image.used, image.used))


@contextmanager
def _headed(content: _Content, head: Span | None) -> Iterator[Content]:
    """Let a place on a disk, if one is given, stand for the first bytes of an image; durable on a clean exit."""
    if head is None:
        yield content
        return
    with open_disk(head.path, writable=True) as disk:
        yield _Headed(content, head, disk)


class _Content:
    """The bytes of an image, with what was written over them."""

    def __init__(self, reader: Reader, image: ImageRecord, pool: ThreadPoolExecutor, part: str, report: Report) -> None:
        self.size = image.size
        self.problem: RemetalError | None = None
        self._scratch: dict[int, bytes] = {}
        self._chunks = _Chunks(reader, image, pool)
        self._guard = threading.Lock()
        self._part, self._total, self._report = part, image.used, report

    def read(self, offset: int, size: int) -> Pieces:
        """Return pieces of chunks; those with pages of the scratch are put together anew."""
        try:
            pieces = self._chunks.read(offset, size)
        except RemetalError as error:
            raise self.failed(error) from error
        self._tell()
        if not self._scratch:
            return pieces
        return [self._patched(b"".join(pieces), offset)]

    def write(self, offset: int, data: bytes) -> None:
        """Lay bytes over the image, page by page."""
        with self._guard:
            for number in range(offset // _PAGE, -(-(offset + len(data)) // _PAGE)):
                if number not in self._scratch and (len(self._scratch) + 1) * _PAGE > MAX_SCRATCH:
                    raise OSError(errno.ENOSPC, "too much is written to an image")
                start = number * _PAGE
                page = bytearray(b"".join(self.read(start, min(_PAGE, self.size - start))))
                first, last = max(offset, start), min(offset + len(data), start + len(page))
                page[first - start : last - start] = data[first - offset : last - offset]
                self._scratch[number] = bytes(page)

    def failed(self, error: RemetalError) -> OSError:
        """Keep the first thing that went wrong, and return it as what the kernel understands."""
        self.problem = self.problem or error
        return OSError(errno.EIO, error.message)

    def _patched(self, data: bytes, offset: int) -> bytes:
        patched = bytearray(data)
        for number in range(offset // _PAGE, -(-(offset + len(data)) // _PAGE)):
            page = self._scratch.get(number)
            if page is not None:
                start = number * _PAGE
                first, last = max(offset, start), min(offset + len(data), start + len(page))
                patched[first - offset : last - offset] = page[first - start : last - start]
        return bytes(patched)

    def _tell(self) -> None:
        """Report progress, one thread at a time; one that finds another at it has nothing to add."""
        if self._guard.acquire(blocking=False):
            try:
                done = self._chunks.news()
                if done:
                    self._report(Progress(self._part, min(done, self._total), self._total))
            finally:
                self._guard.release()


class _Headed:
    """An image whose first bytes are read from and written to a disk."""

    def __init__(self, content: _Content, head: Span, disk: DiskIO) -> None:
        self.size = content.size
        self._content, self._head, self._disk = content, head, disk

    def read(self, offset: int, size: int) -> Pieces:
        """Return the disk's bytes, then the image's."""
        ours = self._count(offset, size)
        pieces: list[bytes | memoryview] = []
        if ours:
            try:
                pieces.append(self._disk.read(self._head.start + offset, ours))
            except RemetalError as error:
                raise self._content.failed(error) from error
        if ours < size:
            pieces += self._content.read(offset + ours, size - ours)
        return pieces

    def write(self, offset: int, data: bytes) -> None:
        """Write to the disk what lies on it, and lay the rest over the image."""
        ours = self._count(offset, len(data))
        if ours:
            try:
                self._disk.write(data[:ours], self._head.start + offset)
            except RemetalError as error:
                raise self._content.failed(error) from error
        if ours < len(data):
            self._content.write(offset + ours, data[ours:])

    def _count(self, offset: int, size: int) -> int:
        """Return how many of these bytes are the disk's."""
        return max(min(self._head.size - offset, size), 0)


class _Chunks:
    """The chunks of an image by their index, decoded once for everybody who wants them at the same time."""

    def __init__(self, reader: Reader, image: ImageRecord, pool: ThreadPoolExecutor) -> None:
        self._reader, self._image, self._pool = reader, image, pool
        self._firsts: list[int] = []
        self._ids: list[bytes] = []
        for run in reader.runs(image):
            self._firsts.append(run.first)
            self._ids.append(b"".join(run.ids))
        self._zeros = memoryview(bytes(image.chunk_size))
        self._kept: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._capacity = max(CACHE, 2 * AHEAD) // image.chunk_size
        self._seen = bytearray(-(-image.size // image.chunk_size))
        self._fetched = self._told = 0
        self._last = -2
        self._guard = threading.Lock()

    def read(self, offset: int, size: int) -> list[memoryview]:
        """Return the bytes as pieces of chunks. Raises what the reader raises."""
        length = self._image.chunk_size
        first, last = offset // length, (offset + size - 1) // length
        wanted = [self._find(index) for index in range(first, last + 1)]
        self._fetch_ahead(first, last)
        pieces = []
        position = offset
        for index, future in zip(range(first, last + 1), wanted, strict=True):
            start = position - index * length
            stop = min(offset + size - index * length, length)
            pieces.append((self._zeros if future is None else memoryview(future.result()))[start:stop])
            position += stop - start
        return pieces

    def news(self) -> int:
        """Return the bytes fetched so far, each chunk once, if they are more than the last time; else 0."""
        with self._guard:
            if self._fetched < self._told + AHEAD:
                return 0
            self._told = self._fetched
            return self._fetched

    def _find(self, index: int) -> Future[bytes] | None:
        """Return a chunk, perhaps still on its way; None for zeros and holes."""
        identity = self._identity(index)
        if identity == ZERO_ID:
            return None
        with self._guard:
            future = self._kept.get(index)
            if future is None or (future.done() and future.exception() is not None):
                future = self._kept[index] = self._pool.submit(self._fetch, index, identity)
                while len(self._kept) > self._capacity:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(index)
        return future

    def _fetch_ahead(self, first: int, last: int) -> None:
        """Let the next chunks be fetched, too, if this read goes on where the last one was."""
        with self._guard:
            onwards = first <= self._last + 1 <= last + 1
            self._last = last
        if onwards:
            for index in range(last + 1, min(last + 1 + AHEAD // self._image.chunk_size, len(self._seen))):
                self._find(index)

    def _fetch(self, index: int, identity: bytes) -> bytes:
        data = self._reader.read_chunk(identity)
        length = self._image.chunk_size
        expected = min(length, self._image.size - index * length)
        if len(data) != expected:
            raise DamagedError(
                f"a chunk of '{self._image.volume}' has {len(data)} bytes instead of {expected}",
                hint="Run `remetal check --read-data`, and restore another snapshot if there is one.",
            )
        with self._guard:
            if not self._seen[index]:
                self._seen[index] = 1
                self._fetched += len(data)
        return data

    def _identity(self, index: int) -> bytes:
        """Return a chunk's id, ZERO_ID for one in a hole."""
        number = bisect_right(self._firsts, index) - 1
        if number < 0:
            return ZERO_ID
        place = (index - self._firsts[number]) * _ID_SIZE
        return self._ids[number][place : place + _ID_SIZE] or ZERO_ID
