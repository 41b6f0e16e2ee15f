"""Partition tables survive the way to bytes and back, and no bytes make the parsers fail in an undocumented way."""

from __future__ import annotations

import struct
import uuid
import zlib
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.ondisk.gpt import Gpt, GptEntry, array_sectors, encode_gpt, parse_gpt
from remetal.ondisk.mbr import EXTENDED, Mbr, MbrEntry, encode_mbr, parse_mbr
from remetal.ondisk.regions import BadStructureError, Piece, Read

PROTECTIVE = bytes(446) + struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, 99) + bytes(48) + b"\x55\xaa"
GUIDS = st.uuids().map(lambda value: str(value).upper()).filter(lambda text: text != str(uuid.UUID(int=0)))
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=36).filter(
    lambda text: len(text.encode("utf-16-le")) <= 72
)


def disk_of(pieces: tuple[Piece, ...], size: int) -> tuple[bytearray, Read]:
    disk = bytearray(size)
    for piece in pieces:
        assert piece.offset >= 0
        assert piece.offset + len(piece.data) <= size
        disk[piece.offset : piece.offset + len(piece.data)] = piece.data
    return disk, reader(disk)


def reader(disk: bytearray) -> Read:
    def read(offset: int, size: int) -> bytes:
        assert offset >= 0
        assert size >= 0
        assert offset + size <= len(disk)
        return bytes(disk[offset : offset + size])

    return read


@st.composite
def gpts(draw: st.DrawFn) -> tuple[Gpt, int, int]:
    sector = draw(st.sampled_from([512, 4096]))
    count = draw(st.sampled_from([1, 4, 128, 131]))
    sectors = draw(st.integers(2 * array_sectors(count, sector) + 4, 700))
    first, last = 2 + array_sectors(count, sector), sectors - 2 - array_sectors(count, sector)
    cuts = sorted(draw(st.sets(st.integers(first, last + 1), max_size=12)))
    numbers = draw(st.permutations(range(1, count + 1)))
    entries = [
        GptEntry(
            number=number,
            type_guid=draw(GUIDS),
            unique_guid=draw(GUIDS),
            first=start,
            last=end - 1,
            attributes=draw(st.integers(0, (1 << 64) - 1)),
            name=draw(NAMES),
        )
        for number, start, end in zip(numbers, cuts[::2], cuts[1::2], strict=False)
    ]
    table = Gpt(draw(GUIDS), count, first, tuple(sorted(entries, key=lambda entry: entry.number)), PROTECTIVE)
    return table, sectors * sector, sector


def same(found: Gpt | None, table: Gpt) -> bool:
    return found is not None and (found.disk_guid, found.entry_count, found.first_usable, found.entries) == (
        (table.disk_guid, table.entry_count, table.first_usable, table.entries)
    )


@settings(max_examples=150)
@given(gpts())
def test_gpt_round_trip(case: tuple[Gpt, int, int]) -> None:
    table, size, sector = case
    _, read = disk_of(encode_gpt(table, size, sector), size)
    found = parse_gpt(read, size, sector)
    assert same(found, table)
    assert found is not None
    assert found.problems == ()
    assert encode_gpt(found, size, sector) == encode_gpt(table, size, sector)


@settings(max_examples=100)
@given(gpts(), st.data())
def test_gpt_backup_is_used_for_any_damage_of_the_primary(case: tuple[Gpt, int, int], data: st.DataObject) -> None:
    table, size, sector = case
    disk, read = disk_of(encode_gpt(table, size, sector), size)
    end_of_header, entries = sector + 92, 2 * sector
    place = data.draw(
        st.one_of(st.integers(sector, end_of_header - 1), st.integers(entries, entries + 128 * table.entry_count - 1))
    )
    disk[place] ^= data.draw(st.integers(1, 255))
    found = parse_gpt(read, size, sector)
    assert same(found, table)
    assert found is not None
    assert "primary partition table is damaged" in found.problems[0]


@settings(max_examples=60)
@given(gpts(), st.data())
def test_gpt_damaged_backup_is_told(case: tuple[Gpt, int, int], data: st.DataObject) -> None:
    table, size, sector = case
    disk, read = disk_of(encode_gpt(table, size, sector), size)
    disk[size - sector + data.draw(st.integers(0, 91))] ^= 1
    found = parse_gpt(read, size, sector)
    assert same(found, table)
    assert found is not None
    assert "backup" in found.problems[0]


