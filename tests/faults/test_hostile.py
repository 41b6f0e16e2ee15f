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

import pytest

from tests.faults.counting import Count, StartCount
from tests.faults.hostile.run import KINDS, read_cases

SHARE = 6
"""One case of so many is in every test run."""


def run_kinds(count: Count, *words: str) -> None:
    """Run cases in processes of their own, and hold each against what is to come of it."""
    argv = [sys.executable, "-m", "tests.faults.hostile.run", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=1100)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for each in told:
        with count.case(each["case"]):
            assert each["problems"] == []
        if any(each["codes"]):
            count.told()
    slowest, largest = max(each["cpu"] for each in told), max(each["rss"] for each in told)
    print(f"{words[-1]}: {len(told)} hostile cases, at most {slowest:.1f} s and {largest} MiB")


@pytest.mark.parametrize("kind", KINDS)
def test_some_hostile_cases(kind: str, counts: StartCount) -> None:
    count = counts("hostile repositories and stores")
    run_kinds(count, f"1/{SHARE}", kind)
    assert count.cases == -(-len(read_cases(kind)) // SHARE)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_hostile_case(kind: str, counts: StartCount) -> None:
    count = counts("hostile repositories and stores")
    run_kinds(count, kind)
    assert count.cases == len(read_cases(kind))


def test_there_are_enough_of_them() -> None:
    names = [(kind, case.name) for kind in KINDS for case in read_cases(kind)]
    assert len(set(names)) == len(names) >= 300
