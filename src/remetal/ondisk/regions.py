"""What all parsers and writers of on-disk structures share: how they read, what they return, how they fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from remetal.errors import RemetalError

Read: TypeAlias = Callable[[int, int], bytes]
"""`read(offset, size)` returns exactly `size` bytes from byte `offset` of the disk or volume."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`data` belongs at byte `offset` of the disk."""

    offset: int
    data: bytes


class BadStructureError(RemetalError):
    """An on-disk structure is damaged, hostile, or cannot be written as asked.

    The only error that a parser or writer of this package raises, whatever the bytes.
    """
