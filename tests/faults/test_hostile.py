"""Hostile repositories and stores: whatever is in them, it is refused with a sentence, soon, and nothing else happens.

The cases are in `tests/faults/hostile/`, a module for each kind. Each is carried out with the program's own commands,
in processes whose time and memory the kernel counts: 2 seconds of processor time and 256 MiB, what the program itself
takes included. The commands are to end with an exit code that the case says, to print nothing that a terminal obeys,
and to write nothing beside the repository.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.faults.hostile.run import KINDS, read_cases

SHARE = 6
"""One case of so many is in every test run."""


@dataclass(frozen=True)
class Summary:
    """What the cases of one kind have come to."""

    cases: int
    problems: list[str]
    slowest: float
    largest: int


def run_kinds(*words: str) -> Summary:
    """Run cases in processes of their own."""
    argv = [sys.executable, "-m", "tests.faults.hostile.run", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=1100)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    problems = [f"{each['case']}: {problem}" for each in told for problem in each["problems"]]
    return Summary(len(told), problems, max(each["cpu"] for each in told), max(each["rss"] for each in told))


def shares() -> Iterator[tuple[str, int]]:
    yield from ((kind, -(-len(read_cases(kind)) // SHARE)) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_some_hostile_cases(kind: str) -> None:
    done = run_kinds(f"1/{SHARE}", kind)
    assert done.problems == []
    assert done.cases == dict(shares())[kind]


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_hostile_case(kind: str) -> None:
    done = run_kinds(kind)
    print(f"{kind}: {done.cases} hostile cases, at most {done.slowest:.1f} s and {done.largest} MiB")
    assert done.problems == []


def test_there_are_enough_of_them() -> None:
    names = [(kind, case.name) for kind in KINDS for case in read_cases(kind)]
    assert len(set(names)) == len(names) >= 300
