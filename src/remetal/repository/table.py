"""All known chunks of a machine, in sorted arrays that live in unlinked temporary files.

Memory: 56 bytes per chunk in the file, which the kernel may page out; while two arrays are merged, 16 bytes per
chunk of working memory. With 256 KiB chunks, 1 TB (4 million chunks) takes 224 MB of file and 64 MB of memory.
The names of packs take about 200 bytes for 16 MiB, 12 MB per TB.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remetal.errors import UnavailableError
from remetal.repository.packs import ZSTD, Contents, offsets

_ROW = np.dtype(
    [
        ("id", "u1", 32),
        ("pack", "<u4"),
        ("ordinal", "<u4"),
        ("offset", "<u4"),
        ("word", "<u4"),
        ("plain", "<u4"),
    ]
)
_FLUSH = 1 << 16
"""How many new rows wait in memory before they are sorted into an array."""
_BLOCK = 1 << 14

_Keys = npt.NDArray[np.uint64]
_Rows = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk lies: number of the pack in `ChunkTable.packs`, ordinal, byte range, size word, plain size."""

    pack: int
    ordinal: int
    offset: int
    word: int
    plain: int


class ChunkTable:
    """Chunk id → place. Adding and finding must not run at the same time in two threads."""

    def __init__(self) -> None:
        self.packs: list[tuple[bytes, int]] = []
        """Name (hash) and size in bytes of every pack."""
        self.absent: list[tuple[bytes, int]] = []
        """The same of packs that an index object tells of, and that are not there: their chunks are not known."""
        self._numbers: set[bytes] = set()
        self._segments: list[tuple[_Keys, _Rows]] = []
        self._marks: list[npt.NDArray[np.bool_]] = []
        self._waiting: list[_Rows] = []
        self._waiting_rows = 0

    def __len__(self) -> int:
        return self._waiting_rows + sum(len(keys) for keys, _ in self._segments)

    def add(self, pack: Contents) -> None:
        """Add the chunks of a pack; a pack that is known already changes nothing."""
        if pack.identity in self._numbers:
            return
        self._numbers.add(pack.identity)
        rows = np.empty(len(pack.entries), _ROW)
        rows["id"] = pack.entries["id"]
        rows["pack"] = len(self.packs)
        rows["ordinal"] = np.arange(len(rows), dtype=np.uint32)
        rows["offset"] = offsets(pack.entries, pack.start)[:-1]
        rows["word"] = pack.entries["word"]
        rows["plain"] = pack.entries["plain"]
        self.packs.append((pack.identity, pack.size))
        self._waiting.append(rows)
        self._waiting_rows += len(rows)
        if self._waiting_rows >= _FLUSH:
            self._flush()

    def known(self, ids: Sequence[bytes]) -> list[bool]:
        """Tell for each id whether the table has it."""
        places = self._find(ids)
        return [segment >= 0 for segment, _ in places]

    def find(self, identity: bytes) -> Place | None:
        """Return where a chunk lies, or None if no index object has it."""
        segment, number = self._find([identity])[0]
        if segment < 0:
            return None
        row = self._segments[segment][1][number]
        return Place(int(row["pack"]), int(row["ordinal"]), int(row["offset"]), int(row["word"]), int(row["plain"]))

    def packs_of(self, ids: Sequence[bytes]) -> list[int]:
        """Return the number of each chunk's pack, -1 for a chunk that the table lacks."""
        found = self._find(ids)
        return [int(self._segments[each][1][number]["pack"]) if each >= 0 else -1 for each, number in found]

    def mark(self, ids: Sequence[bytes]) -> list[bytes]:
        """Note that these chunks are needed, and return those that the table lacks. Nothing may be added any more.

        Of a chunk that lies in several packs one copy is marked, always the same.
        """
        found = self._find(ids)
        if not self._marks:
            self._marks = [np.zeros(len(keys), np.bool_) for keys, _ in self._segments]
        for segment, number in found:
            if segment >= 0:
                self._marks[segment][number] = True
        return [identity for identity, (segment, _) in zip(ids, found, strict=True) if segment < 0]

    def marked_bytes(self) -> npt.NDArray[np.int64]:
        """Return for each pack how many of its bytes belong to marked chunks."""
        total = np.zeros(len(self.packs), np.int64)
        for marks, (_, rows) in zip(self._marks, self._segments, strict=False):
            needed = rows[marks]
            total += np.bincount(needed["pack"], needed["word"] & np.uint32(ZSTD - 1), len(self.packs)).astype(np.int64)
        return total

    def is_marked(self, identity: bytes, pack: bytes) -> bool:
        """Whether the copy of a chunk that lies in this pack is marked."""
        segment, number = self._find([identity])[0]
        if segment < 0 or not self._marks[segment][number]:
            return False
        return self.packs[int(self._segments[segment][1][number]["pack"])][0] == pack

    def _find(self, ids: Sequence[bytes]) -> list[tuple[int, int]]:
        self._flush()
        result = [(-1, -1)] * len(ids)
        if not ids:
            return result
        wanted = _sort_keys(np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 32))
        for segment, (keys, rows) in enumerate(self._segments):
            starts = np.searchsorted(keys, wanted)
            for position, (start, key) in enumerate(zip(starts.tolist(), wanted.tolist(), strict=True)):
                number = start
                while result[position][0] < 0 and number < len(keys) and int(keys[number]) == key:
                    if rows[number]["id"].tobytes() == ids[position]:
                        result[position] = segment, number
                    number += 1
        return result

    def _flush(self) -> None:
        if not self._waiting_rows:
            return
        self._segments.append(_sorted_segment(self._waiting))
        self._waiting = []
        self._waiting_rows = 0
        while len(self._segments) > 1 and len(self._segments[-2][0]) <= 2 * len(self._segments[-1][0]):
            right, left = self._segments.pop(), self._segments.pop()
            self._segments.append(_sorted_segment([left[1], right[1]]))


def _sort_keys(ids: npt.NDArray[np.uint8]) -> _Keys:
    """Return the first 8 bytes of each id as a number: ids are hashes, so this is all the sorting they need."""
    return np.ascontiguousarray(ids[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


def _sorted_segment(parts: Sequence[_Rows]) -> tuple[_Keys, _Rows]:
    keys = np.concatenate([_sort_keys(part["id"]) for part in parts])
    order = np.argsort(keys, kind="stable")
    starts = np.cumsum([0, *(len(part) for part in parts)])
    file_keys = np.frombuffer(_temporary_memory(keys.nbytes), np.uint64)
    file_rows = np.frombuffer(_temporary_memory(len(keys) * _ROW.itemsize), _ROW)
    file_keys[:] = keys[order]
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        owner = np.searchsorted(starts, block, side="right") - 1
        for number, part in enumerate(parts):
            mask = owner == number
            file_rows[start : start + _BLOCK][mask] = part[block[mask] - starts[number]]
    return file_keys, file_rows


def _temporary_memory(size: int) -> mmap.mmap:
    """Return writable memory backed by a file without a name, whose blocks exist before it is touched."""
    try:
        with tempfile.TemporaryFile(prefix="remetal-index-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise UnavailableError(
            f"the chunk index needs {size} bytes in {tempfile.gettempdir()}: {os.strerror(error.errno or 0)}",
            hint="Free some space there, or set TMPDIR to a folder on a larger disk.",
        ) from error
