"""Superblock parsers meet any bytes: they describe something possible, or raise their one error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.ondisk.ext import parse_ext
from remetal.ondisk.fat import parse_fat
from remetal.ondisk.regions import BadStructureError, Read
from remetal.ondisk.swap import parse_swap
from remetal.ondisk.xfs import parse_xfs

PARSERS: list[tuple[Callable[[Read, int], Any], int, bytes]] = [
    (parse_ext, 1024 + 0x38, b"\x53\xef"),
    (parse_xfs, 0, b"XFSB"),
    (parse_fat, 11, b"\x00\x02"),
    (parse_swap, 4086, b"SWAPSPACE2"),
]


@settings(max_examples=400)
@given(
    st.sampled_from(PARSERS),
    st.integers(0, 20000),
    st.dictionaries(st.integers(0, 4095), st.binary(min_size=1, max_size=8), max_size=24),
)
def test_any_bytes(case: tuple[Callable[[Read, int], Any], int, bytes], size: int, patches: dict[int, bytes]) -> None:
    parse, place, magic = case
    disk = bytearray(size)
    for offset, data in [*patches.items(), (place, magic)]:
        if offset + len(data) <= size:
            disk[offset : offset + len(data)] = data

    def read(offset: int, count: int) -> bytes:
        assert offset >= 0
        assert offset + count <= size
        return bytes(disk[offset : offset + count])

    try:
        found = parse(read, size)
    except BadStructureError:
        return
    assert found.size > 0
    assert "\0" not in getattr(found, "label", "")
    assert 0 <= getattr(found, "used", 0) <= found.size
