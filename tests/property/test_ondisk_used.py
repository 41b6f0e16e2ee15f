"""Maps of used blocks from damaged and hostile volumes: something possible, or the one error; and never for ever."""

from __future__ import annotations

import functools
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remetal.ondisk import exfat, f2fs, fat, ntfs
from remetal.ondisk.bitmaps import covers, find_ranges, merge
from remetal.ondisk.regions import BadStructureError, Read

MIB = 1 << 20
PIECE = 512
_F2FS_PACKS = (512, 1024)


def _seal_exfat(data: bytearray) -> None:
    total = 0
    for index, byte in enumerate(data[: 11 * 512]):
        if index not in {106, 107, 112}:
            total = ((total << 31 | total >> 1) + byte) & 0xFFFFFFFF
    data[11 * 512 : 12 * 512] = struct.pack("<I", total) * 128


def _seal_f2fs(data: bytearray) -> None:
    for pack in _F2FS_PACKS:
        count = struct.unpack_from("<I", data, pack * 4096 + 136)[0] % 512
        for block in (pack, pack + max(count, 1) - 1):
            place = block * 4096
            total = zlib.crc32(data[place : place + 4092], 0xF2F52010 ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
            data[place + 4092 : place + 4096] = struct.pack("<I", total)


CASES: dict[
    str, tuple[int, list[str], Callable[[Read, int], Iterator[tuple[int, int]]], Callable[[bytearray], None]]
] = {
    "ntfs": (4 * MIB, ["mkfs.ntfs", "-Q", "-F", "-q", "-c", "512", "-L", "x"], ntfs.read_used, lambda data: None),
    "exfat": (4 * MIB, ["mkfs.exfat", "-L", "x"], exfat.read_used, _seal_exfat),
    "f2fs": (64 * MIB, ["mkfs.f2fs", "-q", "-l", "x"], f2fs.read_used, _seal_f2fs),
    "fat": (4 * MIB, ["mkfs.vfat", "-s", "4", "-F", "12"], fat.read_used, lambda data: None),
}


@functools.cache
def image(name: str) -> tuple[bytes, tuple[int, ...]]:
    """Return a fresh image without the zeros at its end, and where in it there is anything else, in pieces."""
    size, make, _, _ = CASES[name]
    with TemporaryDirectory() as folder:
        path = Path(folder, "image")
        with path.open("wb") as file:
            file.truncate(size)
        subprocess.run([*make, path], check=True, capture_output=True)
        data = path.read_bytes()
    pieces = np.frombuffer(data, np.uint8).reshape(-1, PIECE).any(axis=1)
    filled = np.flatnonzero(pieces).tolist()
    return data[: (filled[-1] + 1) * PIECE], tuple(filled)


Damage = list[tuple[int, int, bytes]]
DAMAGE = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.integers(0, PIECE - 1), st.binary(min_size=1, max_size=8)), max_size=6
)


@settings(max_examples=400)
@given(st.sampled_from(sorted(CASES)), DAMAGE, st.booleans(), st.none() | st.integers(0, 5 * MIB))
def test_a_damaged_volume(name: str, damage: Damage, sealed: bool, size: int | None) -> None:
    data, filled = image(name)
    changed = bytearray(data)
    for index, offset, patch in damage:
        place = filled[index % len(filled)] * PIECE + offset
        changed[place : place + len(patch)] = patch[: len(data) - place]
    if sealed:
        CASES[name][3](changed)
    whole = CASES[name][0]
    end = whole if size is None else min(size, whole)

    def read(offset: int, count: int) -> bytes:
        assert 0 <= offset <= offset + count <= end
        return bytes(changed[offset : offset + count]).ljust(count, b"\0")

    try:
        used = list(CASES[name][2](read, end))
    except BadStructureError:
        return
    assert used
    assert all(start >= 0 and count > 0 for start, count in used)
    assert all(start + count <= after for (start, count), (after, _) in pairwise(used))
    assert sum(used[-1]) <= end


@given(st.binary(max_size=200), st.integers(0, 1600), st.integers(1, 50), st.sampled_from(["little", "big"]))
@example(b"", 0, 1, "little")
@example(b"\xff" * 100, 777, 10, "big")
def test_ranges_are_the_set_bits(data: bytes, count: int, piece: int, order: str) -> None:
    assert order in {"little", "big"}
    pieces = [data[start : start + piece] for start in range(0, len(data), piece)]
    if count > 8 * len(data):
        try:
            find_ranges(pieces, count, "little")
        except BadStructureError:
            return
        raise AssertionError("a map that is too short was taken")
    ranges = find_ranges(pieces, count, "little" if order == "little" else "big")
    wanted = {bit for bit in range(count) if data[bit // 8] >> (bit % 8 if order == "little" else 7 - bit % 8) & 1}
    assert [bit for first, end in ranges.tolist() for bit in range(first, end)] == sorted(wanted)
    assert all(end < first for (_, end), (first, _) in pairwise(ranges.tolist()))
    for bit in range(min(count, 40)):
        assert covers(ranges, bit, 3) == ({bit, bit + 1, bit + 2} <= wanted)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9))))
def test_merged_ranges_hold_the_same(ranges: list[tuple[int, int]]) -> None:
    merged = list(merge(sorted(ranges)))
    assert {place for start, size in merged for place in range(start, start + size)} == {
        place for start, size in ranges for place in range(start, start + size)
    }
    assert all(start + size < after for (start, size), (after, _) in pairwise(merged))
