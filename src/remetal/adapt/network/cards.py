"""The network cards that a system uses: what it calls them, which ones they were, and which ones they are now. Pure.

A system's configuration knows a card by a name, by an address, or by both. Bridges, bonds, VLANs and the like have
names, too; they are made by the system itself, so they need no card.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec.structs

from remetal.adapt.network.addresses import address_of, parse_address
from remetal.adapt.network.matching import Choice, Match, describe_nic, is_same_card, match_nics
from remetal.layout.model import Nic

_PATTERN_MAX = 256
"""Letters of a pattern that anybody would write."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,14}")
_HARDWARE = re.compile(
    r"(?:eth|wlan|wwan|usb|ib|ath|ra|wifi|em|net|lan|wan)\d+|p\d+p\d+(?:_\d+)?"
    r"|(?:en|ib|sl|wl|ww)(?=[A-Za-z]*\d)[A-Za-z0-9]{1,13}"
)
_VIRTUAL = re.compile(
    r"lo|(?:bond|br|bridge|brq|docker|dummy|gre|ifb|ip6tnl|ipip|ipvlan|macvlan|macvtap|nlmon|ovs|ppp|sit|tap|team|tun"
    r"|tunl|vbr|veth|virbr|vlan|vmbr|vnet|vrf|vti|vxlan|wg|xfrm)[-_]?\d*|virbr\d+-nic|br-.*|veth.*|lxcbr\d+|lxdbr\d+"
)


@dataclass(frozen=True, slots=True)
class Uses:
    """What configuration files say of network cards, in the order in which they say it.

    `names` are of interfaces that may be cards, `virtual` those that the system makes itself; `addresses` belong to
    cards that are known by them, `pairs` say which name has which address, `places` which one is at which place, as
    udev knows it. `given` are names that the files give to cards by these, whatever the system would call them. `dhcp`
    are those with a leased address, `globs` patterns of names.
    """

    names: tuple[str, ...] = ()
    virtual: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    places: tuple[tuple[str, str], ...] = ()
    given: tuple[str, ...] = ()
    globs: tuple[str, ...] = ()
    dhcp: tuple[str, ...] = ()

    def __add__(self, other: Uses) -> Uses:
        """Return what both say."""
        return Uses(
            *(
                tuple(dict.fromkeys((*getattr(self, name), *getattr(other, name))))
                for name in ("names", "virtual", "addresses", "pairs", "places", "given", "globs", "dhcp")
            )
        )


@dataclass(frozen=True, slots=True)
class Card:
    """A network card that a system uses.

    `name` is what the system calls it, empty where it knows only its address; `before` is what is known of it, `now`
    the card of this machine that it becomes, None for none. `new_name` is how it is called from now on.
    """

    name: str
    before: Nic
    now: Nic | None
    reason: str = ""
    is_guess: bool = False
    new_name: str = ""

    @property
    def is_unchanged(self) -> bool:
        """Whether it is the very same card in the same slot."""
        return self.now is not None and is_same_card(self.before, self.now)

    @property
    def called(self) -> str:
        """How a person knows it."""
        return self.name or address_of(self.before)


@dataclass(frozen=True, slots=True)
class Cards:
    """What planners of configuration files ask: the system's cards, and those of this machine that it does not use."""

    used: tuple[Card, ...] = ()
    others: tuple[Nic, ...] = ()

    def new_address(self, address: str) -> str:
        """Return the address that has taken an address's place; empty where nothing has, or it is still the same."""
        for card in self.moved() if address else ():
            if address in {address_of(card.before), parse_address(card.before.mac)}:
                new = address_of(card.now) if card.now is not None else ""
                return new if new != address else ""
        return ""

    def find_by_address(self, address: str) -> Card | None:
        """Return the card that had an address, if it is another card now, or none."""
        for card in self.used:
            if address_of(card.before) == address and not card.is_unchanged:
                return card
        return None

    def moved(self) -> Iterator[Card]:
        """Yield the cards that have become others."""
        for card in self.used:
            if card.now is not None and not card.is_unchanged:
                yield card

    def carry(self, pattern: str, value: Callable[[Nic], str]) -> tuple[str, ...]:
        """Return what a pattern has to be that matched some of the cards, so that it matches what they became.

        `value` tells what of a card the pattern is held against. The pattern itself, alone, where it still fits, or
        never fitted, or nobody knows what the new cards have.
        """
        if len(pattern) > _PATTERN_MAX:
            return (pattern,)
        moved = [card for card in self.moved() if value(card.before) and fnmatchcase(value(card.before), pattern)]
        new = [value(card.now) for card in moved if card.now is not None]
        if all(not each or fnmatchcase(each, pattern) for each in new):
            return (pattern,)
        staying = [card for card in self.used if card.is_unchanged and fnmatchcase(value(card.before), pattern)]
        kept = (pattern,) if staying or "*" in pattern or "?" in pattern else ()
        return tuple(dict.fromkeys((*kept, *(each for each in new if each and not fnmatchcase(each, pattern)))))


