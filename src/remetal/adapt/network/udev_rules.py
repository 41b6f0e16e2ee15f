"""udev's rules that know network cards: by address, by place, by driver. Pure.

70-persistent-net.rules, which udev itself wrote until 2013, cloud-init's, dracut's, and those of people.
Source: udev(7).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from remetal.adapt.network.addresses import address_of, parse_address
from remetal.adapt.network.cards import Cards, Uses
from remetal.adapt.network.edits import edit_address, note_lost
from remetal.adapt.text import Edit, TextPlan, plan_edits
from remetal.layout.model import Nic

_RULE = re.compile(r"^(?![ \t]*(?:#|$))((?:.*\\\n)*.*)$", re.MULTILINE)
_PART = re.compile(r"([A-Z_]+)(?:\{([^}]*)\})?[ \t]*(==|!=|=|\+=|:=|-=)[ \t]*[ei]?\"((?:[^\"\\]|\\.)*)\"")
_BUS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]")


def place_on_bus(nic: Nic) -> str:
    """Return the last PCI address on the way to a card; empty where there is none, or nobody knows."""
    found = _BUS.findall(nic.path) or _BUS.findall(nic.place)
    return found[-1] if found else ""


_VALUES: Mapping[tuple[str, str], Callable[[Nic], str]] = {
    ("KERNELS", ""): place_on_bus,
    ("DRIVERS", ""): lambda nic: nic.driver,
    ("ENV", "ID_NET_DRIVER"): lambda nic: nic.driver,
    ("ENV", "ID_PATH"): lambda nic: nic.path,
    ("ENV", "ID_NET_NAME_MAC"): lambda nic: f"enx{address_of(nic).replace(':', '')}" if address_of(nic) else "",
}


@dataclass(frozen=True, slots=True)
class _Part:
    """`KEY{name}==\"value\"`; the value stands from `start` up to `end`."""

    key: str
    name: str
    operator: str
    value: str
    start: int
    end: int

    @property
    def is_address(self) -> bool:
        return self.key in {"ATTR", "ATTRS", "SYSFS"} and self.name == "address" and self.operator == "=="


def find_rules(text: str, path: str) -> Uses:
    """Return the names that rules give to cards."""
    pairs = []
    places = []
    given = []
    alone = []
    for parts in _rules(text):
        addresses = [parse_address(part.value) for part in parts if part.is_address]
        named = [part.value for part in parts if part.key == "NAME" and part.operator in {"=", ":="}]
        known = [address for address in addresses if address]
        pairs += [(name, address) for name in named[:1] for address in known[:1] if "%" not in name and "$" not in name]
        alone += known if not named else []
        at = [f"pci-{part.value}" for part in parts if part.key == "KERNELS" and part.operator == "=="]
        at += [part.value for part in parts if (part.key, part.name, part.operator) == ("ENV", "ID_PATH", "==")]
        places += [(name, place) for name in named[:1] for place in at[:1] if "%" not in name and "$" not in name]
        # KERNEL=="eth*" does not hold for a card that an initramfs has called otherwise.
        given += [] if any(part.key == "KERNEL" for part in parts) else named[:1]
    names = tuple(dict.fromkeys(name for name, _ in (*pairs, *places)))
    return Uses(names=names, pairs=tuple(pairs), places=tuple(places), given=tuple(given), addresses=tuple(alone))


def plan_rules(text: str, cards: Cards, path: str) -> TextPlan:
    """Plan a file of rules: those for a card are for the one that it has become."""
    edits: list[Edit] = []
    notes: list[str] = []
    for parts in _rules(text):
        for part in parts:
            if part.is_address:
                edits += edit_address(text, cards, part.start, part.end, "the rule for ")
                notes += note_lost(text, cards, part.start, part.end, path)
            value = _VALUES.get((part.key, part.name))
            if value is not None and part.operator == "==" and part.value:
                edits += _carry(part, value, cards, parts)
    return plan_edits(path, text, edits, notes)


def _carry(part: _Part, value: Callable[[Nic], str], cards: Cards, parts: list[_Part]) -> Iterator[Edit]:
    """Yield the edit for a value that the old card had; if the rule has an address, that tells which one is meant."""
    addresses = {parse_address(each.value) for each in parts if each.is_address}
    meant = Cards(tuple(each for each in cards.used if address_of(each.before) in addresses)) if addresses else cards
    new = [word for pattern in part.value.split("|") for word in meant.carry(pattern, value)]
    text = "|".join(dict.fromkeys(new))
    if text != part.value and text:
        yield Edit(part.start, part.end, text, f"{part.key} {text} replaces {part.value}")


def _rules(text: str) -> Iterator[list[_Part]]:
    """Yield the rules that are about network cards, each by its parts."""
    for rule in _RULE.finditer(text):
        parts = [
            _Part(match[1], match[2] or "", match[3], match[4], match.start(4), match.end(4))
            for match in _PART.finditer(text, rule.start(1), rule.end(1))
        ]
        net = any(part.key in {"SUBSYSTEM", "SUBSYSTEMS"} and part.value == "net" for part in parts)
        if net or any(part.is_address for part in parts):
            yield parts
