"""A text file of the restored system as it should read: what every planner of a configuration file hands back. Pure.

A planner collects edits, each with the sentence that tells the administrator why; everything that no edit covers
stays byte for byte.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace the characters from `start` up to `end` by `text`.

    `what` is one sentence without a full stop; it is empty for what another edit has already told.
    """

    start: int
    end: int
    text: str
    what: str = ""


@dataclass(frozen=True, slots=True)
class TextPlan:
    """The new text of a file (the old one if nothing has to change), one sentence per change, notes, unified diff.

    `path` is the file's in its system, as `/etc/fstab`.
    """

    path: str
    text: str
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    diff: str = ""


def plan_edits(path: str, text: str, edits: Iterable[Edit], notes: Iterable[str] = ()) -> TextPlan:
    """Return the plan that carries out all edits, in the order in which they lie in the text.

    Where two overlap, the later one covers what the earlier one has left of it. The same sentence or note is told
    once, with its number.
    """
    ordered = sorted(edits, key=lambda edit: (edit.start, edit.end))
    pieces: list[str] = []
    at = 0
    for edit in ordered:
        pieces += [text[at : edit.start], edit.text]
        at = max(at, edit.end)
    new = "".join([*pieces, text[at:]])
    whats = _counted(edit.what for edit in ordered if edit.what)
    return TextPlan(path, new, whats, tuple(dict.fromkeys(notes)), diff_texts(path, text, new))


def diff_texts(path: str, old: str, new: str) -> str:
    """Return the unified diff of a file's two texts; empty if they are equal."""
    if old == new:
        return ""
    names = (f"a{path}", f"b{path}")
    lines = difflib.unified_diff(old.split("\n"), new.split("\n"), *names, n=1, lineterm="")
    return "\n".join(lines) + "\n"


def _counted(sentences: Iterable[str]) -> tuple[str, ...]:
    numbers = Counter(sentences)
    return tuple(each if number == 1 else f"{each} ({number} times)" for each, number in numbers.items())


def line_starts(lines: Sequence[str]) -> list[int]:
    """Return where each line of a text that was split at its newlines begins."""
    starts, at = [], 0
    for line in lines:
        starts.append(at)
        at += len(line) + 1
    return starts