@settings(max_examples=300)
@given(gpts(), st.data())
def test_gpt_hostile_values_with_right_checksums(case: tuple[Gpt, int, int], data: st.DataObject) -> None:
    """Checksums keep nobody out who writes them himself: every field is overwritten and the CRCs made right."""
    table, size, sector = case
    disk, read = disk_of(encode_gpt(table, size, sector), size)
    disk[size - sector :] = bytes(sector)
    hostile = st.sampled_from([0, 1, 2, 3, 127, 129, 1 << 20, (1 << 32) - 1, (1 << 63), (1 << 64) - 1])
    field = data.draw(st.sampled_from([24, 32, 40, 48, 72]))
    struct.pack_into("<Q", disk, sector + field, data.draw(hostile))
    struct.pack_into("<I", disk, sector + data.draw(st.sampled_from([12, 80, 84])), data.draw(hostile) & 0xFFFFFFFF)
    entry = 2 * sector + 128 * data.draw(st.integers(0, table.entry_count - 1))
    disk[entry : entry + 48] = data.draw(st.binary(min_size=48, max_size=48))
    disk[entry + 56 : entry + 128] = data.draw(st.binary(min_size=72, max_size=72))
    entries = bytes(disk[2 * sector : 2 * sector + table.entry_count * 128])
    struct.pack_into("<I", disk, sector + 88, zlib.crc32(entries))
    struct.pack_into("<I", disk, sector + 16, 0)
    struct.pack_into("<I", disk, sector + 16, zlib.crc32(bytes(disk[sector : sector + 92])))
    try:
        found = parse_gpt(read, size, sector)
    except BadStructureError:
        return
    assert found is not None
    for each in found.entries:
        assert 2 <= each.first <= each.last < size // sector
    encode_gpt(found, size, sector)


@settings(max_examples=200)
@given(st.binary(max_size=4096), st.integers(0, 8), st.sampled_from([512, 4096]))
def test_any_bytes_are_a_table_or_none_or_refused(data: bytes, tail: int, sector: int) -> None:
    disk = bytearray(data + bytes(tail * sector - len(data)) if tail * sector > len(data) else data)
    if len(disk) >= 512:
        disk[510:512] = b"\x55\xaa"
        disk[446] = disk[462] = disk[478] = disk[494] = 0
    for parse in (parse_gpt, parse_mbr):
        with suppress(BadStructureError):
            parse(reader(disk), len(disk), sector)


def test_gpt_needs_its_announcement_and_one_sound_copy() -> None:
    table = Gpt(str(uuid.uuid4()).upper(), 128, 34, (), PROTECTIVE)
    disk, read = disk_of(encode_gpt(table, 512 * 200, 512), 512 * 200)
    disk[512] ^= 1
    disk[-512] ^= 1
    with pytest.raises(BadStructureError, match="both copies"):
        parse_gpt(read, len(disk), 512)
    disk[510] = 0
    assert parse_gpt(read, len(disk), 512) is None


def test_gpt_that_does_not_fit_is_not_written() -> None:
    entry = GptEntry(1, str(uuid.uuid4()), str(uuid.uuid4()), 34, 170, 0, "")
    table = Gpt(str(uuid.uuid4()), 128, 34, (entry,), PROTECTIVE)
    with pytest.raises(BadStructureError, match="partition 1"):
        encode_gpt(table, 512 * 200, 512)


def test_protective_entry_follows_the_size_of_the_disk() -> None:
    table = Gpt(str(uuid.uuid4()), 128, 34, (), PROTECTIVE)
    (size,) = struct.unpack_from("<I", encode_gpt(table, 512 * 300, 512)[0].data, 458)
    assert size == 299
    huge = (1 << 33) * 512
    assert struct.unpack_from("<I", encode_gpt(table, huge, 512)[0].data, 458) == (0xFFFFFFFF,)
    hybrid = PROTECTIVE[:462] + struct.pack("<B3sB3sII", 0, b"\0\0\0", 0x0C, b"\0\0\0", 40, 8) + PROTECTIVE[478:]
    assert encode_gpt(Gpt(table.disk_guid, 128, 34, (), hybrid), 512 * 300, 512)[0].data == hybrid


