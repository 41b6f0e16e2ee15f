"""What is counted beyond the superblocks: right on real file systems, one error for damaged ones."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.ondisk.ext import count_in_blocks
from remetal.ondisk.fat_chains import count_chains
from remetal.ondisk.regions import BadStructureError, Read
from remetal.ondisk.xfs import read_shared
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import KIB, MIB
from tests.real_disks import blank, program

SIZE = 16 * MIB


def fill(folder: Path) -> int:
    """Write files of known sizes; return how many blocks of 4096 bytes they take up, folders left out."""
    chance = random.Random(1)
    blocks = 0
    for number in range(200):
        size = chance.randrange(20_000)
        (folder / f"file{number}").write_bytes(bytes([7]) * size)
        blocks += -(-size // 4096)
    with (folder / "sparse").open("wb") as file:
        for place in range(0, 64 * 10 * KIB, 10 * KIB):
            file.seek(place)
            file.write(b"x")
    return blocks + 64


@pytest.mark.parametrize(
    ("options", "allowance"),
    [
        (("-t", "ext4", "-b", "1024"), 16),
        (("-t", "ext4", "-b", "2048", "-O", "^64bit"), 16),
        (("-t", "ext2", "-b", "1024"), 16 + 5 * 200),  # it cannot tell a map's block from one of attributes
    ],
)
def test_ext_is_counted_in_larger_blocks(tmp_path: Path, options: tuple[str, ...], allowance: int) -> None:
    disk = blank(tmp_path / "disk.img", SIZE)
    program("mke2fs", "-q", *options, disk)
    with attach_loop(Span(disk, 0, SIZE), writable=True) as device, mounted(device) as folder:
        blocks = fill(folder)
    data = disk.read_bytes()
    counted = count_in_blocks(lambda offset, size: data[offset : offset + size], SIZE, 4096)
    assert 0 <= counted // 4096 - blocks <= allowance


def test_files_and_folders_of_a_fat_are_counted(tmp_path: Path) -> None:
    disk = blank(tmp_path / "disk.img", SIZE)
    program("mkfs.vfat", "-F", "16", disk)
    (tmp_path / "some").write_bytes(bytes(10_000))
    (tmp_path / "empty").touch()
    for number in range(30):
        program("mcopy", "-i", disk, tmp_path / "some", f"::some{number}")
        program("mcopy", "-i", disk, tmp_path / "empty", f"::empty{number}")
    program("mmd", "-i", disk, "::folder")
    data = disk.read_bytes()
    assert count_chains(lambda offset, size: data[offset : offset + size], SIZE) == 31


@functools.cache
def images() -> dict[str, bytes]:
    """Return the first bytes of a file system of each kind that counts something, with a few shared blocks."""
    made = {}
    with tempfile.TemporaryDirectory() as place:
        for name, size, make in (
            ("ext", SIZE, ("mkfs.ext4", "-q", "-b", "1024")),
            ("fat", SIZE, ("mkfs.vfat", "-F", "16")),
            ("xfs", 300 * MIB, ("mkfs.xfs", "-q")),
        ):
            disk = blank(Path(place) / name, size)
            program(*make, disk)
            if name == "xfs":
                with attach_loop(Span(disk, 0, size), writable=True) as device, mounted(device) as folder:
                    (folder / "a").write_bytes(bytes([1]) * MIB)
                    program("cp", "--reflink=always", folder / "a", folder / "b")
            made[name] = disk.read_bytes()
    return made


COUNTERS: dict[str, tuple[Callable[[Read, int], int], tuple[int, ...]]] = {
    "ext": (functools.partial(count_in_blocks, block=4096), (1024, 2048, 2048 + 64)),
    "fat": (count_chains, (0, 512)),
    "xfs": (read_shared, (0, 512, 5 * 4096)),
}
"""What counts, and the bytes around which it finds what it goes by."""


def test_shared_blocks_are_counted() -> None:
    data = images()["xfs"]
    assert read_shared(lambda offset, size: data[offset : offset + size], len(data)) == MIB


@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(COUNTERS)),
    patches=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 260), st.binary(min_size=1, max_size=8)), max_size=6),
    cut=st.integers(0, 4),
)
def test_damage_is_the_one_error(name: str, patches: list[tuple[int, int, bytes]], cut: int) -> None:
    count, places = COUNTERS[name]
    whole = images()[name]
    size = len(whole) if cut else len(whole) // 3
    changes = [(places[place % len(places)] + offset, data) for place, offset, data in patches]

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= size, "a parser looks beyond its volume"
        piece = bytearray(whole[offset : offset + length])
        for start, data in changes:
            for index, byte in enumerate(data, start - offset):
                if 0 <= index < length:
                    piece[index] = byte
        return bytes(piece)

    try:
        assert count(read, size) >= 0
    except BadStructureError:
        return
