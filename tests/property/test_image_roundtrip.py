"""Capturing used extents and writing them back: used bytes come back, holes are left alone, twice writes nothing."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.errors import DamagedError, RemetalError
from remetal.image.capture import read_batches
from remetal.image.ranges import Extent
from remetal.image.restore import Written, restore_image, verify_image
from remetal.repository.reader import open_reader
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository, enroll_machine, init_repository, unlock_with_kit
from remetal.repository.session import open_session
from remetal.repository.snapshots import ImageRecord, Snapshot
from remetal.system.blockdev import PAGE, Span
from remetal.units import align_up
from tests.repositories import CHUNK, PASSPHRASE, MemoryStore

START = 512 * 3
"""Where the volume begins on its disk: not at a page boundary."""


def capture(
    source: Path, extents: list[Extent], size: int, start: int = START
) -> tuple[Repository, RecipientKey, Snapshot, ImageRecord]:
    """Capture the volume at byte `start` of a disk file into a fresh repository."""
    repository, kit = init_repository(MemoryStore(), passphrase=PASSPHRASE, chunk_size=CHUNK)
    keys = enroll_machine(repository, "machine")
    with open_session(repository, keys) as session:
        batches = read_batches(
            Span(source, start, size), extents, session.chunk_size, buffers=session.workers + 1, part="volume"
        )
        image = session.write_image("volume", size, batches)
        snapshot = session.commit(layout=b"{}", hostname="host")
    return repository, unlock_with_kit(repository, kit.text()), snapshot, image


@st.composite
def volumes(draw: st.DrawFn) -> tuple[int, list[Extent], int]:
    """A size, used extents in it, and a seed for the content."""
    found: list[Extent] = []
    position = 0
    for gap, length in draw(
        st.lists(st.tuples(st.integers(0, 5 * CHUNK), st.integers(1, 3 * CHUNK)), min_size=1, max_size=8)
    ):
        found.append(Extent(position + gap, length))
        position += gap + length + 1
    return position + draw(st.integers(0, 2 * CHUNK)), found, draw(st.integers(0, 1 << 32))


@settings(max_examples=40)
@given(volumes(), st.booleans(), st.booleans())
def test_used_bytes_come_back_and_holes_stay(volume: tuple[int, list[Extent], int], direct: bool, sparse: bool) -> None:
    """Onto garbage or a file with holes; past the page cache where start and size stand on pages."""
    size, extents, seed = volume
    size = align_up(size, PAGE) if direct else size
    start = 2 * PAGE if direct else START
    noise = random.Random(seed)
    content = bytearray(noise.randbytes(size))
    if extents[0].size > 10:
        content[extents[0].start : extents[0].end] = bytes(extents[0].size)
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        source.write_bytes(bytes(start) + content)
        garbage = noise.randbytes(start + size + 777)
        if sparse:
            garbage = bytes(len(garbage) // 2) + garbage[len(garbage) // 2 :]
        with target.open("wb") as file:
            file.truncate(len(garbage))
            file.seek(len(garbage) // 2 if sparse else 0)
            file.write(garbage[len(garbage) // 2 :] if sparse else garbage)
        repository, key, snapshot, image = capture(source, extents, size, start)
        span = Span(target, start, size)
        with open_reader(repository, key, snapshot) as reader:
            restore_image(reader, image, span, part="volume")
            restored = target.read_bytes()
            assert restore_image(reader, image, span, part="volume").written == 0
            assert verify_image(reader, image, span, part="volume").written == 0
        assert target.read_bytes() == restored
    assert restored[:start] == garbage[:start]
    assert restored[start + size :] == garbage[start + size :]
    touched = {index for each in extents for index in range(each.start // CHUNK, (each.end - 1) // CHUNK + 1)}
    expected = bytearray(garbage[start : start + size])
    for index in touched:
        end = min((index + 1) * CHUNK, size)
        expected[index * CHUNK : end] = bytes(end - index * CHUNK)
    for each in extents:
        expected[each.start : each.end] = content[each.start : each.end]
    assert restored[start : start + size] == bytes(expected)


def test_a_damaged_pack_never_reaches_the_target(tmp_path: Path) -> None:
    size = 40 * CHUNK
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(START) + random.Random(1).randbytes(size))
    target.write_bytes(bytes(START + size))
    repository, key, snapshot, image = capture(source, [Extent(0, size)], size)
    store = repository.store
    assert isinstance(store, MemoryStore)
    for name in [name for name in store.objects if name.startswith("packs/")]:
        middle = len(store.objects[name]) // 2
        store.objects[name] = store.objects[name][:middle] + b"\0" * 100 + store.objects[name][middle + 100 :]
    for name in [name for name in store.objects if name.startswith("parity/")]:
        del store.objects[name]  # it would bring the pack back
    with open_reader(repository, key, snapshot) as reader, pytest.raises(DamagedError):
        restore_image(reader, image, Span(target, START, size), part="volume")
    original = source.read_bytes()
    for start in range(START, START + size, CHUNK):
        piece = target.read_bytes()[start : start + CHUNK]
        assert piece in {bytes(CHUNK), original[start : start + CHUNK]}


def test_a_target_that_fails_midway_is_told_and_goes_on(tmp_path: Path) -> None:
    size = 40 * CHUNK
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(START) + random.Random(2).randbytes(size))
    target.write_bytes(bytes(START + size // 2))
    repository, key, snapshot, image = capture(source, [Extent(0, size)], size)
    with open_reader(repository, key, snapshot) as reader:
        with pytest.raises(RemetalError, match="target"):
            restore_image(reader, image, Span(target, START, size), part="volume")
        with target.open("r+b") as file:
            file.truncate(START + size)
        assert isinstance(restore_image(reader, image, Span(target, START, size), part="volume"), Written)
    assert target.read_bytes()[START:] == source.read_bytes()[START:]


def test_an_image_that_does_not_fit_its_place_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(START) + random.Random(3).randbytes(2 * CHUNK))
    target = tmp_path / "target"
    target.write_bytes(bytes(START + 2 * CHUNK))
    repository, key, snapshot, image = capture(source, [Extent(0, 2 * CHUNK)], 2 * CHUNK)
    with open_reader(repository, key, snapshot) as reader, pytest.raises(DamagedError, match="its place"):
        restore_image(reader, image, Span(target, START, CHUNK), part="volume")
    assert target.read_bytes() == bytes(START + 2 * CHUNK)
