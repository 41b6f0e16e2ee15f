"""The files of systemd-networkd and of udev's net_setup_link: .network, .link and .netdev. Pure.

What matches a card by its address, its place or its driver follows the card. What sets an address stays, and is told.
Names stay, as the cards keep theirs. Sources: systemd.network(5), systemd.link(5), systemd.netdev(5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase

from remetal.adapt.network.addresses import address_of, find_addresses
from remetal.adapt.network.cards import Cards, Uses, is_virtual_name
from remetal.adapt.network.edits import edit_addresses, note_lost, note_set
from remetal.adapt.network.sections import Setting, parse_sections
from remetal.adapt.text import Edit, TextPlan, plan_edits
from remetal.layout.model import Nic

_ADDRESSES = {"MACAddress", "PermanentMACAddress"}
_GLOB = set("*?[")
_VALUES: Mapping[str, Callable[[Nic], str]] = {
    "Path": lambda nic: nic.path,
    "Driver": lambda nic: nic.driver,
}
_PROPERTIES: Mapping[str, Callable[[Nic], str]] = {
    "ID_PATH": lambda nic: nic.path,
    "ID_NET_DRIVER": lambda nic: nic.driver,
    "ID_NET_NAME_MAC": lambda nic: f"enx{address_of(nic).replace(':', '')}" if address_of(nic) else "",
}


def find_networkd(text: str, path: str) -> Uses:
    """Return what a .network, .link or .netdev says of cards."""
    names: list[str] = []
    virtual: list[str] = []
    addresses: list[str] = []
    globs: list[str] = []
    given: list[str] = []
    places: list[str] = []
    dhcp = False
    for each in parse_sections(text):
        if each.section == "Match" and each.key in _ADDRESSES:
            addresses += [address for _, _, address in find_addresses(text, each.start, each.end)]
        elif each.section == "Match" and each.key == "Name":
            words = [word for _, _, word in each.words() if not word.startswith("!")]
            globs += [word for word in words if _GLOB & set(word)]
            names += [word for word in words if not _GLOB & set(word)]
        elif each.section == "Match" and each.key == "Path":
            places += [word for _, _, word in each.words() if not _GLOB & set(word)]
        elif each.section == "NetDev" and each.key == "Name":
            virtual.append(each.value)
        elif path.endswith(".link") and each.section == "Link" and each.key == "Name" and each.value:
            given.append(each.value)
        elif each.key == "DHCP":
            dhcp = each.value.lower() not in {"no", "false", "none", "0", "off"}
    pairs = tuple((name, address) for name in (given or names)[:1] for address in addresses[:1])
    found = tuple((name, place) for name in given[:1] for place in places[:1])
    named = tuple(name for name in (*names, *(given if addresses or places else ())) if not is_virtual_name(name))
    return Uses(
        names=named,
        virtual=tuple(virtual),
        addresses=() if pairs else tuple(addresses),
        pairs=pairs,
        places=found,
        given=tuple(given) if pairs or found else (),
        globs=tuple(globs),
        dhcp=named if dhcp else (),
    )


def plan_networkd(text: str, cards: Cards, path: str) -> TextPlan:
    """Plan one of these files: its [Match] finds the cards that the old ones have become."""
    edits: list[Edit] = []
    notes: list[str] = []
    settings = list(parse_sections(text))
    listed = [each for each in settings if each.section == "Match" and each.key in _ADDRESSES]
    addresses = {address for each in listed for _, _, address in find_addresses(text, each.start, each.end)}
    # Where addresses say which cards are meant, nothing else is carried over from other cards.
    meant = Cards(tuple(card for card in cards.used if address_of(card.before) in addresses)) if listed else cards
    for each in settings:
        if each.section == "Match" and each.key in _ADDRESSES:
            edits += edit_addresses(text, cards, each.start, each.end, f"{each.key}=")
            notes += note_lost(text, cards, each.start, each.end, path)
        elif each.section == "Match" and each.key in _VALUES:
            edits += _carry_words(each, meant, _VALUES[each.key])
        elif each.section == "Match" and each.key == "Property":
            edits += _carry_properties(each, meant)
            notes += _note_names(each, cards, path)
        elif each.key == "MACAddress":
            notes += note_set(text, cards, each.start, each.end, path, f"[{each.section}] MACAddress=")
    return plan_edits(path, text, edits, notes)


def _carry_words(each: Setting, cards: Cards, value: Callable[[Nic], str]) -> Iterator[Edit]:
    words = list(each.words())
    carried = {word: cards.carry(word, value) for _, _, word in words if not word.startswith("!")}
    for start, end, word in words:
        new = carried.get(word, (word,))
        text = " ".join(pattern for pattern in new if pattern == word or pattern not in carried)
        if new != (word,) and text and text != word:
            yield Edit(start, end, text, f"{each.key}={text} replaces {word}")


def _carry_properties(each: Setting, cards: Cards) -> Iterator[Edit]:
    for start, end, word in each.words():
        name, equals, pattern = word.strip("\"'").partition("=")
        value = _PROPERTIES.get(name)
        new = cards.carry(pattern, value) if value is not None and equals else (pattern,)
        if len(new) == 1 and new[0] != pattern and pattern:
            text = word.replace(pattern, new[0])
            yield Edit(start, end, text, f"Property={text} replaces {word}")


def _note_names(each: Setting, cards: Cards, path: str) -> Iterator[str]:
    """Yield a note for a property that holds a name made of the old card's place: the new one has another."""
    for _, _, word in each.words():
        name, equals, pattern = word.strip("\"'").partition("=")
        if not equals or name in _PROPERTIES or not name.startswith(("ID_NET_NAME", "ID_NET_LABEL")):
            continue
        for card in cards.moved():
            told = [told.partition("=")[2] for told in card.before.properties if told.startswith(f"{name}=")]
            if any(fnmatchcase(value, pattern) for value in told):
                yield f"{path}: Property={word} was made of the old {card.called}'s place; it was left as it is"
