"""The parser of MD superblocks meets any bytes: it describes an array that can be, or raises its one error.

Almost any damage would end at the checksum, so most of the time that is made right again behind it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remetal.ondisk.md import MdSuperblock, array_size, layout_name, level_name, parse_md
from remetal.ondisk.regions import BadStructureError

SIZE = 16 << 20
BLOCK = 4096
PLACES = {"0.90": SIZE - (64 << 10), "1.0": SIZE - (8 << 10), "1.1": 0, "1.2": 4096}
BITMAP_AT = {"0.90": 4096, "1.0": -4096, "1.1": 4096, "1.2": 4096}
CHECKSUM_AT = {"0.90": 152, "1.0": 216, "1.1": 216, "1.2": 216}

# Of arrays that mdadm 4.2 made: a RAID 5 with a spare, its words that are not zero, and a RAID 10 with a bitmap.
RAID_5 = """
0=a92b4efc 2=5a 5=7bc8d8ce 6=6b07e83f 7=5 8=3e00 9=4 10=3 11=70 13=7a3204c4 14=d7a6d8c7 15=9aeca122 32=6b07e840 33=1
34=3 35=4 37=1 38=e7d1b6fc 39=13 41=13 43=ffffffff 64=2 65=80000 129=7 130=23 132=6 160=1 161=7 162=24 163=1 164=6
192=2 193=7 194=25 195=2 196=6 224=3 225=7 226=26 227=3 993=7 994=23 996=6
"""
RAID_10 = (
    bytes.fromhex(
        "fc4e2ba9010000000100000000000000fa45441ae4d9a0f4059554616c1926a5626f783a74656e313200000000000000"
        "000000000000000000000000000000004fe8076b000000000a0000000301000000700000000000000004000004000000"
        "080000000000000000000000000000000000000000000000000000000000000000100000000000000070000000000000"
        "080000000000000000000000000000000000000000000000410c64c492b7b622bd4df963efc1e1680000080010000000"
        "4fe8076b000000001100000000000000ffffffffffffffff3b8c84b48000000000000000000000000000000000000000"
        "000000000000000000000000000000000000010002000300"
    )
    + b"\xff" * 248
)
BITMAP = bytes.fromhex(
    "6269746d04000000fa45441ae4d9a0f4059554616c1926a511000000000000000000000000000000009400000000000000000000000000040500"
)


@dataclass
class Disk:
    """A device of zeros but for some blocks, by their places; every read has to stay inside."""

    size: int
    blocks: dict[int, bytearray]

    def read(self, offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= self.size
        assert size <= BLOCK
        data = bytearray(size)
        for place, block in self.blocks.items():
            start, end = max(place, offset), min(place + len(block), offset + size)
            if start < end:
                data[start - offset : end - offset] = block[start - place : end - place]
        return bytes(data)

    def parse(self) -> MdSuperblock:
        return parse_md(self.read, self.size)


def sound(version: str) -> Disk:
    """Return a sound member: the recorded one, or that one moved to where another version has its superblock."""
    place = PLACES[version]
    block = bytearray(BLOCK)
    if version == "0.90":
        for at, word in (pair.split("=") for pair in RAID_5.split()):
            struct.pack_into("<I", block, 4 * int(at), int(word, 16))
        return Disk(SIZE, {place: block})
    block[: len(RAID_10)] = RAID_10
    if version != "1.2":
        start = 0 if version == "1.0" else 4096
        struct.pack_into("<i", block, 96, BITMAP_AT[version] // 512)
        struct.pack_into("<QQQ", block, 128, start, 0x7000, place // 512)
        repair(version, block)
    return Disk(SIZE, {place: block, place + BITMAP_AT[version]: bytearray(BITMAP)})


def repair(version: str, block: bytearray) -> None:
    """Make the checksum right for what is in the block."""
    (count,) = struct.unpack_from("<I", block, 220)
    size = BLOCK if version == "0.90" else min(BLOCK, 256 + 2 * count)
    struct.pack_into("<I", block, CHECKSUM_AT[version], 0)
    data = bytes(block[:size]) + bytes(-size % 4)
    total = sum(struct.unpack(f"<{len(data) // 4}I", data))
    struct.pack_into("<I", block, CHECKSUM_AT[version], (total + (total >> 32)) & 0xFFFFFFFF)


def move(disk: Disk, distance: int) -> None:
    disk.blocks = {place + distance: block for place, block in disk.blocks.items()}


def check(found: MdSuperblock, size: int) -> None:
    """Check what those who reckon with a superblock may rely on."""
    journal = any("journal" in problem for problem in found.problems)
    assert 0 < found.raid_disks <= 1920
    assert found.slot is None or 0 <= found.slot < found.raid_disks
    assert not (found.faulty and found.slot is not None)
    assert 0 <= found.data_offset < size
    assert 0 < found.data_size <= size
    assert 0 <= found.component_size < 1 << 63
    assert journal or found.data_offset + found.component_size <= size
    if found.version != "1.0":
        assert found.data_offset + found.data_size <= size
    assert 0 <= found.chunk < 1 << 41
    assert 0 <= found.bitmap_chunk < 1 << 32
    assert found.bitmap or not found.bitmap_chunk
    assert max(found.events, found.updated) < 1 << 64
    assert "\0" not in found.name
    assert level_name(found.level)
    named = layout_name(found.level, found.layout)
    assert named or found.level not in (5, 6, 10) or found.problems
    try:
        array = array_size([found])
    except BadStructureError:
        assert found.level not in (1, 4, 5, 6, 10)
    else:
        assert 0 <= array <= found.raid_disks * max(found.component_size, found.data_size)


@pytest.mark.parametrize("version", PLACES)
def test_the_recorded_ones_are_sound(version: str) -> None:
    found = sound(version).parse()
    check(found, SIZE)
    assert found.version == version
    assert (found.slot, found.clean, found.problems) == (0, True, ())
    if version == "0.90":
        assert found.array_uuid == "7bc8d8ce:7a3204c4:d7a6d8c7:9aeca122"
        assert (found.preferred_minor, found.component_size, array_size([found])) == (112, 0x3E00 << 10, 0x7C00 << 10)
    else:
        assert found.array_uuid == "fa45441a:e4d9a0f4:05955461:6c1926a5"
        assert (found.name, found.bitmap_chunk, found.events) == ("box:ten12", 64 << 20, 17)
        assert array_size([found]) == 37 * (512 << 10)


NUMBERS = st.sampled_from([0, 1, 2, 4, 0xFF, 0x7FFF, 0xFF00, 0xFFFE, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF])


@settings(max_examples=600)
@given(
    st.sampled_from(list(PLACES)),
    st.dictionaries(st.integers(2, 72) | st.integers(990, 999), NUMBERS | st.integers(0, 1 << 12), max_size=6),
    st.booleans() | st.just(True),
    st.sampled_from([SIZE, SIZE + 511, SIZE + 4096, 0, 4095, 12 << 10, 64 << 10]) | st.integers(7 << 20, SIZE),
)
@example("1.2", {55: 0xFFFFFFFF}, True, SIZE)
@example("1.2", {18: 1, 22: 0xFFFFFFFF, 23: 0xFFFFFFFF}, True, SIZE)
@example("1.0", {32: 0xFFFFFFFF, 33: 0xFFFFFFFF}, True, SIZE)
@example("0.90", {10: 0xFFFFFFFF}, True, SIZE)
@example("0.90", {7: 10, 64: 0}, True, SIZE)
@example("0.90", {65: 0}, True, SIZE)
def test_any_numbers(version: str, words: dict[int, int], repaired: bool, size: int) -> None:
    disk = sound(version)
    block = disk.blocks[PLACES[version]]
    for at, word in words.items():
        struct.pack_into("<I", block, 4 * at, word)
    # What lies at the end of a shorter or longer device is moved along: else there would be nothing to be found.
    if version == "0.90":
        move(disk, size // 65536 * 65536 - 65536 - PLACES[version])
    elif version == "1.0":
        place = (size // 512 * 512 - 8192) // 4096 * 4096
        move(disk, place - PLACES[version])
        struct.pack_into("<q", block, 144, place // 512)
    if repaired:
        repair(version, block)
    disk.size = size
    try:
        found = disk.parse()
    except BadStructureError:
        return
    check(found, size)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(list(PLACES)), max_size=4),
    st.dictionaries(st.integers(0, BLOCK - 8), st.binary(min_size=1, max_size=8), max_size=8),
)
def test_any_bytes_and_any_leftovers(versions: list[str], patches: dict[int, bytes]) -> None:
    disk = Disk(SIZE, {})
    for version in versions:
        disk.blocks.update(sound(version).blocks)
        for at, data in patches.items():
            disk.blocks[PLACES[version]][at : at + len(data)] = data
    try:
        found = disk.parse()
    except BadStructureError:
        return
    check(found, SIZE)
    assert found.version in versions


@pytest.mark.parametrize("version", PLACES)
@given(at=st.integers(0, 511), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(version: str, at: int, bit: int) -> None:
    disk = sound(version)
    disk.blocks[PLACES[version]][at] ^= 1 << bit
    with pytest.raises(BadStructureError):
        disk.parse()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({2: 1 | 4}, "it is being reshaped"),
        ({2: 1 | 16}, "a member is being replaced"),
        ({2: 1 | 256}, "a cluster shares it"),
        ({2: 1 | 1 << 13}, "its features 0x2000 are unknown"),
        ({8: 0xFF}, "its name is not text"),
        ({8: 0x0A0A0A0A}, "its name is not text"),
        ({19: 0x202}, "its layout 0x202 is unknown"),
        ({18: 0xFFFFFFFC}, "its level -4 is unknown"),
    ],
)
def test_what_cannot_be_carried_is_told(words: dict[int, int], problem: str) -> None:
    disk = sound("1.2")
    for at, word in words.items():
        struct.pack_into("<I", disk.blocks[4096], 4 * at, word)
    repair("1.2", disk.blocks[4096])
    assert disk.parse().problems == (problem,)


def test_a_reshape_in_version_0() -> None:
    disk = sound("0.90")
    struct.pack_into("<I", disk.blocks[PLACES["0.90"]], 8, 91)
    repair("0.90", disk.blocks[PLACES["0.90"]])
    assert disk.parse().problems == ("it is being reshaped",)


def test_a_bitmap_of_another_array_or_version() -> None:
    disk = sound("1.2")
    disk.blocks[8192][8] ^= 1
    assert (disk.parse().bitmap, disk.parse().bitmap_chunk) == (True, 0)
    disk = sound("1.2")
    disk.blocks[8192][4] = 6
    assert disk.parse().problems == ("its bitmap is of the unknown version 6",)
