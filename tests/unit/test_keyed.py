"""Rows in files: they are found whatever their keys, and take little memory whatever their number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.repository import keyed
from remetal.repository.keyed import KeyedRows, Rows
from remetal.repository.named import NamedObjects

ROW = np.dtype([("id", "u1", 32), ("value", "<u4"), ("mark", "u1")])


def rows_of(pairs: Sequence[tuple[bytes, int]]) -> Rows:
    """Return rows with these keys and values."""
    rows = np.zeros(len(pairs), ROW)
    for number, (key, value) in enumerate(pairs):
        rows[number] = (np.frombuffer(key, np.uint8), value, 0)
    return rows


def values(table: KeyedRows, keys: Sequence[bytes]) -> list[int | None]:
    """Return the values that are found."""
    found = table.find(keys)
    assert all(row is None or row[:32] == key for key, row in zip(keys, found, strict=True))
    return [int.from_bytes(row[32:36], "little") if row is not None else None for row in found]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make segments small, so that few rows make many of them."""
    shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make segments small, so that few rows make many of them."""
    monkeypatch.setattr(keyed, "WAITING_ROWS", 8)
    monkeypatch.setattr(keyed, "SEGMENTS", 4)
    monkeypatch.setattr(keyed, "SEGMENTS_UNREAD", 16)
    monkeypatch.setattr(keyed, "BUCKET_ROWS", 2)
    monkeypatch.setattr(keyed, "_MIN_BITS", 1)


few = st.integers(0, 200).map(lambda number: number.to_bytes(32, "big"))
step = st.one_of(
    st.tuples(st.just("add"), st.lists(few, max_size=40)),
    st.tuples(st.just("find"), st.lists(few, max_size=5)),
    st.tuples(st.just("mark"), st.lists(few, max_size=5)),
)


@given(st.lists(step, max_size=25), st.sampled_from(["salted", "all in one bucket"]))
@settings(max_examples=150)
def test_what_was_added_first_is_found_at_any_time(steps: list[tuple[str, list[bytes]]], salt: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        table = KeyedRows(ROW)
        if salt != "salted":
            table._salt = (0, 0, 0, 0)
        expected: dict[bytes, int] = {}
        marked: set[bytes] = set()
        for number, (what, keys) in enumerate(steps):
            if what == "add":
                table.add(rows_of([(key, number) for key in keys]))
                for key in keys:
                    expected.setdefault(key, number)
            elif what == "find":
                assert values(table, keys) == [expected.get(key) for key in keys]
            else:
                assert table.write(keys, 36, b"\1") == [key in expected for key in keys]
                marked.update(key for key in keys if key in expected)
        everything = [number.to_bytes(32, "big") for number in range(201)]
        assert values(table, everything) == [expected.get(key) for key in everything]
        first: dict[bytes, bool] = {}
        for row in (row for block in table.blocks() for row in block):
            first.setdefault(row["id"].tobytes(), bool(row["mark"]))
        assert first.keys() == expected.keys()
        assert [row is not None and row[36] == 1 for row in table.find(everything)] == [e in marked for e in everything]


@pytest.mark.parametrize("shared", [8, 24, 31])
@pytest.mark.usefixtures("small")
def test_keys_that_begin_alike_are_told_apart(shared: int) -> None:
    """Whoever makes up keys can give them any beginning. With 31 of 32 bytes shared there are 256 of them."""
    count = 256 if shared == 31 else 5000
    keys = [bytes(shared) + number.to_bytes(32 - shared, "big") for number in range(count)]
    table = KeyedRows(ROW)
    table.add(rows_of([(key, number) for number, key in enumerate(keys)]))
    table.settle()
    largest = max(
        segment.directory[bucket + 1] - segment.directory[bucket]
        for segment in table._segments
        for bucket in range(len(segment.directory) - 1)
    )
    assert largest < 40, "a bucket holds a few rows, not all that begin alike"
    assert values(table, keys) == list(range(count))
    assert values(table, [bytes(shared) + b"\xff" * (32 - shared - 1) + b"\xfe"]) == [254 if shared == 31 else None]


def test_bytes_of_a_row_are_not_taken_for_a_key() -> None:
    """A key that stands across two rows is in no row."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        table = KeyedRows(ROW)
        table._salt = (0, 0, 0, 0)  # all in one bucket, in the order in which they came
        keys = [bytes([number]) * 32 for number in range(1, 9)]
        table.add(rows_of([(key, 0x41414141) for key in keys]))
        table.settle()
        stored = b"".join(block.tobytes() for block in table.blocks())
        assert len(table._segments) == 1
        for start in range(1, len(stored) - 32):
            if start % ROW.itemsize:
                assert table.find([stored[start : start + 32]]) == [None] or stored[start : start + 32] in keys


