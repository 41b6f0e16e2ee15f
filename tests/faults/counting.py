"""What the campaigns count: cases, faults put in, faults that the product told of, and losses, which fail the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass
class Count:
    """The numbers of one campaign. `detected` counts the cases in which somebody was told that something is wrong."""

    campaign: str
    cases: int = 0
    faults: int = 0
    detected: int = 0
    losses: int = 0
    first_loss: str = field(default="", repr=False)

    @contextmanager
    def case(self, what: object = "", *, faults: int = 1) -> Iterator[None]:
        """Count a case with so many faults in it; whatever is raised in the block is a loss.

        In the block stands what looks at the invariants, and nothing else that may fail.
        """
        self.cases += 1
        self.faults += faults
        try:
            yield
        except Exception as error:
            self.losses += 1
            self.first_loss = self.first_loss or f"{self.campaign}, {what}: {error!r}"
            raise AssertionError(f"{self.campaign}, {what}: {error!r}") from error

    def told(self) -> None:
        """Count that somebody was told."""
        self.detected += 1


StartCount: TypeAlias = Callable[[str], Count]
"""Begins to count for a campaign, by its name in the table."""


def format_table(counts: Sequence[Count]) -> list[str]:
    """Return the lines of the table of all campaigns, and below them the sum."""
    rows: dict[str, Count] = {}
    for each in counts:
        row = rows.setdefault(each.campaign, Count(each.campaign))
        row.cases += each.cases
        row.faults += each.faults
        row.detected += each.detected
        row.losses += each.losses
    total = Count("all of them")
    for each in rows.values():
        total.cases += each.cases
        total.faults += each.faults
        total.detected += each.detected
        total.losses += each.losses
    width = max(len(each) for each in (*rows, "campaign", total.campaign))
    lines = [f"{'campaign':{width}}  {'cases':>9}  {'faults':>9}  {'detected':>9}  {'losses':>6}"]
    lines += [_format_row(rows[name], width) for name in sorted(rows)]
    return [*lines, "-" * len(lines[0]), _format_row(total, width)]


def _format_row(row: Count, width: int) -> str:
    return f"{row.campaign:{width}}  {row.cases:>9,}  {row.faults:>9,}  {row.detected:>9,}  {row.losses:>6,}"
