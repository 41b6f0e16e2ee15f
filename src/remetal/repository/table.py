"""All known chunks of a machine, and all known packs, in files without a name (`remetal.repository.keyed`).

That takes 53 bytes per chunk and 84 per pack of such files, twice that for a moment, and some megabytes of memory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remetal.repository.keyed import WAITING_ROWS, KeyedRows, without_fields
from remetal.repository.named import NamedObjects
from remetal.repository.packs import ENTRY, ZSTD, Contents

CHUNK = np.dtype(
    [
        ("id", "u1", 32),
        ("pack", "<u4"),
        ("ordinal", "<u4"),
        ("offset", "<u4"),
        ("word", "<u4"),
        ("plain", "<u4"),
        ("marked", "u1"),
    ]
)

_PLACE = struct.Struct("<32x5I")
_MARK = CHUNK.itemsize - 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk lies: number of the pack in `ChunkTable.packs`, ordinal, byte range, size word, plain size."""

    pack: int
    ordinal: int
    offset: int
    word: int
    plain: int


class ChunkTable:
    """Chunk id → place. Adding and finding must not run at the same time in two threads.

    After `settle`, any number of threads may find. Of a chunk that lies in several packs the first that was added
    counts.
    """

    def __init__(self) -> None:
        self.packs = NamedObjects()
        self.absent = NamedObjects()
        """Packs that an index object tells of, and that are not there: their chunks are not known."""
        self._chunks = KeyedRows(CHUNK)

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, packs: Sequence[Contents]) -> None:
        """Add the chunks of packs; a pack that is known already changes nothing."""
        numbers = self.packs.add((each.identity, each.size) for each in packs)
        group: list[tuple[int, Contents]] = []
        rows = 0
        for number, pack in zip(numbers, packs, strict=True):
            if number < 0:
                continue
            group.append((number, pack))
            rows += len(pack.entries)
            if rows >= WAITING_ROWS:
                self._chunks.add(_rows_of(group))
                group, rows = [], 0
        if group:
            self._chunks.add(_rows_of(group))

    def settle(self) -> None:
        """Make ready for finding in many threads."""
        self._chunks.settle()

    def find(self, identity: bytes) -> Place | None:
        """Return where a chunk lies, or None if no index object has it."""
        row = self._chunks.find([identity])[0]
        return Place(*_PLACE.unpack_from(row)) if row is not None else None

    def packs_of(self, ids: Sequence[bytes]) -> list[int]:
        """Return the number of each chunk's pack, -1 for a chunk that the table lacks."""
        return [_PLACE.unpack_from(row)[0] if row is not None else -1 for row in self._chunks.find(ids)]

    def lengths_of(self, ids: Sequence[bytes]) -> list[int]:
        """Return each chunk's size in the image, -1 for a chunk that the table lacks."""
        return [_PLACE.unpack_from(row)[4] if row is not None else -1 for row in self._chunks.find(ids)]

    def mark(self, ids: Sequence[bytes]) -> int:
        """Note that these chunks are needed, and return how many of them the table lacks."""
        return self._chunks.write(ids, _MARK, b"\1").count(False)

    def marked_bytes(self) -> npt.NDArray[np.int32]:
        """Return for each pack how many of its bytes belong to marked chunks."""
        total = np.zeros(len(self.packs), np.int32)
        for rows in self._chunks.blocks():
            needed = rows[rows["marked"] != 0]
            np.add.at(total, needed["pack"], (needed["word"] & np.uint32(ZSTD - 1)).astype(np.int32))
        return total

    def is_marked(self, identity: bytes, pack: bytes) -> bool:
        """Whether the copy of a chunk that lies in this pack is marked."""
        row = self._chunks.find([identity])[0]
        return row is not None and row[_MARK] != 0 and self.packs[_PLACE.unpack_from(row)[0]][0] == pack


def _rows_of(packs: Sequence[tuple[int, Contents]]) -> npt.NDArray[np.void]:
    """Return the rows of the chunks of packs, which are given with their numbers."""
    entries = np.concatenate([without_fields(pack.entries) for _, pack in packs]).view(ENTRY)
    lengths = np.array([len(pack.entries) for _, pack in packs])
    firsts = np.cumsum(lengths) - lengths
    stored = (entries["word"] & np.uint32(ZSTD - 1)).astype(np.int64)
    before = np.cumsum(stored) - stored
    starts = np.array([pack.start for _, pack in packs], np.int64) - before[firsts]
    rows = np.empty(len(entries), CHUNK)
    rows["id"] = entries["id"]
    rows["pack"] = np.repeat(np.array([number for number, _ in packs], np.uint32), lengths)
    rows["ordinal"] = np.arange(len(entries)) - np.repeat(firsts, lengths)
    rows["offset"] = before + np.repeat(starts, lengths)
    rows["word"] = entries["word"]
    rows["plain"] = entries["plain"]
    rows["marked"] = 0
    return rows
