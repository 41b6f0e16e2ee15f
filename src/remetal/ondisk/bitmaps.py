"""Allocation bitmaps as ranges of bytes: taken piece by piece, so that no volume is too large for the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from remetal.ondisk.regions import BadStructureError
from remetal.units import MIB

PIECE = MIB
"""Bytes of a bitmap that are looked at together."""

_ROWS = 1 << 16
"""How many ranges are turned into numbers of Python's at once, which take ten times the memory."""

Ranges = npt.NDArray[np.int64]
"""One row for each run of set bits: the first, and the one behind the last."""


class UncleanError(BadStructureError):
    """A sound file system whose map of used blocks may lack some that are in use, because it was not put to rest.

    The message goes on behind the name of the file system.
    """


def find_ranges(pieces: Iterable[bytes], count: int, order: Literal["little", "big"]) -> Ranges:
    """Return the runs of set bits among the first `count` of a bitmap, ascending.

    `order` tells which bit of a byte is the first: the lowest (`little`) or the highest. Raises BadStructureError if
    the pieces have fewer bits.
    """
    edges: list[npt.NDArray[np.int64]] = []
    position = last = 0
    for piece in pieces:
        data = np.frombuffer(piece, np.uint8)[: -(-(count - position) // 8)]
        if data.size == 0:
            continue
        if np.all(data == (0xFF if last else 0)):
            position += min(8 * data.size, count - position)
            continue
        bits = np.unpackbits(data, bitorder=order)[: count - position]
        if bits[0] != last:
            edges.append(np.array([position], np.int64))
        edges.append(np.flatnonzero(bits[1:] != bits[:-1]) + position + 1)
        position, last = position + bits.size, int(bits[-1])
    if position < count:
        raise BadStructureError("the map of used blocks ends before the file system does")
    return np.concatenate([*edges, np.array([count] if last else [], np.int64)]).reshape(-1, 2)


def count_bits(ranges: Ranges) -> int:
    """Return how many bits the ranges hold."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def covers(ranges: Ranges, first: int, count: int) -> bool:
    """Whether all of `count` bits from the bit `first` are set."""
    index = int(np.searchsorted(ranges[:, 0], first, "right")) - 1
    return index >= 0 and first + count <= int(ranges[index, 1])


def to_bytes(ranges: Ranges, start: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and size in bytes of ranges of blocks of `size` bytes, whose first lies at byte `start`."""
    for at in range(0, len(ranges), _ROWS):
        for first, end in ranges[at : at + _ROWS].tolist():
            yield start + first * size, (end - first) * size


def merge(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield ranges (start, size), which come in ascending order, with those that touch or overlap made one."""
    first = end = -1
    for start, size in ranges:
        if first >= 0 and start <= end:
            end = max(end, start + size)
        elif size > 0:
            if first >= 0:
                yield first, end - first
            first, end = start, start + size
    if first >= 0:
        yield first, end - first