@pytest.mark.usefixtures("small")
def test_the_same_key_many_times_takes_the_room_of_one() -> None:
    table = KeyedRows(ROW)
    for number in range(100):
        table.add(rows_of([(b"x" * 32, number), (number.to_bytes(32, "big"), number)]))
    table.settle()
    assert values(table, [b"x" * 32]) == [0]
    assert len(table) < 140


@pytest.mark.usefixtures("small")
def test_there_are_never_many_segments_to_look_into() -> None:
    table, before = KeyedRows(ROW), len(list(Path("/proc/self/fd").iterdir()))
    for number in range(3000):
        table.add(rows_of([(os.urandom(32), number)]))
        table.find([b"?" * 32])
        assert len(table._segments) <= (keyed.SEGMENTS - 1) * 6
    assert len(table) == 3000
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 20


def test_objects_have_numbers_in_the_order_in_which_they_came() -> None:
    objects = NamedObjects()
    names = [os.urandom(32) for _ in range(5)]
    assert objects.add([(names[0], 10), (names[1], 1 << 40), (names[0], 11)]) == [0, 1, -1]
    assert objects.add([]) == []
    assert objects.add([(names[1], 5), (names[2], 7)]) == [-1, 2]
    assert len(objects) == 3
    assert list(objects) == [(names[0], 10), (names[1], 1 << 40), (names[2], 7)]
    assert objects[1] == (names[1], 1 << 40)
    assert objects.numbers(names) == [0, 1, 2, -1, -1]
    assert objects.sizes(names) == [10, 1 << 40, 7, -1, -1]
    assert names[2] in objects
    assert names[3] not in objects


_FILL = """
import os, signal, sys
import numpy as np
from remetal.repository.keyed import KeyedRows
from remetal.repository.table import CHUNK
table, random = KeyedRows(CHUNK), np.random.default_rng(1)
count = int(sys.argv[1])
rows = np.zeros(10_000, CHUNK)
for _ in range(count // len(rows)):
    rows["id"] = np.frombuffer(random.bytes(32 * len(rows)), np.uint8).reshape(-1, 32)
    table.add(rows)
table.settle()
assert table.find([rows["id"][7].tobytes()]) != [None]
for _ in range(20_000):
    table.find([random.bytes(32)])
status = dict(line.split(":") for line in open("/proc/self/status"))
print(status["VmHWM"].split()[0], len(table), flush=True)
"""


def fill(count: int, *more: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Fill a table of chunks in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", _FILL + "\n".join(more), str(count)],
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A million rows are 53 MB; a hundred thousand are 5 MB."""
    few, many = (fill(count, folder=tmp_path).stdout.split() for count in (100_000, 1_000_000))
    assert (int(few[1]), int(many[1])) == (100_000, 1_000_000)
    assert int(many[0]) - int(few[0]) < 12 * 1024


def test_nothing_is_left_of_a_process_that_was_killed(tmp_path: Path) -> None:
    done = fill(
        200_000,
        f"assert os.listdir({str(tmp_path)!r}) == [], 'the files have names'",
        "files = [os.readlink(f'/proc/self/fd/{each.spool._fd}') for each in table._segments]",
        f"assert files and all(each.startswith({str(tmp_path)!r}) and '(deleted)' in each for each in files)",
        "os.kill(os.getpid(), signal.SIGKILL)",
        folder=tmp_path,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_files_is_said(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    done = subprocess.run(
        [sys.executable, "-c", limit + _FILL, "100000"],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "UnavailableError" in done.stderr
    assert f"in {tmp_path} failed: File too large" in done.stderr
