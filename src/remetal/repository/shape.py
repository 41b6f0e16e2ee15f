"""How much a MessagePack document would become in memory, told before any of it is made.

A byte of it may stand for an object of sixty, so a document that somebody else has written is walked first.
"""

from __future__ import annotations

import struct

MAX_ELEMENTS = 1 << 20
"""Values of one document, those in arrays and maps counted one by one: an image of 256 TiB has as many at the least."""
MAX_DEPTH = 16

_BE = {1: struct.Struct(">B"), 2: struct.Struct(">H"), 4: struct.Struct(">I")}
_FIXED = {
    **dict.fromkeys((0xC0, 0xC2, 0xC3), 0),
    0xCA: 4,
    0xCB: 8,
    **{0xCC + power: 1 << power for power in range(4)},
    **{0xD0 + power: 1 << power for power in range(4)},
    **{0xD4 + power: 1 + (1 << power) for power in range(5)},
}
"""Bytes that follow the first one of a nil, boolean, number, or short extension."""
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4}
"""Bytes of the length of a text, of bytes or of an extension, which has a byte more for its type."""
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""Bytes of the count of an array or a map, and values for each."""


class ShapeError(ValueError):
    """A document that is cut short, or larger or deeper than any that is written."""


def check_shape(data: bytes) -> None:
    """Raise ShapeError unless the first document in `data` is whole, and neither too many values nor too deep."""
    open_values = [1]
    position = elements = 0
    while open_values:
        if not open_values[-1]:
            open_values.pop()
            continue
        open_values[-1] -= 1
        elements += 1
        if elements > MAX_ELEMENTS or position >= len(data):
            raise ShapeError("it has more values than anything remetal writes, or is cut short")
        position, inside = _step(data, position)
        if inside:
            open_values.append(inside)
            if len(open_values) > MAX_DEPTH:
                raise ShapeError("it is deeper than anything remetal writes")
    if position > len(data):
        raise ShapeError("it is cut short")


def _step(data: bytes, position: int) -> tuple[int, int]:
    """Return where the next value begins, and how many values are inside of this one."""
    first = data[position]
    position += 1
    if first < 0x80 or first >= 0xE0:
        return position, 0
    if first < 0x90:
        return position, 2 * (first & 15)
    if first < 0xA0:
        return position, first & 15
    if first < 0xC0:
        return position + (first & 31), 0
    if first in _FIXED:
        return position + _FIXED[first], 0
    try:
        if first in _SIZED:
            size = _SIZED[first]
            length: int = _BE[size].unpack_from(data, position)[0]
            return position + size + length + (0xC7 <= first <= 0xC9), 0
        size, each = _COUNTED[first]
        return position + size, each * int(_BE[size].unpack_from(data, position)[0])
    except (struct.error, KeyError) as error:
        raise ShapeError("it is no MessagePack") from error
