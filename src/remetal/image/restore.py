"""Writing an image back by comparing first: what already stands on the target is hashed and skipped.

So writing is idempotent. A restore that lost power goes on where it was, a second one writes nothing, and a
rollback on the same disk writes only what differs. Holes of the image are not touched.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from remetal.errors import DamagedError
from remetal.events import Progress, Report, silent
from remetal.image.capture import wants_direct
from remetal.repository.maps import ZERO_ID, Run
from remetal.repository.reader import Reader
from remetal.repository.snapshots import ImageRecord
from remetal.system.blockdev import DiskIO, Span, aligned_buffer, open_disk
from remetal.system.processors import probe_processors
from remetal.units import MIB, align_down

GROUP = 4 * MIB
"""Bytes of the target that one worker compares and writes at once; less where there are many workers."""

BUFFERS = 16 * MIB
"""Bytes of all that they have at once, unless each has a single chunk."""

WAITING = 2
"""How many more threads there are than processors: so many may wait for the disk or the repository."""

SMALL = 256 * MIB
"""Bytes of an image that may be held in memory as a whole."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a restore of one image did, in bytes of the target."""

    compared: int = 0
    written: int = 0

    def __add__(self, other: Written) -> Written:
        return Written(self.compared + other.compared, self.written + other.written)


def restore_image(
    reader: Reader,
    image: ImageRecord,
    span: Span,
    *,
    part: str,
    workers: int | None = None,
    cut: bool = False,
    report: Report = silent,
) -> Written:
    """Make the bytes at `span` equal to the image, writing only chunks that differ; durable on return.

    The span may be smaller than the image, as long as nothing but zeros and holes lies behind its end; with `cut`,
    whatever lies there is left out.
    Many chunks are in flight at once. Raises DamagedError if a chunk cannot be read back as it was stored,
    RemetalError if the target cannot be written; what was written stays, and the next call goes on from there.
    """
    if image.size > span.size and not cut:
        _check_end(reader, image, span)
    return _walk(reader, image, span, part=part, workers=workers, report=report, writing=True)


def read_image(reader: Reader, image: ImageRecord) -> bytes:
    """Return the whole content of a small image, such as a LUKS header. Raises DamagedError."""
    if not 0 < image.size <= SMALL:
        raise DamagedError(f"the image of '{image.volume}' has {image.size} bytes, which cannot be")
    data = bytearray(image.size)
    for run in reader.runs(image):
        for number, wanted in enumerate(run.ids, run.first):
            if wanted != ZERO_ID:
                place = number * image.chunk_size
                data[place : place + image.chunk_size] = reader.read_chunk(wanted)
    if len(data) != image.size:
        raise DamagedError(f"the image of '{image.volume}' does not have the size that its record says")
    return bytes(data)


def verify_image(
    reader: Reader,
    image: ImageRecord,
    span: Span,
    *,
    part: str,
    workers: int | None = None,
    report: Report = silent,
) -> Written:
    """Compare the bytes at `span` with the image and write nothing; `written` counts the bytes that differ."""
    if image.size > span.size:
        _check_end(reader, image, span)
    return _walk(reader, image, span, part=part, workers=workers, report=report, writing=False)


