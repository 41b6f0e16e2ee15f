"""What was read of a volume while it is in use: which chunks are stored, which are in memory, and what is missing.

A chunk counts as read if nothing of it was written since it was last read, and all of it was read that is in use now.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from remetal.errors import RemetalError
from remetal.image.ranges import Extent, Extents, subtract
from remetal.repository.maps import ID_SIZE
from remetal.repository.session import Batch, Known
from remetal.system.blockdev import Span, aligned_buffer, open_disk
from remetal.system.spool import Spool
from remetal.units import KIB

BLOCK = 4 * KIB
"""What was written to chunks in memory is told in blocks of so many bytes."""

_GAP = 8
"""Blocks that were not written are read, too, if so few lie between two that were."""
_READERS = 8
_RUN = 256
"""How many chunks are looked up at once."""
_WIDTH = 1 + ID_SIZE


class Ahead:
    """The chunks of a volume that were read: those that are stored, by their ids in a file without a name, and others.

    `hint` is what was in use when it was read first, `whole` are the chunks of which everything was stored, and `held`
    are those in memory, as they were when they were last read.
    """

    def __init__(self, span: Span, chunk_size: int) -> None:
        self.span = span
        self.chunk_size = chunk_size
        self.hint = Extents()
        self.whole: set[int] = set()
        self.held: dict[int, memoryview] = {}
        self._ids = Spool()
        self._ids.write(-(-span.size // chunk_size) * _WIDTH, b"\0")

    def keep(self, known: Known) -> None:
        """Note what chunks are stored as."""
        self._ids.write(known.first * _WIDTH, b"".join(b"\1" + each for each in known.ids))

    def extent(self, chunk: int) -> Extent:
        """Return where a chunk lies in the volume."""
        start = chunk * self.chunk_size
        return Extent(start, min(self.chunk_size, self.span.size - start))

    def missing(self, used: Extents, written: Iterable[int]) -> tuple[set[int], dict[int, list[int]]]:
        """Return the chunks in use that have to be read, and the blocks that have to be, of those that are in memory.

        `written` are the blocks that were written since anything was read last. Of the other chunks those have to be
        read that were written, or that hold more that is in use than was read. Everybody waits for this, so nothing is
        looked up that is known: what was in use at first is stored, or in memory.
        """
        blocks: dict[int, list[int]] = {}
        for block in sorted(written):
            blocks.setdefault(block // (self.chunk_size // BLOCK), []).append(block)
        more = set(self._chunks(subtract(used, self.hint))) - self.whole
        missing = (more | self._used(used, sorted(blocks))) - self.held.keys()
        return missing, {chunk: found for chunk, found in blocks.items() if chunk in self.held}

    def read(self, chunks: Iterable[int], blocks: Mapping[int, Sequence[int]]) -> int:
        """Read whole chunks into memory, and blocks of chunks that are there; return how many bytes.

        Raises RemetalError if the disk cannot be read.
        """
        places: list[tuple[memoryview, int]] = []
        for chunk in sorted(chunks):
            extent = self.extent(chunk)
            self.held[chunk] = aligned_buffer(extent.size)
            places.append((self.held[chunk], extent.start))
        for chunk, numbers in blocks.items():
            extent = self.extent(chunk)
            for first, last in _stretches(numbers):
                start, end = first * BLOCK - extent.start, min((last + 1) * BLOCK - extent.start, extent.size)
                places.append((self.held[chunk][start:end], extent.start + start))
        with open_disk(self.span.path, direct=True, flush=False) as disk:
            pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
            try:
                for _ in pool.map(lambda place: disk.read_into(place[0], self.span.start + place[1]), places):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)  # whoever presses Ctrl-C waits for those under way only
        return sum(len(buffer) for buffer, _ in places)

    def image(self, used: Extents) -> Iterator[Batch | Known]:
        """Yield the image's chunks: those that are in memory, and between them what is stored already."""
        for unused in subtract((self.extent(chunk) for chunk in sorted(self.held)), used):
            start = unused.start % self.chunk_size
            self.held[unused.start // self.chunk_size][start : start + unused.size] = bytes(unused.size)
        for run in _runs(self._chunks(used)):
            for held, group in groupby(run, self.held.__contains__):
                if held:
                    yield from (Batch(chunk, self.held.pop(chunk), lambda: None) for chunk in group)
                else:
                    yield self._stored(list(group))

    def _stored(self, run: Sequence[int]) -> Known:
        ids = [each for each in self._known(run) if each is not None]
        if len(ids) != len(run):
            raise RemetalError(f"the list of what was read of {self.span} has changed by itself")
        return Known(run[0], ids, sum(self.extent(chunk).size for chunk in run))

    def _known(self, chunks: Sequence[int]) -> list[bytes | None]:
        """Return the ids of consecutive chunks, None for those that are not stored."""
        data = self._ids.read(chunks[0] * _WIDTH, len(chunks) * _WIDTH)
        rows = (data[at : at + _WIDTH] for at in range(0, len(data), _WIDTH))
        return [row[1:] if row[0] else None for row in rows]

    def _used(self, used: Extents, chunks: Sequence[int]) -> set[int]:
        """Return those of chunks, which ascend, of which anything is in use."""
        found: set[int] = set()
        at = 0
        for extent in used if chunks else ():
            at = bisect_left(chunks, extent.start // self.chunk_size, at)
            while at < len(chunks) and chunks[at] * self.chunk_size < extent.end:
                found.add(chunks[at])
                at += 1
            at = max(at - 1, 0)  # the next extent may begin in the same one
        return found

    def _chunks(self, extents: Iterable[Extent]) -> Iterator[int]:
        """Yield the chunks that hold any byte of extents, which ascend; each of them once."""
        following = 0
        for extent in extents:
            first = max(extent.start // self.chunk_size, following)
            following = max(-(-extent.end // self.chunk_size), following)
            yield from range(first, following)


def _stretches(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of blocks, which ascend, that are close enough to be read at once."""
    first = last = blocks[0]
    for block in blocks:
        if block > last + 1 + _GAP:
            yield first, last
            first = block
        last = block
    yield first, last


def _runs(chunks: Iterable[int]) -> Iterator[list[int]]:
    """Yield ascending chunks as runs of consecutive ones, which are looked up at once."""
    run: list[int] = []
    for chunk in chunks:
        if run and (chunk != run[-1] + 1 or len(run) >= _RUN):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run
