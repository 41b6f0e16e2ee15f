"""What the logic tells while it works. It never prints: the command line and the screens render events.

def capture(…, report: Report = silent) -> …:
    report(Step("Reading sda1"))
    report(Progress("sda1", done=0, total=used))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Step:
    """A new part of the work begins; `title` is a sentence without a full stop."""

    title: str


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes of the named part are through. Ends with done == total."""

    part: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing that needs no action."""

    text: str


@dataclass(frozen=True, slots=True)
class Warn:
    """Something the administrator should look at; the work goes on."""

    text: str
    hint: str = ""


Event: TypeAlias = Step | Progress | Note | Warn
Report: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """Drop the event: the reporter for callers that do not listen."""