@st.composite
def mbrs(draw: st.DrawFn) -> tuple[Mbr, int, int]:
    sector = draw(st.sampled_from([512, 4096]))
    sectors = draw(st.integers(40, 1 << 33))
    limit = min(sectors, 1 << 32)
    cuts = sorted(draw(st.sets(st.integers(1, limit), max_size=8)))
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    plain = st.integers(1, 255).filter(lambda kind: kind not in EXTENDED and kind != 0xEE)
    numbers = draw(st.permutations(range(1, 5)))
    entries = [
        MbrEntry(number, start, end - start, draw(plain), draw(st.sampled_from([0, 0x80])))
        for number, (start, end) in zip(numbers, ranges, strict=False)
    ]
    extended: bool = draw(st.booleans())
    if entries and extended:
        base = entries.pop()
        entries.append(MbrEntry(base.number, base.start, base.sectors, draw(st.sampled_from(sorted(EXTENDED))), 0))
        entries += draw_logical(draw, base.start, base.start + base.sectors, plain)
    entries.sort(key=lambda entry: entry.number)
    code = draw(st.binary(max_size=440)).ljust(440, b"\0")
    return Mbr(draw(st.integers(0, (1 << 32) - 1)), code, tuple(entries)), sectors * sector, sector


def draw_logical(draw: st.DrawFn, start: int, end: int, kinds: st.SearchStrategy[int]) -> list[MbrEntry]:
    if end - start < 8:
        return []
    cuts = sorted(draw(st.sets(st.integers(start + 1, end), max_size=12)))
    at_start: bool = draw(st.booleans())
    first = [start] if at_start else []
    places = [*first, *cuts]
    triples = [tuple(places[index : index + 3]) for index in range(0, len(places) - 2, 3)]
    found = [(a, b, c) for a, b, c in triples if a < b < c]
    head, tail = found[:1], draw(st.permutations(found[1:]))
    return [
        MbrEntry(5 + index, begin, stop - begin, draw(kinds), 0, record)
        for index, (record, begin, stop) in enumerate([*head, *tail])
    ]


class Sparse:
    """A disk of any size that holds only the sectors that were written."""

    def __init__(self, pieces: tuple[Piece, ...], size: int) -> None:
        self.sectors = {piece.offset: piece.data for piece in pieces}
        assert len(self.sectors) == len(pieces)
        self.size = size

    def read(self, offset: int, size: int) -> bytes:
        assert 0 <= offset <= self.size - size
        return self.sectors.get(offset, bytes(size))[:size]


@settings(max_examples=200)
@given(mbrs())
def test_mbr_round_trip(case: tuple[Mbr, int, int]) -> None:
    table, size, sector = case
    found = parse_mbr(Sparse(encode_mbr(table, size, sector), size).read, size, sector)
    assert found == table


@settings(max_examples=300)
@given(mbrs(), st.data())
def test_mbr_hostile_slots(case: tuple[Mbr, int, int], data: st.DataObject) -> None:
    table, size, sector = case
    pieces = encode_mbr(table, size, sector)
    disk = Sparse(pieces, size)
    victim = data.draw(st.sampled_from(sorted(disk.sectors)))
    record = bytearray(disk.sectors[victim])
    slot = 446 + 16 * data.draw(st.integers(0, 3))
    values = st.sampled_from([0, 1, 2, 30, 1 << 31, (1 << 32) - 1]) | st.integers(0, size // sector).map(
        lambda value: value & 0xFFFFFFFF
    )
    kind = data.draw(st.sampled_from([0, 5, 0x0F, 0x83, 0x85]))
    record[slot : slot + 16] = struct.pack("<B3sB3sII", 0, b"", kind, b"", data.draw(values), data.draw(values))
    disk.sectors[victim] = bytes(record)
    try:
        found = parse_mbr(disk.read, size, sector)
    except BadStructureError:
        return
    assert found is not None
    encode_mbr(found, size, sector)


def test_mbr_chain_that_loops_is_refused() -> None:
    head = bytes(446) + struct.pack("<B3sB3sII", 0, b"", 5, b"", 10, 80) + bytes(48) + b"\x55\xaa"
    link = bytes(446) + struct.pack("<B3sB3sII", 0, b"", 5, b"", 4, 1) + bytes(48) + b"\x55\xaa"
    back = bytes(446) + struct.pack("<B3sB3sII", 0, b"", 5, b"", 0, 1) + bytes(48) + b"\x55\xaa"
    disk = Sparse((Piece(0, head), Piece(10 * 512, link), Piece(14 * 512, back)), 512 * 100)
    with pytest.raises(BadStructureError, match="does not end"):
        parse_mbr(disk.read, disk.size, 512)


def test_mbr_outside_its_disk_is_not_written() -> None:
    table = Mbr(1, bytes(440), (MbrEntry(1, 50, 100, 0x83, 0),))
    with pytest.raises(BadStructureError, match="partition 1"):
        encode_mbr(table, 512 * 100, 512)
