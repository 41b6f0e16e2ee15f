"""The table that ends a run of the fault campaigns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from tests.faults.counting import Count, StartCount, format_table

_COUNTS = pytest.StashKey[list[Count]]()


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Iterator[StartCount]:
    """What a test begins a count with; a count that has losses, or no case at all, fails its test."""
    failed = request.session.testsfailed
    mine: list[Count] = []
    every = request.config.stash.setdefault(_COUNTS, [])

    def start(campaign: str) -> Count:
        mine.append(Count(campaign))
        every.append(mine[-1])
        return mine[-1]

    yield start
    if request.session.testsfailed != failed:
        return  # it says itself what was lost
    assert not [each.first_loss for each in mine if each.losses], "something was lost"
    assert all(each.cases for each in mine), "a campaign has looked at nothing"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what a worker has counted to the one who prints the table."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["counts"] = [asdict(each) for each in session.config.stash.get(_COUNTS, [])]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker has counted; one that crashed hands over nothing, and its test has failed."""
    counts = getattr(node, "workeroutput", {}).get("counts", [])
    node.config.stash.setdefault(_COUNTS, []).extend(Count(**each) for each in counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print one line for each campaign that has run."""
    found = config.stash.get(_COUNTS, [])
    if found:
        terminalreporter.section("fault campaigns: what was lost")
        for line in format_table(found):
            terminalreporter.write_line(line)
