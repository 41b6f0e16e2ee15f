"""Cutting used extents into stretches of chunks: nothing used is lost, nothing is read twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remetal.image.capture import plan_stretches
from remetal.image.ranges import Extent

CHUNK = 64


@st.composite
def extents(draw: st.DrawFn) -> tuple[list[Extent], int]:
    """Ascending extents that do not touch, and a volume size that holds them."""
    found: list[Extent] = []
    position = 0
    for gap, size in draw(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 500)), max_size=20)):
        found.append(Extent(position + gap, size))
        position += gap + size
    return found, position + draw(st.integers(0, 100))


@given(extents(), st.integers(1, 8))
def test_every_used_byte_is_in_exactly_one_stretch(given: tuple[list[Extent], int], chunks: int) -> None:
    used, size = given
    stretches = list(plan_stretches(used, size, CHUNK, batch=chunks * CHUNK))
    covered = [byte for s in stretches for e in s.used for byte in range(e.start, e.end)]
    assert covered == [byte for e in used for byte in range(e.start, e.end)]


@given(extents(), st.integers(1, 8))
def test_stretches_are_whole_chunks_in_order_within_the_volume(given: tuple[list[Extent], int], chunks: int) -> None:
    used, size = given
    end = 0
    for stretch in plan_stretches(used, size, CHUNK, batch=chunks * CHUNK):
        assert stretch.start == stretch.first * CHUNK
        assert stretch.start >= end
        assert 0 < stretch.size <= chunks * CHUNK
        assert stretch.size % CHUNK == 0 or stretch.start + stretch.size == size
        for index in range(stretch.start, stretch.start + stretch.size, CHUNK):
            assert any(e.start < index + CHUNK and e.end > index for e in stretch.used), "a chunk without used bytes"
        end = stretch.start + stretch.size
        assert end <= size
