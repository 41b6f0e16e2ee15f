"""NetworkManager's profiles (keyfiles) and its own configuration. Pure.

`cloned-mac-address` sets an address: it stays, and is told. Sources: nm-settings-keyfile(5), NetworkManager.conf(5).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from remetal.adapt.network.addresses import parse_address
from remetal.adapt.network.cards import Cards, Uses
from remetal.adapt.network.edits import edit_address, edit_addresses, note_lost, note_set
from remetal.adapt.network.sections import Setting, parse_sections
from remetal.adapt.text import Edit, TextPlan, plan_edits
from remetal.layout.model import Nic

_HARDWARE = {"ethernet", "802-3-ethernet", "wifi", "802-11-wireless", "infiniband", "wired"}
_LISTS = {"mac-address-blacklist", "mac-address-denylist"}
_VALUES: Mapping[str, Callable[[Nic], str]] = {"path": lambda nic: nic.path, "driver": lambda nic: nic.driver}
_MODIFIERS = re.compile(r"[&|!\\]*")
_SPECIFIED = re.compile(r"interface-name:=?([A-Za-z0-9_.-]+)")


def find_keyfile(text: str, path: str) -> Uses:
    """Return what a profile says of cards."""
    kind, name, address, names, dhcp = "", "", "", [], False
    for each in parse_sections(text):
        where = (each.section, each.key)
        if where == ("connection", "type"):
            kind = each.value
        elif where == ("connection", "interface-name"):
            name = each.value
        elif each.section in _HARDWARE and each.key == "mac-address":
            address = parse_address(each.value)
        elif where == ("match", "interface-name"):
            names += [word.lstrip("&|") for _, _, word in each.words(";,") if not set("*?[!") & set(word)]
        elif where in {("vlan", "parent"), ("macvlan", "parent"), ("ip-tunnel", "parent")} and not parse_address(
            each.value
        ):
            names.append(each.value)
        elif where == ("ipv4", "method"):
            dhcp = each.value == "auto"
    own = name if kind in _HARDWARE else ""
    return Uses(
        names=tuple(each for each in (own, *names) if each),
        virtual=(name,) if name and not own else (),
        addresses=(address,) if address and not own else (),
        pairs=((own, address),) if own and address else (),
        dhcp=(own or address,) if dhcp and (own or address) else (),
    )


def plan_keyfile(text: str, cards: Cards, path: str) -> TextPlan:
    """Plan a profile: what it is restricted to is found on this machine."""
    edits: list[Edit] = []
    notes: list[str] = []
    for each in parse_sections(text):
        if each.section in _HARDWARE and each.key == "mac-address":
            edits += edit_address(text, cards, each.start, each.end, "mac-address=")
            notes += note_lost(text, cards, each.start, each.end, path)
        elif each.section in _HARDWARE and each.key in _LISTS:
            edits += edit_addresses(text, cards, each.start, each.end, f"{each.key}=")
        elif each.section == "match" and each.key in _VALUES:
            edits += _carry_words(each, cards, _VALUES[each.key])
        elif each.key in {"cloned-mac-address", "assigned-mac-address"}:
            notes += note_set(text, cards, each.start, each.end, path, f"{each.key}=")
        elif each.section in {"vlan", "macvlan"} and each.key == "parent":
            edits += edit_address(text, cards, each.start, each.end, "parent=")
    return plan_edits(path, text, edits, notes)


def find_manager_conf(text: str, path: str) -> Uses:
    """Return what NetworkManager's own configuration says of cards: nothing that makes it use one."""
    return Uses()


def plan_manager_conf(text: str, cards: Cards, path: str) -> TextPlan:
    """Plan NetworkManager.conf or one of its drop-ins: devices that it names by their addresses."""
    edits: list[Edit] = []
    for each in parse_sections(text):
        for start, end, word in each.words(r"\s;,"):
            at = start + len(word) - len(_MODIFIERS.sub("", word, count=1).removeprefix("except:").removeprefix("mac:"))
            edits += edit_address(text, cards, at, end, f"{each.key}=")
    return plan_edits(path, text, edits)


def _carry_words(each: Setting, cards: Cards, value: Callable[[Nic], str]) -> Iterator[Edit]:
    for start, end, word in each.words(";,"):
        marks = _MODIFIERS.match(word)
        at = marks.end() if marks else 0
        new = cards.carry(word[at:], value)
        if "!" in word[:at] or new == (word[at:],) or not word[at:]:
            continue
        text = ";".join(f"{word[:at]}{pattern}" for pattern in new)
        yield Edit(start, end, text, f"{each.key}={text} replaces {word}")