def find_cards(
    uses: Uses,
    captured: Sequence[Nic],
    now: Sequence[Nic],
    chosen: Sequence[Choice] = (),
    agreed: Sequence[Match] = (),
) -> Cards:
    """Return the cards that a system uses, matched with those of this machine.

    `captured` are all cards of the captured machine, if they are known; `agreed` are matches that somebody has seen
    in the plan: those that are no guess hold. A card that only the configuration knows has what that says of it.
    """
    globbed = tuple(name for pattern in uses.globs for name in _find_globbed(pattern, captured, now))
    found = _find_used(uses + Uses(names=globbed), captured, now)
    fixed = [*chosen, *(Choice(each.before, each.now) for each in agreed if each.now is not None and not each.is_guess)]
    reasons = {(each.before, each.now): each.reason for each in agreed}
    used_fixed = [each for each in fixed if any(_is_meant(each, name, before) for name, before in found)]
    named = [Choice(_with_name(each, found), each.now) for each in used_fixed]
    matches = match_nics([before for _, before in found], now, named)
    cards = []
    for (name, before), match in zip(found, matches, strict=True):
        reason = next(
            (reasons[each.before, each.now] for each in used_fixed
             if each.now == match.now and (each.before, each.now) in reasons and _is_meant(each, name, before)),
            match.reason,
        )  # fmt: skip
        cards.append(Card(name, before, match.now, reason, match.is_guess, new_name=name))
    taken = [card.now for card in cards if card.now is not None]
    return Cards(tuple(cards), tuple(nic for nic in now if nic not in taken))


def is_hardware_name(name: str) -> bool:
    """Whether a name looks like one that the kernel or udev gives to a card, or people usually do."""
    return _HARDWARE.fullmatch(name) is not None


def is_virtual_name(name: str) -> bool:
    """Whether a name looks like one of an interface that a system makes itself."""
    return _VIRTUAL.fullmatch(name) is not None


def is_name(name: str) -> bool:
    """Whether a text can be the name of a card: no more than 15 characters, none of them special to any file."""
    return _NAME.fullmatch(name) is not None


def base_name(name: str) -> str:
    """Return the card that a name such as `eth0.10` or `eth0:1` stands on, as they are usually written."""
    return re.split(r"[.:@]", name, maxsplit=1)[0]


def names_of(nic: Nic) -> frozenset[str]:
    """Return all the names that udev may give to a card by itself, as far as it said."""
    told = (each.partition("=") for each in nic.properties)
    return frozenset(value for name, _, value in told if name.startswith("ID_NET_NAME_") and value)


def describe_card(card: Card) -> str:
    """Return a sentence without a full stop that says what has become of a card."""
    old = describe_nic(replace_name(card.before, card.called))
    if card.now is None:
        return f"{old} has become no card of this machine: {card.reason}"
    if card.is_unchanged:
        return f"{old} is the same card as before"
    return f"{old} is {describe_nic(card.now)} now: {card.reason}"


def replace_name(nic: Nic, name: str) -> Nic:
    """Return a card's record under another name."""
    return msgspec.structs.replace(nic, name=name)


