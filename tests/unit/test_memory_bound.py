"""The computed bound of memory: the page shows what the code gives, and what can be measured is below it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.bound import GOAL, PROGRAM, Case, bound, table_of
from bench.resident import run_resident
from remetal.image.ranges import WAITING
from remetal.repository.named import NAMED, NUMBERED
from remetal.repository.table import CHUNK
from remetal.system.processors import MOST
from remetal.units import GIB, KIB, MIB, TIB

PAGE = Path(__file__).parents[2] / "docs/explanation/memory.md"


def resident(*words: str) -> int:
    """Return the greatest resident size, in bytes, of a Python that is given these words."""
    usage = run_resident([sys.executable, *words])
    assert usage.returncode == 0
    return usage.resident


def test_the_page_shows_what_the_code_gives() -> None:
    text = PAGE.read_text()
    assert table_of(Case()) in text, f"the page lacks this:\n{table_of(Case())}"
    case = Case()
    assert f"{case.disk // TIB} TiB" in text
    assert f"{case.snapshots} snapshots" in text
    assert f"{case.workers} processors" in text
    assert f"| {CHUNK.itemsize} per chunk |" in text
    assert f"| {NUMBERED.itemsize + NAMED.itemsize} per pack," in text
    assert f"more than {WAITING:,} |" in text


@pytest.mark.parametrize(
    ("workers", "size"),
    [*((workers, 256 * KIB) for workers in range(1, MOST + 1)), (8, 512 * KIB), (4, 512 * KIB), (4, MIB), (2, MIB)],
)
def test_a_hundred_terabytes_fit(workers: int, size: int) -> None:
    parts = bound(Case(chunk_size=size, workers=workers))
    assert max(sum(each.values()) for each in parts.values()) <= GOAL


def test_ten_times_the_disk_takes_little_more() -> None:
    small, large = (sum(bound(replace(Case(), disk=disk))["backup"].values()) for disk in (100 * GIB, 10 * TIB))
    assert large - small < 25 * MIB


def test_the_program_itself_is_as_small_as_the_bound_says() -> None:
    code = "import remetal.cli.app, remetal.workflows.%s, remetal.workflows.%s, remetal.workflows.retention"
    assert resident("-c", code % ("backup", "check")) <= PROGRAM
    assert resident("-c", code % ("restore", "check")) <= PROGRAM


def test_an_index_takes_no_more_than_its_part_of_the_bound() -> None:
    chunks = 500_000
    parts = bound(Case(disk=chunks * 256 * KIB))["check, looking for chunks"]
    table = parts["table of chunks and packs"]
    empty = resident("-c", "import bench.memory")
    assert resident("-m", "bench.memory", "--learn", str(chunks)) - empty <= table
