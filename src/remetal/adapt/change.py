"""What adaptation tells about itself: every change that it made, and what it left alone on purpose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that was changed in the restored system.

    `path` is a file of the restored system, `NVRAM`, or `sector 0 of sda`; `what` is one sentence without a full
    stop; `diff` is a unified diff where a text changed, else empty.
    """

    path: str
    what: str
    diff: str = ""


@dataclass(frozen=True, slots=True)
class Adaptation:
    """All changes in the order in which they were made, notes for the administrator, and bytes written."""

    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    bytes_written: int = 0

    def __add__(self, other: Adaptation) -> Adaptation:
        """Return both, this one first."""
        return Adaptation(
            self.changes + other.changes, self.notes + other.notes, self.bytes_written + other.bytes_written
        )