def _find_used(uses: Uses, captured: Sequence[Nic], now: Sequence[Nic]) -> list[tuple[str, Nic]]:
    """Return the names of the cards that are used, and what is known of them; each card once.

    Where some of them are cards of the captured machine, the others were none: configuration outlives its cards. What
    has an address of this machine's cards already was adapted before.
    """
    pairs: dict[str, list[str]] = {}
    for name, address in uses.pairs:
        pairs.setdefault(name, []).append(address)
    own = {address_of(nic): nic for nic in now if address_of(nic)}
    known: list[tuple[str, Nic]] = []
    unknown: list[tuple[str, Nic]] = []
    for name in uses.names:
        if name in uses.virtual or not is_name(name):
            continue
        addresses = pairs.get(name, [])
        at = [nic for each, place in uses.places if each == name for nic in captured if nic.path == place]
        nic = at[0] if at else _find_captured(name, addresses, captured, now)
        if nic is not None:
            known.append((name, nic))
        elif addresses or is_hardware_name(name):
            there = [each for each in now if each.path and (name, each.path) in uses.places]
            unknown.append((name, there[0] if there else Nic(name=name, mac=next(iter(addresses), ""))))
    named = {name for name, _ in (*known, *unknown)}
    for address in (*uses.addresses, *(address for name, address in uses.pairs if name not in named)):
        nic = next((each for each in captured if address_of(each) == address), None)
        (unknown if nic is None else known).append(("", nic or Nic(name="", mac=address)))
    adapted = [(name, own[address_of(nic)]) for name, nic in unknown if address_of(nic) in own]
    if captured and (known or adapted):
        return _once(known)
    only = [nic for nic in captured if not nic.virtual]
    if len(only) == 1 and len({name for name, _ in unknown}) == 1 and not address_of(unknown[0][1]):
        return [(unknown[0][0], only[0])]  # whoever captured it called its only card otherwise
    return _once([*known, *((name, own.get(address_of(nic), nic)) for name, nic in unknown)])


def _once(found: Sequence[tuple[str, Nic]]) -> list[tuple[str, Nic]]:
    """Return each card once, under the first of its names."""
    once: list[tuple[str, Nic]] = []
    for name, nic in found:
        if not any(
            (name and name == other) or nic == other_nic or (not name and address_of(nic) == address_of(other_nic))
            for other, other_nic in once
        ):
            once.append((name, nic))
    return once


def _find_globbed(pattern: str, captured: Sequence[Nic], now: Sequence[Nic]) -> Iterator[str]:
    """Yield the captured cards that a pattern of names matched, unless it matches all cards of this machine as well."""
    if all(any(fnmatchcase(name, pattern) for name in {nic.name, *names_of(nic)}) for nic in now):
        return
    yield from (nic.name for nic in captured if fnmatchcase(nic.name, pattern) and nic.up)


def _find_captured(name: str, addresses: Sequence[str], captured: Sequence[Nic], now: Sequence[Nic]) -> Nic | None:
    """Return the captured card that a name means: its address decides, then what udev called it, then the kernel.

    A card in a bond bore the bond's address; what its own is, an old record does not tell, but its configuration does.
    An address of this machine's cards stands where an adaptation broke off, so there the name alone decides.
    """
    found = [nic for address in addresses for nic in captured if address_of(nic) == address]
    if found:
        return found[0]
    told = [nic for nic in captured if name in names_of(nic)]
    named = [*(told if len(told) == 1 else ()), *(nic for nic in captured if nic.name == name)]
    before = [address for address in addresses if address not in {address_of(nic) for nic in now}]
    if not before or not named:
        return named[0] if named else None
    return msgspec.structs.replace(named[0], permanent=before[0]) if not named[0].permanent else None


def _is_meant(choice: Choice, name: str, before: Nic) -> bool:
    """Whether a choice is about a card; cards in a bond may have been recorded with one address."""
    if choice.before.name in {name, before.name} - {""}:
        return True
    named = bool(choice.before.name and before.name)
    return not named and bool(address_of(before)) and address_of(choice.before) == address_of(before)


def _with_name(choice: Choice, found: Sequence[tuple[str, Nic]]) -> Nic:
    return next(before for name, before in found if _is_meant(choice, name, before))
