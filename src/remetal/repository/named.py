"""Lists of objects that are named after their content, as long as they may be, in files without a name."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from remetal.repository.keyed import WAITING_ROWS, KeyedRows
from remetal.system.spool import Spool

NUMBERED = np.dtype([("id", "u1", 32), ("number", "<u4"), ("size", "<u8")])
NAMED = np.dtype([("id", "u1", 32), ("size", "<u8")])

_NUMBER = struct.Struct("<32xIQ")
_NAME = struct.Struct("<32sQ")


_AT_ONCE = 1 << 12


class NamedObjects:
    """Objects by number, from 0 on, and by the hash in their name, with their sizes in bytes; each of them once.

    Adding and finding must not run at the same time in two threads.
    """

    def __init__(self) -> None:
        self._rows = KeyedRows(NUMBERED)
        self._names = Spool()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> tuple[bytes, int]:
        """Return hash and size of an object."""
        assert 0 <= number < self._count, "there is no such object"
        identity, size = _NAME.unpack(self._names.read(number * NAMED.itemsize, NAMED.itemsize))
        return identity, size

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Yield hash and size of all objects, by number."""
        for first in range(0, self._count, WAITING_ROWS):
            last = min(first + WAITING_ROWS, self._count)
            yield from _NAME.iter_unpack(self._names.read(first * NAMED.itemsize, (last - first) * NAMED.itemsize))

    def __contains__(self, identity: object) -> bool:
        return isinstance(identity, bytes) and self._rows.find([identity])[0] is not None

    def add(self, objects: Iterable[tuple[bytes, int]]) -> list[int]:
        """Add objects and return their numbers in order, -1 for one that is there already."""
        numbers: list[int] = []
        fresh: dict[bytes, tuple[int, int]] = {}
        objects = list(objects)
        for (identity, size), row in zip(objects, self._rows.find([each for each, _ in objects]), strict=True):
            new = row is None and identity not in fresh
            numbers.append(self._count + len(fresh) if new else -1)
            if new:
                fresh[identity] = self._count + len(fresh), size
        if not fresh:
            return numbers
        rows = np.empty(len(fresh), NUMBERED)
        rows["id"] = np.frombuffer(b"".join(fresh), np.uint8).reshape(-1, 32)
        rows["number"] = [number for number, _ in fresh.values()]
        rows["size"] = [size for _, size in fresh.values()]
        self._names.append(np.frombuffer(b"".join(_NAME.pack(e, size) for e, (_, size) in fresh.items()), NAMED))
        self._rows.add(rows)
        self._count += len(fresh)
        return numbers

    def numbers(self, identities: Sequence[bytes]) -> list[int]:
        """Return each object's number, -1 for one that is not there."""
        return [_NUMBER.unpack(row)[0] if row is not None else -1 for row in self._rows.find(identities)]

    def sizes(self, identities: Sequence[bytes]) -> list[int]:
        """Return each object's size, -1 for one that is not there."""
        return [_NUMBER.unpack(row)[1] if row is not None else -1 for row in self._rows.find(identities)]


def gather(objects: Iterable[tuple[bytes, int]]) -> NamedObjects:
    """Return objects, of which only some thousands are taken up at once."""
    found, left = NamedObjects(), iter(objects)
    while group := list(islice(left, _AT_ONCE)):
        found.add(group)
    return found
