"""/etc/network/interfaces and the files that it sources: ifupdown, ifupdown2, ifupdown-ng. Pure.

Interfaces go by their names, which stay. Patterns of addresses (`mac/52:54:…`) and the maps of a `mapping` follow the
cards; `hwaddress` sets an address, so it stays, and is told. Source: interfaces(5) of Debian's ifupdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from remetal.adapt.network.addresses import parse_address
from remetal.adapt.network.cards import Cards, Uses, base_name, is_virtual_name
from remetal.adapt.network.edits import edit_address, edit_addresses, note_set
from remetal.adapt.text import Edit, TextPlan, line_starts, plan_edits

_STANZAS = re.compile(r"iface|mapping|auto|allow-\S+|no-auto-down|no-scripts|rename|template|source\S*")
_LISTS = re.compile(r"auto|allow-\S+|no-auto-down|no-scripts|rename")
_PATTERN = re.compile(r"(?:mac|address)/([0-9A-Fa-f:-]+)")
_NAMES = re.compile(r"/([^/=]+)")
_PORTS = re.compile(
    r"bridge[-_]ports|bond[-_]slaves|slaves|bond[-_]primary|vlan[-_]raw[-_]device|ovs[-_]ports|ovs[-_]bonds|link"
    r"|bridge[-_]hw|vxlan[-_]physdev|requires"
)
_MADE = re.compile(
    r"bridge[-_].*|bond[-_](?!master$).*|slaves|vlan[-_].*|ovs[-_].*|tunnel[-_]?.*|vxlan[-_].*|wireguard[-_].*|vrf[-_].*"
    r"|link[-_]type"
)
_NOT_MADE = re.compile(r"bond[-_]master|bridge[-_]access|bridge[-_]pvid|bridge[-_]vids|vrf|ovs[-_](?:bridge|type)")


def find_ifupdown(text: str, path: str) -> Uses:
    """Return which names of cards a file uses."""
    names: list[str] = []
    virtual: list[str] = []
    addresses: list[str] = []
    globs: list[str] = []
    dhcp: list[str] = []
    current = ""
    for _, words in _lines(text):
        head, rest = words[0][2], [word for _, _, word in words[1:]]
        if _LISTS.fullmatch(head):
            addresses += [parse_address(match[1]) for word in rest if (match := _PATTERN.match(word))]
            globs += [match[1] for word in rest if (match := _NAMES.match(word))]
            literal = [word.partition("=")[0] for word in rest if "/" not in word]
            names += [base_name(word) for word in literal]
            current = ""
        elif head == "iface" and rest:
            current = rest[0]
            names.append(base_name(current))
            if "dhcp" in rest:
                dhcp.append(base_name(current))
        elif _STANZAS.fullmatch(head):
            current = ""
        elif current:
            if _MADE.fullmatch(head) and not _NOT_MADE.fullmatch(head):
                virtual.append(current)
            if _PORTS.fullmatch(head):
                names += [base_name(word) for word in rest if "/" not in word]
    made = set(virtual)
    return Uses(
        names=tuple(
            name for name in names if name and name not in made and not is_virtual_name(name) and name != "none"
        ),
        virtual=tuple(virtual),
        addresses=tuple(each for each in addresses if each),
        globs=tuple(globs),
        dhcp=tuple(dhcp),
    )


def plan_ifupdown(text: str, cards: Cards, path: str) -> TextPlan:
    """Plan a file: what is named by an address is named by the new card's."""
    edits: list[Edit] = []
    notes: list[str] = []
    for _, words in _lines(text):
        head = words[0][2]
        if _LISTS.fullmatch(head):
            for start, _, word in words[1:]:
                for match in _PATTERN.finditer(word):
                    edits += edit_address(
                        text, cards, start + match.start(1), start + match.end(1), f"{head} {word[: match.start(1)]}"
                    )
        elif head == "map":
            for start, end, _ in words[1:]:
                edits += edit_addresses(text, cards, start, end, "map ")
        elif head.startswith("hwaddress"):
            for start, end, _ in words[1:]:
                notes += note_set(text, cards, start, end, path, "hwaddress")
    return plan_edits(path, text, edits, notes)


def find_sources(text: str) -> Iterator[tuple[str, str]]:
    """Yield how other files are read in, and which: `source PATTERN`, `source-directory FOLDER`."""
    for _, words in _lines(text):
        if words[0][2] in {"source", "source-directory", "source-dir"}:
            yield from ((words[0][2], word) for _, _, word in words[1:])


def _lines(text: str) -> Iterator[tuple[int, list[tuple[int, int, str]]]]:
    """Yield the lines that are no comments, as words with their places; a line may go on behind a backslash."""
    lines = text.split("\n")
    words: list[tuple[int, int, str]] = []
    for start, line in zip(line_starts(lines), lines, strict=True):
        if not words and line.lstrip().startswith("#"):
            continue
        goes_on = line.endswith("\\")
        body = line[:-1] if goes_on else line
        words += [(start + match.start(), start + match.end(), match[0]) for match in re.finditer(r"\S+", body)]
        if not goes_on:
            if words:
                yield start, words
            words = []
    if words:
        yield len(text), words
