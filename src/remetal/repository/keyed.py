"""Rows that are found by their key, as many as there may be, in files without a name.

The memory that this takes does not grow with the rows, but for a directory: a sixteenth of a byte per row, and at most
4 MiB. The newest rows wait in memory; then they are sorted by a hash of their key and written as a segment, and once
there are several segments of a size, those are merged. A segment's directory says at which row each of its buckets
begins, so finding a row is one read of a few kilobytes per segment.

The hash is salted: whoever makes up keys, such as a machine that lies about its chunks, cannot fill a bucket with them.
Of rows with one key the first counts.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remetal.system.spool import Spool

KEY_SIZE = 32
WAITING_ROWS = 1 << 14
"""How many rows wait in memory before they become a segment, and how many are merged at once."""
BUCKET_ROWS = 64
"""How many rows of a segment share an entry of its directory, or up to twice so many; more above 2^27 rows."""
SEGMENTS = 8
"""So many segments of a size are merged before something is looked for."""
SEGMENTS_UNREAD = 512
"""So many segments of a size are merged while nothing is looked for: what comes in bulk is merged once or twice."""
DIRECTORY = np.dtype(np.uint32)
"""One entry of a directory."""

_MIN_BITS, _MAX_BITS, _MAX_ROWS = 4, 20, (1 << 32) - 1
_WORD = (1 << 64) - 1
_WORDS = struct.Struct("<4Q")

Rows = npt.NDArray[np.void]
_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows in the order of their hashes, from byte `start` of a file; `bits` of a hash are the number of its bucket."""

    spool: Spool
    start: int
    rows: int
    bits: int
    directory: memoryview

    @property
    def level(self) -> int:
        """How large it is: each level is as many times the size of the one below as there are segments of one."""
        return max((self.rows // WAITING_ROWS).bit_length() - 1, 0) // (SEGMENTS.bit_length() - 1)

    def range(self, number: int, bits: int) -> tuple[int, int]:
        """Return first and last row (exclusive) of the buckets that meet the hashes whose first `bits` are `number`."""
        if bits >= self.bits:
            bucket = number >> (bits - self.bits)
            return self.directory[bucket], self.directory[bucket + 1]
        return self.directory[number << (self.bits - bits)], self.directory[(number + 1) << (self.bits - bits)]


class KeyedRows:
    """Rows of one type, whose first field is the key: `("id", "u1", 32)`.

    Adding and finding must not run at the same time in two threads; after `settle`, any number of threads may find.
    Raises UnavailableError where the temporary files have no room.
    """

    def __init__(self, dtype: np.dtype[np.void]) -> None:
        self.dtype = dtype
        self._salt = tuple(secrets.randbits(64) | 1 for _ in range(4))
        self._segments: list[_Segment] = []
        self._spool: Spool | None = None
        self._waiting: Rows = np.empty(WAITING_ROWS, dtype)
        self._count = 0
        self._recent: dict[bytes, int] = {}
        self._indexed = 0

    def __len__(self) -> int:
        """How many rows there are; those of one key count once, or as often as they were added."""
        return self._count + sum(each.rows for each in self._segments)

    def add(self, rows: Rows) -> None:
        """Add rows; one whose key is there already is of no effect."""
        done = 0
        while done < len(rows):
            part = rows[done : done + WAITING_ROWS - self._count]
            without_fields(self._waiting)[self._count : self._count + len(part)] = without_fields(part)
            self._count += len(part)
            done += len(part)
            if self._count == WAITING_ROWS:
                self._flush()

    def settle(self) -> None:
        """Make ready for finding."""
        self._merge_where(SEGMENTS)
        keys = np.ascontiguousarray(self._waiting["id"][self._indexed : self._count]).tobytes()
        for number in range(self._indexed, self._count):
            start = (number - self._indexed) * KEY_SIZE
            self._recent.setdefault(keys[start : start + KEY_SIZE], number)
        self._indexed = self._count

    def find(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the bytes of each key's row, or None where there is none."""
        if self._indexed < self._count:
            self.settle()
        return [self._find(key) for key in keys]

    def write(self, keys: Sequence[bytes], offset: int, value: bytes) -> list[bool]:
        """Set bytes of each key's row, from byte `offset` of it; return which keys there are."""
        if self._indexed < self._count:
            self.settle()
        found = []
        for key in keys:
            place = self._place(key)
            number = self._recent.get(key) if place is None else None
            if place is not None and place[2][offset : offset + len(value)] != value:
                place[0].write(place[1] + offset, value)
            if number is not None:
                row = self._waiting[number : number + 1].view(np.uint8)
                row[offset : offset + len(value)] = np.frombuffer(value, np.uint8)
            found.append(place is not None or number is not None)
        return found

    def blocks(self) -> Iterator[Rows]:
        """Yield all rows, in any order, some thousands at a time. Nothing may be added meanwhile."""
        for segment in self._segments:
            for first in range(0, segment.rows, WAITING_ROWS):
                data = self._read(segment, first, min(first + WAITING_ROWS, segment.rows))
                yield np.frombuffer(data, self.dtype)
        if self._count:
            yield self._waiting[: self._count].copy()

    def _find(self, key: bytes) -> bytes | None:
        place = self._place(key)
        if place is not None:
            return place[2]
        number = self._recent.get(key)
        return bytes(self._waiting[number].tobytes()) if number is not None else None

    def _place(self, key: bytes) -> tuple[Spool, int, bytes] | None:
        """Return file, place and bytes of a row that no longer waits."""
        if not self._segments:
            return None
        first, second, third, fourth = _WORDS.unpack(key)
        salt = self._salt
        value = (first * salt[0] + second * salt[1] + third * salt[2] + fourth * salt[3]) & _WORD
        width = self.dtype.itemsize
        for segment in self._segments:
            bucket = value >> (64 - segment.bits)
            low, high = segment.directory[bucket], segment.directory[bucket + 1]
            if low == high:
                continue
            start = segment.start + low * width
            data = segment.spool.read(start, (high - low) * width)
            position = data.find(key)
            while position >= 0 and position % width:
                position = data.find(key, position + 1)
            if position >= 0:
                return segment.spool, start + position, data[position : position + width]
        return None

    def _read(self, segment: _Segment, first: int, last: int) -> bytes:
        width = self.dtype.itemsize
        return segment.spool.read(segment.start + first * width, (last - first) * width)

    def _hashes(self, rows: Rows) -> _Hashes:
        words = np.ascontiguousarray(rows["id"]).view("<u8").reshape(-1, 4)
        total = words[:, 0] * np.uint64(self._salt[0])
        for column in range(1, 4):
            total += words[:, column] * np.uint64(self._salt[column])
        return total

    def _flush(self) -> None:
        """Make a segment of the rows that wait."""
        rows, self._count, self._indexed, self._recent = self._waiting[: self._count], 0, 0, {}
        if self._spool is None:
            self._spool = Spool()
        rows, hashes = _in_order(rows, self._hashes(rows))
        bits = directory_bits(len(rows))
        counts = np.bincount((hashes >> np.uint64(64 - bits)).astype(np.int64), minlength=1 << bits)
        start = self._spool.append(rows)
        self._segments.append(_Segment(self._spool, start, len(rows), bits, _directory(counts)))
        self._merge_where(SEGMENTS_UNREAD)

    def _merge_where(self, enough: int) -> None:
        """Merge the segments from one on, up to the last, if `enough` of these have the size of the largest of them."""
        levels = [each.level for each in self._segments]
        for first in range(len(levels) - enough + 1):
            if levels[first:].count(max(levels[first:])) >= enough:
                self._segments[first:] = [self._merged(self._segments[first:])]
                self._spool = None  # the newest segments are always among those that are merged
                return

    def _merged(self, parts: Sequence[_Segment]) -> _Segment:
        """Return one segment of several, oldest first, a part of the hashes at a time."""
        total = sum(each.rows for each in parts)
        assert total <= _MAX_ROWS, "a directory counts to 2^32"
        spool, bits = Spool(), directory_bits(total)
        steps = min((total // WAITING_ROWS).bit_length(), bits)
        counts = np.zeros(1 << bits, DIRECTORY)
        kept = 0
        for number in range(1 << steps):
            rows = np.frombuffer(b"".join(self._read(each, *each.range(number, steps)) for each in parts), self.dtype)
            hashes = self._hashes(rows)
            if steps:
                mine = hashes >> np.uint64(64 - steps) == number
                rows, hashes = without_fields(rows)[mine].view(self.dtype), hashes[mine]
            rows, hashes = _in_order(rows, hashes)
            spool.append(rows)
            first = number << (bits - steps)
            buckets = (hashes >> np.uint64(64 - bits)).astype(np.int64) - first
            counts[first : first + (1 << (bits - steps))] = np.bincount(buckets, minlength=1 << (bits - steps))
            kept += len(rows)
        return _Segment(spool, 0, kept, bits, _directory(counts))


def directory_bits(rows: int) -> int:
    """Return how many bits of a hash are the number of a bucket in a segment of so many rows."""
    return min(max((rows // BUCKET_ROWS).bit_length() - 1, _MIN_BITS), _MAX_BITS)


def _directory(counts: npt.NDArray[np.integer]) -> memoryview:
    directory = np.zeros(len(counts) + 1, DIRECTORY)
    np.cumsum(counts, dtype=DIRECTORY, out=directory[1:])
    return directory.data


def without_fields(rows: Rows) -> Rows:
    """Return the same rows without their fields, which numpy would copy one by one."""
    return rows.view(f"V{rows.dtype.itemsize}")


def _in_order(rows: Rows, hashes: _Hashes) -> tuple[Rows, _Hashes]:
    """Return rows and hashes in the order of the hashes, of rows with one key that stand side by side the first."""
    order = np.argsort(hashes, kind="stable")
    rows, hashes = without_fields(rows)[order].view(rows.dtype), hashes[order]
    twins = np.flatnonzero(hashes[1:] == hashes[:-1])
    if len(twins):
        same = (rows["id"][twins] == rows["id"][twins + 1]).all(axis=1)
        keep = np.ones(len(rows), np.bool_)
        keep[twins[same] + 1] = False
        rows, hashes = without_fields(rows)[keep].view(rows.dtype), hashes[keep]
    return rows, hashes
