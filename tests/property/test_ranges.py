"""Taking extents from extents: each byte that is in the first and not in the second is left, and no other."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from remetal.image.ranges import Extent, subtract


@st.composite
def extents(draw: st.DrawFn) -> list[Extent]:
    """Ascending extents, some of which touch."""
    found: list[Extent] = []
    position = 0
    for gap, size in draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), max_size=30)):
        found.append(Extent(position + gap, size))
        position += gap + size
    return found


def bytes_of(given: list[Extent]) -> set[int]:
    return {byte for each in given for byte in range(each.start, each.end)}


@given(extents(), extents())
def test_each_byte_is_where_it_belongs(used: list[Extent], others: list[Extent]) -> None:
    left = list(subtract(used, others))
    assert bytes_of(left) == bytes_of(used) - bytes_of(others)
    assert all(each.size > 0 for each in left)
    assert all(before.end <= after.start for before, after in pairwise(left))


@given(extents())
def test_nothing_and_all_of_it(used: list[Extent]) -> None:
    assert list(subtract(used, [])) == used
    assert list(subtract(used, used)) == list(subtract([], used)) == []
