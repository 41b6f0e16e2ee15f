"""Round-trips of images and formats, and parsers under hostile bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.errors import DamagedError, RefusedError
from remetal.repository.check import check_repository
from remetal.repository.config import decode_config
from remetal.repository.history import open_envelope
from remetal.repository.indexes import decode_index, encode_index
from remetal.repository.kit import RecoveryKit, parse_kit
from remetal.repository.locks import LockRecord
from remetal.repository.machines import MachineRecord
from remetal.repository.maps import DATA, HOLE, ZERO, ZERO_ID, PageBuilder, decode_page
from remetal.repository.objects import decode_json
from remetal.repository.packs import ENTRY, MAX_CHUNKS, ZSTD, Contents, open_pack
from remetal.repository.reader import open_reader
from remetal.repository.recipients import RecipientRecord
from remetal.repository.retired import NOBODY
from remetal.repository.session import Batch, open_session
from remetal.repository.slots import Slot
from remetal.repository.snapshots import ImageRecord, check_image, decode_body
from remetal.repository.table import ChunkTable
from tests.repositories import CHUNK, batches_of, make_site, restore

_SITE = make_site()
_NOISE = os.urandom(8 * CHUNK)


@dataclass(frozen=True)
class Piece:
    """One chunk of an invented image: a hole, zeros, or one of a few contents."""

    kind: int
    content: int


pieces = st.lists(st.builds(Piece, st.sampled_from([HOLE, ZERO, DATA]), st.integers(0, 5)), max_size=14)


def content(piece: Piece) -> bytes:
    if piece.kind != DATA:
        return bytes(CHUNK)
    if piece.content < 3:
        return _NOISE[piece.content * CHUNK : (piece.content + 1) * CHUNK]
    return (b"%d, " % piece.content * CHUNK)[:CHUNK]


@given(pieces, st.integers(1, CHUNK), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=40)
def test_any_image_comes_back(image: list[Piece], last: int, chunks: int, workers: int) -> None:
    site = _SITE.copy()
    data = b"".join(content(piece) for piece in image)
    data = data[: len(data) - CHUNK + last] if data else b""
    holes = [number for number, piece in enumerate(image) if piece.kind == HOLE]
    for round_number in range(2):
        with open_session(site.repository, site.keys, workers=workers) as session:
            previous = session.previous.images[0] if session.previous else None
            batches = batches_of(data, chunks=chunks, holes=holes)
            session.write_image("m.img:1", len(data), batches, previous=previous)
            snapshot = session.commit(layout=b"{}", hostname="h")
        assert restore(site, snapshot) == data
        assert snapshot.images[0].used == sum(
            len(data[number * CHUNK : (number + 1) * CHUNK]) for number in range(len(image)) if number not in holes
        )
        if round_number:
            assert previous is not None
            assert session.statistics.chunks_new == session.statistics.changed_bytes == snapshot.images[0].stored == 0
            assert snapshot.images[0].digest == previous.digest
            assert snapshot.images[0].pages == previous.pages
    assert len([1 for entry in site.store.entries("packs/")]) <= workers
    assert check_repository(site.repository, keys=site.key, read_data=True).ok


@given(st.lists(st.tuples(st.sampled_from([HOLE, ZERO, DATA]), st.integers(1, 400)), min_size=1, max_size=12))
@settings(max_examples=60)
def test_pages_come_back_and_are_the_same_for_the_same(runs: list[tuple[int, int]]) -> None:
    slots = min(sum(length for _, length in runs), 4096)
    expected: dict[int, bytes] = {}
    page = PageBuilder(slots)
    position = 0
    for kind, length in runs:
        length = min(length, slots - position)
        ids = [ZERO_ID if kind == ZERO else (position + number + 1).to_bytes(32, "big") for number in range(length)]
        if kind != HOLE and length:
            page.set(position, ids)
            expected.update(enumerate(ids, start=position))
        position += length
    body = page.encode()
    assert (body == b"") == (not expected)
    if body:
        found = {
            run.first + number: each for run in decode_page("p", body, slots) for number, each in enumerate(run.ids)
        }
        assert found == expected


entries = st.lists(
    st.tuples(st.binary(min_size=32, max_size=32), st.integers(17, 4 << 20), st.booleans()), min_size=1, max_size=30
)


def contents_of(rows: list[tuple[bytes, int, bool]], seed: int) -> Contents:
    array = np.empty(len(rows), ENTRY)
    for number, (identity, plain, compressed) in enumerate(rows):
        array[number] = (np.frombuffer(identity, np.uint8), 17 + plain % 100 | (ZSTD if compressed else 0), plain + 100)
    array["plain"] = np.minimum(array["plain"], 4 << 20)
    return Contents(seed.to_bytes(32, "big"), 20 << 20, 1244, array)


@given(st.lists(entries, min_size=1, max_size=5))
@settings(max_examples=50)
def test_an_index_comes_back_and_finds_its_chunks(packs: list[list[tuple[bytes, int, bool]]]) -> None:
    contents = [contents_of(rows, number) for number, rows in enumerate(packs)]
    found = decode_index("index", encode_index(contents))
    assert [(each.identity, each.size, each.start, each.entries.tobytes()) for each in found] == [
        (each.identity, each.size, each.start, each.entries.tobytes()) for each in contents
    ]
    table = ChunkTable()
    for each in found:
        table.add([each])
        table.add([each])
    everything = {identity for rows in packs for identity, _, _ in rows}
    assert -1 not in table.packs_of(sorted(everything))
    assert table.packs_of([os.urandom(32)]) == [-1]
    for number, rows in enumerate(packs):
        for ordinal, (identity, _, _) in enumerate(rows):
            place = table.find(identity)
            assert place is not None
            row = contents[place.pack].entries[place.ordinal]
            assert row["id"].tobytes() == identity
            assert place.word == row["word"]
            assert place.plain == row["plain"]
            if (place.pack, place.ordinal) == (number, ordinal):
                before = contents[number].entries["word"][:ordinal].tolist()
                assert place.offset == 1244 + sum(word & (ZSTD - 1) for word in before)


def test_a_large_table_finds_all_and_nothing_else() -> None:
    table = ChunkTable()
    random = np.random.default_rng(1)
    ids = random.integers(0, 256, (200_000, 32), np.uint8)
    ids[:, :7] = 0  # many equal beginnings: the worst that sorting can meet without being an attack
    for number, start in enumerate(range(0, len(ids), 10_000)):
        rows = np.zeros(10_000, ENTRY)
        rows["id"] = ids[start : start + 10_000]
        rows["word"], rows["plain"] = 100, 200
        table.add([Contents(number.to_bytes(32, "big"), 2 << 20, 1000, rows)])
    assert len(table) == 200_000
    chosen = [ids[each].tobytes() for each in random.integers(0, len(ids), 50)]
    assert -1 not in table.packs_of(chosen)
    assert table.packs_of([os.urandom(32) for _ in range(50)]) == [-1] * 50
    assert table.packs_of([ids[123_456].tobytes(), os.urandom(32)]) == [12, -1]


hostile = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda numbers, rest: b"".join(each.to_bytes(4, "little") for each in numbers) + rest,
              st.lists(st.sampled_from([0, 1, 2, 255, 4096, 1 << 16, (1 << 31) - 1, (1 << 32) - 1]), max_size=12),
              st.binary(max_size=100)),
)  # fmt: skip


@given(hostile)
@settings(max_examples=300)
def test_hostile_bytes_are_damage_and_nothing_else(data: bytes) -> None:
    machine = _SITE.keys.stored.record
    zipped = zstandard.ZstdCompressor().compress(data)
    parsers: list[Callable[[], object]] = [
        lambda: decode_index("n", data),
        lambda: decode_page("n", data, 4096),
        lambda: decode_body("n", data),
        lambda: decode_body("n", zipped),
        lambda: open_envelope("n", data, machine, NOBODY),
        lambda: open_pack("n", data, _SITE.key),
        lambda: decode_json("n", data, Slot),
        lambda: decode_json("n", data, MachineRecord),
        lambda: decode_json("n", data, RecipientRecord),
        lambda: decode_json("n", data, LockRecord),
    ]
    for parse in parsers:
        with pytest.raises(DamagedError):
            parse()
    with pytest.raises((DamagedError, RefusedError)):
        decode_config(data)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_hostile_counts_in_whole_records(count: int, chunks: int) -> None:
    body = bytearray(encode_index([contents_of([(b"x" * 32, 500, False)], 1)]))
    body[0:4] = count.to_bytes(4, "little")
    body[48:52] = chunks.to_bytes(4, "little")
    if (count, chunks) != (1, 1):
        with pytest.raises(DamagedError):
            decode_index("n", bytes(body))


def test_a_body_that_would_grow_without_end() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    with pytest.raises(DamagedError, match="larger"):
        decode_body("n", bomb)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": -1},
        {"size": 1 << 63},
        {"chunk_size": 0},
        {"chunk_size": 3 << 16},
        {"chunk_size": 1 << 30},
        {"used": -1},
        {"used": 1 << 40},
        {"stored": -5},
        {"pages": ()},
        {"pages": (b"x" * 32, b"")},
        {"pages": (b"x" * 31,)},
        {"digest": "0" * 64},
    ],
)
def test_images_that_cannot_be(changes: dict[str, object]) -> None:
    site = _SITE.copy()
    with open_session(site.repository, site.keys) as session:
        image: ImageRecord = session.write_image("sda:1", 3 * CHUNK, batches_of(_NOISE[: 3 * CHUNK]))
    check_image("n", image)
    with pytest.raises(DamagedError):
        check_image("n", msgspec.structs.replace(image, **changes))


def test_more_chunks_than_a_pack_may_have() -> None:
    rows = np.zeros(MAX_CHUNKS + 1, ENTRY)
    rows["word"], rows["plain"] = 17, 1
    with pytest.raises(DamagedError):
        decode_index("n", encode_index([Contents(bytes(32), 4 << 20, 1000, rows)]))


@given(st.binary(min_size=32, max_size=32), st.data())
@settings(max_examples=60)
def test_a_kit_comes_back_and_a_slip_is_found(seed: bytes, data: st.DataObject) -> None:
    kit = RecoveryKit("ab" * 16, "cd" * 16, "/mnt/usb", "2025-01-01T00:00:00Z", seed)
    assert parse_kit(kit.text()) == ("ab" * 16, seed)
    lines = kit.lines()
    number = data.draw(st.integers(0, 4))
    position = data.draw(st.sampled_from([at for at, each in enumerate(lines[number]) if at > 2 and each != " "]))
    symbol = data.draw(st.sampled_from("0123456789ABCDEFGHJKMNPQRSTVWXYZ".replace(lines[number][position], "")))
    lines[number] = lines[number][:position] + symbol + lines[number][position + 1 :]
    try:
        parse_kit("\n".join(lines))
    except RefusedError as error:
        found = f"line {number + 1} " in error.message
    else:
        found = False
    assert found


def test_a_huge_image_that_is_almost_empty_costs_almost_nothing() -> None:
    site = _SITE.copy()
    size = 2 << 40
    last = size // CHUNK - 1
    ends = [Batch(first, memoryview(_NOISE[:CHUNK]), lambda: None) for first in (0, last)]
    with open_session(site.repository, site.keys) as session:
        image = session.write_image("sda", size, ends)
        snapshot = session.commit(layout=b"{}", hostname="h")
    assert (image.used, session.statistics.chunks_new) == (2 * CHUNK, 1)
    assert sum(1 for page in image.pages if page) == 2
    with open_reader(site.repository, site.key, snapshot) as reader:
        reader.verify_present([image])
        assert [(run.first, len(run.ids)) for run in reader.runs(image)] == [(0, 1), (last, 1)]
    assert sum(len(data) for data in site.store.objects.values()) < 1 << 18
