"""Reading a volume's used bytes in order, as batches of whole chunks for the repository.

Unused bytes inside a chunk read as zeros, so that the same files give the same chunks whatever lay in free
blocks before. Memory is a fixed pool of buffers; a reader that finds none waits until a worker is done with one.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from remetal.events import Progress, Report, silent
from remetal.image.extents import probe_used
from remetal.image.ranges import Extent
from remetal.pace import Pace
from remetal.repository.session import Batch, Session
from remetal.repository.snapshots import ImageRecord
from remetal.system.blockdev import PAGE, DiskIO, Span, aligned_buffer, is_block_device, open_disk, probe_geometry
from remetal.units import KIB, MIB, align_down, align_up

BATCH = 4 * MIB
"""Bytes of a volume that are read at once, and that one worker takes at once; less where there are many workers."""

READ_AHEAD = 2
"""How many batches are being read while the workers are busy."""

BUFFERS = 20 * MIB
"""Bytes of all batches together, unless each is a single chunk."""

SMALL_GAP = 128 * KIB
"""A gap between used extents that is cheaper to read over than to seek across, in bytes."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive chunks that are read together: their first index, their place in the volume, what is used."""

    first: int
    start: int
    size: int
    used: tuple[Extent, ...]


def capture_volume(
    session: Session,
    span: Span,
    *,
    volume: str,
    kind: str,
    extents: Sequence[Extent] | None = None,
    previous: ImageRecord | None = None,
    pace: Pace | None = None,
    report: Report = silent,
) -> ImageRecord:
    """Capture the used blocks of the volume at `span` into the session's repository.

    `kind` is the content's type as blkid names it; `extents` are what of it is used, where that is known already;
    `previous` is the image of the same volume in the snapshot before, whose unchanged chunks need no look-up; `pace`
    is how fast it is read at most. Raises RemetalError if the disk or its file system cannot be read, and what the
    repository raises.
    """
    if extents is None:
        extents = probe_used(span, kind, report=report)
    batches = read_batches(
        span, extents, session.chunk_size, buffers=session.workers + 1, part=volume, pace=pace, report=report
    )
    with closing(batches):
        return session.write_image(volume, span.size, batches, previous=previous)


def capture_bytes(session: Session, data: bytes, *, volume: str, previous: ImageRecord | None) -> ImageRecord:
    """Capture bytes that stand on no disk, such as a key, as the image of `volume`; `previous` as above."""
    batches = iter([Batch(0, memoryview(data), lambda: None)])
    return session.write_image(volume, len(data), batches, previous=previous)


def batch_size(buffers: int, chunk_size: int) -> int:
    """Return the bytes of each batch, whole chunks, where `buffers` of them may exist beside those being read."""
    return max(align_down(min(BATCH, BUFFERS // (buffers + READ_AHEAD)), chunk_size), chunk_size)


def plan_stretches(extents: Sequence[Extent], size: int, chunk_size: int, *, batch: int) -> Iterator[Stretch]:
    """Cut the used extents of a volume of `size` bytes into stretches of whole chunks, at most `batch` bytes each.

    Every chunk that holds a used byte is in exactly one stretch, in ascending order; others are in none.
    """
    limit = max(batch // chunk_size, 1)
    used: list[Extent] = []
    first = last = -1

    def stretch() -> Stretch:
        start = first * chunk_size
        return Stretch(first, start, min((last + 1) * chunk_size, size) - start, tuple(used))

    for extent in extents:
        position = extent.start
        while position < extent.end:
            index = position // chunk_size
            piece = min(extent.end, (index + 1) * chunk_size) - position
            if first < 0 or index > last + 1 or index - first >= limit:
                if first >= 0:
                    yield stretch()
                used, first = [], index
            last = index
            if used and used[-1].end == position:
                used[-1] = Extent(used[-1].start, used[-1].size + piece)
            else:
                used.append(Extent(position, piece))
            position += piece
    if first >= 0:
        yield stretch()


def read_batches(
    span: Span,
    extents: Sequence[Extent],
    chunk_size: int,
    *,
    buffers: int,
    part: str,
    pace: Pace | None = None,
    flush: bool = True,
    report: Report = silent,
) -> Generator[Batch, None, None]:
    """Yield the used bytes of the volume at `span` as batches, in ascending order.

    `buffers` is the number of batches that may exist at once; each must be released for the next to be read.
    `part` names the volume in progress events. `pace` is how fast it is read at most, `flush` as for open_disk. Raises
    RemetalError if the disk cannot be read.
    """
    size = batch_size(buffers, chunk_size)
    pool: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in range(buffers + READ_AHEAD):
        pool.put(aligned_buffer(size))
    total = sum(extent.size for extent in extents)
    done = 0
    report(Progress(part, 0, total))
    with (
        open_disk(span.path, direct=wants_direct(span), flush=flush) as disk,
        ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="read") as readers,
    ):
        sector = probe_geometry(span.path).logical_sector if disk.direct else 1
        pending: deque[tuple[Stretch, memoryview, Future[None]]] = deque()
        stretches = plan_stretches(extents, span.size, chunk_size, batch=size)
        while True:
            while len(pending) < READ_AHEAD and (stretch := next(stretches, None)) is not None:
                if pace is not None:
                    pace.pay(sum(extent.size for extent in stretch.used))
                buffer = pool.get()
                view = buffer[: stretch.size]
                pending.append((stretch, buffer, readers.submit(_fill, disk, span, stretch, view, sector)))
            if not pending:
                break
            stretch, buffer, future = pending.popleft()
            future.result()
            yield Batch(stretch.first, buffer[: stretch.size], partial(pool.put, buffer))
            done += sum(extent.size for extent in stretch.used)
            report(Progress(part, done, total))


def wants_direct(span: Span, *, writing: bool = False) -> bool:
    """Whether this span is read and written past the page cache.

    Block devices are: their cache may be stale under a mounted file system, and a disk's worth of data would push
    everything else out of memory. A disk file's cache is always true, so it is used for reading; written bytes would
    only pass through it.
    """
    if is_block_device(span.path):
        sector = probe_geometry(span.path).logical_sector
    elif writing:
        sector = PAGE
    else:
        return False
    return span.start % sector == 0 and span.size % sector == 0


def _fill(disk: DiskIO, span: Span, stretch: Stretch, view: memoryview, sector: int) -> None:
    """Read a stretch's used extents into `view` and zero the rest of it."""
    for start, end in _reads(stretch, sector):
        disk.read_into(view[start - stretch.start : end - stretch.start], span.start + start)
    content = np.frombuffer(view, np.uint8)
    position = stretch.start
    for extent in (*stretch.used, Extent(stretch.start + stretch.size, 0)):
        content[position - stretch.start : extent.start - stretch.start] = 0
        position = extent.end


def _reads(stretch: Stretch, sector: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges to read, sector-aligned; extents with a small gap between them become one."""
    start = end = -1
    for extent in stretch.used:
        low = align_down(extent.start, sector)
        high = min(align_up(extent.end, sector), stretch.start + stretch.size)
        if start >= 0 and low - end <= SMALL_GAP:
            end = high
            continue
        if start >= 0:
            yield start, end
        start, end = low, high
    if start >= 0:
        yield start, end
