"""Extents of a volume, as many as there may be: a fragmented volume of some terabytes has millions of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from remetal.system.spool import Spool

WAITING = 1 << 16
"""How many extents are held in memory, 16 bytes each; there are more of them only in a file without a name."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`size` bytes from byte `start` of a volume."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """The first byte behind the extent."""
        return self.start + self.size


class Extents(Sequence[Extent]):
    """A row of extents that grows at its end; equal to any sequence of the same."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._stored = 0
        self._spool: Spool | None = None
        self._waiting = array("q")
        for each in extents:
            self.append(each.start, each.size)

    def append(self, start: int, size: int) -> None:
        """Add an extent behind the others. Raises UnavailableError where the temporary file has no room."""
        self._waiting.append(start)
        self._waiting.append(size)
        if len(self._waiting) >= 2 * WAITING:
            self._spool = self._spool or Spool()
            self._spool.append(np.frombuffer(self._waiting, np.int64))
            self._stored += WAITING
            self._waiting = array("q")

    def __len__(self) -> int:
        return self._stored + len(self._waiting) // 2

    @overload
    def __getitem__(self, index: int) -> Extent: ...

    @overload
    def __getitem__(self, index: slice) -> list[Extent]: ...

    def __getitem__(self, index: int | slice) -> Extent | list[Extent]:
        """Return one extent, or several."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        block = self._block(number // WAITING)
        return Extent(block[number % WAITING * 2], block[number % WAITING * 2 + 1])

    def __iter__(self) -> Iterator[Extent]:
        """Yield all extents, some thousands of them in memory."""
        for number in range(self._stored // WAITING + 1):
            numbers = iter(self._block(number))
            yield from map(Extent, numbers, numbers)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(ours == theirs for ours, theirs in zip(self, other, strict=True))
        )

    def __repr__(self) -> str:
        return f"<{len(self)} extents>"

    def _block(self, number: int) -> array[int]:
        if number * WAITING >= self._stored:
            return self._waiting
        assert self._spool is not None
        width = 2 * WAITING * self._waiting.itemsize
        return array("q", self._spool.read(number * width, width))


def subtract(extents: Iterable[Extent], others: Iterable[Extent]) -> Iterator[Extent]:
    """Yield what of extents is not in others; both ascend and overlap nothing of their own."""
    left = iter(others)
    other = next(left, None)
    for extent in extents:
        start = extent.start
        while other is not None and other.end <= start:
            other = next(left, None)
        while other is not None and other.start < extent.end:
            if other.start > start:
                yield Extent(start, other.start - start)
            start = max(start, other.end)
            if other.end > extent.end:
                break
            other = next(left, None)
        if start < extent.end:
            yield Extent(start, extent.end - start)