def _walk(
    reader: Reader,
    image: ImageRecord,
    span: Span,
    *,
    part: str,
    workers: int | None,
    report: Report,
    writing: bool,
) -> Written:
    workers = workers or probe_processors() + WAITING
    buffer = group_size(workers, image.chunk_size)
    buffers = threading.local()
    result = Written()
    report(Progress(part, 0, image.used))

    def work(disk: DiskIO, group: Run) -> Written:
        if not hasattr(buffers, "own"):
            buffers.own = aligned_buffer(buffer)
        return _bring(reader, image, span, disk, group, buffers.own, writing=writing)

    with (
        open_disk(span.path, writable=writing, direct=wants_direct(span, writing=writing)) as disk,
        ThreadPoolExecutor(workers, thread_name_prefix="restore") as pool,
    ):
        pending: deque[Future[Written]] = deque()
        try:
            for group in _groups(reader, image, span.size, buffer // image.chunk_size):
                pending.append(pool.submit(work, disk, group))
                if len(pending) > 2 * workers:
                    result += pending.popleft().result()
                    report(Progress(part, result.compared, image.used))
            while pending:
                result += pending.popleft().result()
                report(Progress(part, result.compared, image.used))
        finally:
            for future in pending:
                future.cancel()
    return result


def group_size(workers: int, chunk_size: int) -> int:
    """Return the bytes, whole chunks, that each of so many workers compares and writes at once."""
    return max(align_down(min(GROUP, BUFFERS // workers), chunk_size), chunk_size)


def _groups(reader: Reader, image: ImageRecord, size: int, count: int) -> Iterator[Run]:
    """Yield the image's runs that begin in its first `size` bytes, cut into pieces of up to `count` chunks."""
    end = -(-size // image.chunk_size)
    for run in reader.runs(image):
        for index in range(0, min(len(run.ids), end - run.first), count):
            yield Run(run.first + index, run.ids[index : min(index + count, end - run.first)])


def _bring(
    reader: Reader,
    image: ImageRecord,
    span: Span,
    disk: DiskIO,
    group: Run,
    buffer: memoryview,
    *,
    writing: bool,
) -> Written:
    """Compare one group of chunks with the target and bring over those that differ."""
    start = group.first * image.chunk_size
    size = min(len(group.ids) * image.chunk_size, image.size - start)
    room = min(size, span.size - start)
    view = buffer[:size]
    hole = disk.is_hole(span.start + start, room)
    if not hole:
        disk.read_into(view[:room], span.start + start)
        np.frombuffer(view, np.uint8)[room:] = 0
    pieces = [view[place : place + image.chunk_size] for place in range(0, size, image.chunk_size)]
    differing = [
        number
        for number, (piece, wanted) in enumerate(zip(pieces, group.ids, strict=True))
        if not (wanted == ZERO_ID if hole else _stands_there(reader, piece, wanted))
    ]
    if writing:
        for number in differing:
            _fetch(reader, image, pieces[number], group.ids[number])
        for first, last in _neighbours(differing):
            place, end = first * image.chunk_size, min((last + 1) * image.chunk_size, room)
            disk.write(view[place:end], span.start + start + place)
    return Written(compared=size, written=sum(len(pieces[number]) for number in differing))


def _fetch(reader: Reader, image: ImageRecord, piece: memoryview, wanted: bytes) -> None:
    content = bytes(len(piece)) if wanted == ZERO_ID else reader.read_chunk(wanted)
    if len(content) != len(piece):
        raise DamagedError(
            f"a chunk of '{image.volume}' has {len(content)} bytes instead of {len(piece)}",
            hint="Run `remetal check --read-data`, and restore another snapshot if there is one.",
        )
    piece[:] = content


def _neighbours(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last of each run of consecutive numbers."""
    first = 0
    for position, number in enumerate(numbers):
        if position == 0 or numbers[position - 1] != number - 1:
            first = number
        if position + 1 == len(numbers) or numbers[position + 1] != number + 1:
            yield first, number


def _check_end(reader: Reader, image: ImageRecord, span: Span) -> None:
    """Raise DamagedError if an image that is longer than its place holds data where that has ended."""
    last = span.size // image.chunk_size
    for run in reader.runs(image):
        for index in range(max(last, run.first), run.first + len(run.ids)):
            wanted = run.ids[index - run.first]
            kept = max(span.size - index * image.chunk_size, 0)
            if kept == 0 or (wanted != ZERO_ID and any(reader.read_chunk(wanted)[kept:])):
                raise DamagedError(
                    f"the image of '{image.volume}' holds data behind byte {span.size}, where its place ends"
                )


def _stands_there(reader: Reader, piece: memoryview, wanted: bytes) -> bool:
    whole = len(piece) - len(piece) % 8
    blank = not np.frombuffer(piece[:whole], np.uint64).any() and not any(piece[whole:])
    if wanted == ZERO_ID:
        return blank
    return not blank and reader.chunk_id(piece) == wanted
