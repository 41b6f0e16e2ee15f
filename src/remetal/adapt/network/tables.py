"""Tables of names and addresses, a line for each card: /etc/iftab (ifrename), /etc/mactab (nameif, BusyBox). Pure.

Sources: iftab(5), nameif(8).
"""

from __future__ import annotations

import re

from remetal.adapt.network.addresses import find_addresses
from remetal.adapt.network.cards import Cards, Uses
from remetal.adapt.network.edits import edit_addresses, note_lost
from remetal.adapt.text import Edit, TextPlan, plan_edits

_LINE = re.compile(r"^(?![ \t]*#)[ \t]*(\S+)[ \t]+(.*)$", re.MULTILINE)


def find_table(text: str, path: str) -> Uses:
    """Return the names that a table gives to cards."""
    pairs = [
        (line[1], address)
        for line in _LINE.finditer(text)
        for _, _, address in find_addresses(text, line.start(2), line.end(2))
    ]
    names = tuple(name for name, _ in pairs)
    return Uses(names=names, pairs=tuple(pairs), given=names)


def plan_table(text: str, cards: Cards, path: str) -> TextPlan:
    """Plan a table: a name stays with the card that the old one has become."""
    edits: list[Edit] = []
    notes: list[str] = []
    for line in _LINE.finditer(text):
        edits += edit_addresses(text, cards, line.start(2), line.end(2), f"{line[1]} ")
        notes += note_lost(text, cards, line.start(2), line.end(2), path)
    return plan_edits(path, text, edits, notes)
