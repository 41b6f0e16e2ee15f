"""Files of `[Section]` and `Key=value` lines, as systemd and NetworkManager write them, with the places of the values.

Sources: systemd.syntax(7), nm-settings-keyfile(5), NetworkManager.conf(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from remetal.adapt.text import line_starts

_SECTION = re.compile(r"[ \t]*\[([^\]]*)\][ \t\r]*")
_SETTING = re.compile(r"[ \t]*([A-Za-z0-9_.-]+)[ \t]*=[ \t]*(.*?)[ \t\r]*")


@dataclass(frozen=True, slots=True)
class Setting:
    """`key=value` in a section; `number` counts the sections of a file. The value stands from `start` up to `end`."""

    section: str
    number: int
    key: str
    value: str
    start: int
    end: int

    def words(self, between: str = r"\s") -> Iterator[tuple[int, int, str]]:
        """Yield where the words of the value stand in the text, and what they are."""
        for match in re.finditer(rf"[^{between}]+", self.value):
            yield self.start + match.start(), self.start + match.end(), match[0]


def parse_sections(text: str) -> Iterator[Setting]:
    """Yield the settings of a file; comments, and lines that are no settings, are passed over.

    A value that goes on in the next line (systemd's do behind a backslash) is several settings of one key.
    """
    section, number, key = "", 0, ""
    lines = text.split("\n")
    for start, line in zip(line_starts(lines), lines, strict=True):
        if line.lstrip()[:1] in {"#", ";"}:
            continue
        body = line.removesuffix("\\")
        match = _SETTING.fullmatch(body)
        if key:
            yield Setting(section, number, key, body, start, start + len(body))
        elif found := _SECTION.fullmatch(line):
            section, number = found[1], number + 1
        elif match:
            yield Setting(section, number, match[1], match[2], start + match.start(2), start + match.end(2))
        key = (key or (match[1] if match else "")) if body is not line else ""
