"""Which network card of the captured machine becomes which one of this machine. Pure.

In this order: as somebody said; the same address, since then it is the same card; the same slot and driver; the same
driver, in the same order; the only one that is left on both sides. What is left then is a guess, by the order of the
slots, and is said to be one. A cable can be moved, and a guess be corrected; a system without any network cannot even
say so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from remetal.adapt.network.addresses import address_of, parse_address
from remetal.errors import UsageError
from remetal.layout.model import Nic

NOBODY = "none"
"""What stands for no card in `--nic OLD=none`."""

CHOSEN_NONE = "none was chosen for it"
_NUMBER = re.compile(r"(\d+)|(\D+)")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


@dataclass(frozen=True, slots=True)
class Choice:
    """What somebody said: this card of the captured machine becomes that one, or none."""

    before: Nic
    now: Nic | None


@dataclass(frozen=True, slots=True)
class Match:
    """What becomes of a card of the captured machine; `reason` is a sentence without a full stop that says why.

    `is_guess` says that it might as well be another one.
    """

    before: Nic
    now: Nic | None
    reason: str
    is_guess: bool = False


def parse_choices(words: Sequence[str], before: Sequence[Nic], now: Sequence[Nic]) -> tuple[Choice, ...]:
    """Return what `OLD=NEW` words say; a card is named by its name or its address, and NEW may be `none`.

    Where nothing is known of the captured machine's cards, OLD may be any name or address. Raises UsageError, which
    lists the cards, for one that is not there, and for maps that contradict one another.
    """
    choices: list[Choice] = []
    for word in words:
        old, equals, new = word.partition("=")
        if not equals or not old or not new:
            raise UsageError(f"--nic {word} is not OLD=NEW", hint="Write --nic OLD=NEW, or --nic OLD=none.")
        source = _find(old, before) if before else _unknown(old)
        if source is None:
            raise UsageError(f"the captured machine has no network card {old}", hint=_listing("Its", before))
        target = None if new == NOBODY else _find(new, now)
        if target is None and new != NOBODY:
            raise UsageError(f"this machine has no network card {new}", hint=_listing("Its", now))
        for each in choices:
            if _is_same(each.before, source):
                raise UsageError(f"--nic names the captured card {old} twice", hint="Say once what becomes of it.")
            if target is not None and each.now is target:
                raise UsageError(
                    f"--nic gives {new} to two cards, {_call(each.before)} and {old}", hint=_listing("There are", now)
                )
        choices.append(Choice(source, target))
    return tuple(choices)


def match_nics(before: Sequence[Nic], now: Sequence[Nic], chosen: Sequence[Choice] = ()) -> tuple[Match, ...]:
    """Return what becomes of each card in `before`, in that order; no card of `now` is taken twice.

    What `chosen` says of other cards than these counts too: their targets are not free. Virtual functions are taken
    only where they are named, or are the same, as the card that they belong to may be divided otherwise tomorrow.
    """
    work = _Matching(list(before), list(now))
    for choice in chosen:
        work.choose(choice)
    for kind in dict.fromkeys(map(kind_of, before)):
        for tier in (_by_address, _by_slot, _by_driver, _by_rest, _by_order):
            tier(work, kind)
    return tuple(work.found.get(index) or _unmatched(nic, work) for index, nic in enumerate(before))


def kind_of(nic: Nic) -> str:
    """Return what kind of network a card is for: old records do not tell, but its name does."""
    guessed = {"wl": "wlan", "ww": "wwan", "ib": "infiniband"}.get(nic.name[:2], "")
    return nic.kind or guessed


def slot_of(nic: Nic) -> str:
    """Return where a card is plugged in; empty if that is not known."""
    return nic.path or nic.place


def describe_nic(nic: Nic) -> str:
    """Return how a person knows a card: `enp1s0 (52:54:00:12:34:56, e1000e)`."""
    first, *facts = [each for each in (nic.name, address_of(nic), nic.driver) if each] or ["a card"]
    return f"{first} ({', '.join(facts)})" if facts else first


def is_same_card(first: Nic, second: Nic) -> bool:
    """Whether two are the same card in the same slot, so that a system sees no difference."""
    same = bool(address_of(first)) and address_of(first) == address_of(second)
    slots = (first.path, second.path) if first.path and second.path else (first.place, second.place)
    return same and first.driver == second.driver and slots[0] == slots[1]


@dataclass(slots=True)
class _Matching:
    """What is matched so far: `found` by the position in `before`; `taken` are positions in `now`."""

    before: list[Nic]
    now: list[Nic]
    found: dict[int, Match] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)

    def choose(self, choice: Choice) -> None:
        """Note what somebody said, be it of one of these cards or of another."""
        target = next((at for at, nic in enumerate(self.now) if nic == choice.now), None)
        if target is not None:
            self.taken.add(target)
        left = [(index, nic) for index, nic in enumerate(self.before) if index not in self.found]
        meant = [each for each in left if each[1] == choice.before]
        meant = meant or [each for each in left if _is_same(each[1], choice.before)]
        for index, nic in meant[:1]:
            reason = "it was chosen" if choice.now else CHOSEN_NONE
            self.found[index] = Match(nic, choice.now, reason)

    def left(self, kind: str) -> list[int]:
        """Return the cards of a kind that have nothing yet."""
        return [at for at, nic in enumerate(self.before) if at not in self.found and kind_of(nic) == kind]

    def free(self, kind: str, *, virtual: bool = False) -> list[int]:
        """Return the cards of this machine that nobody has taken."""
        free = [at for at, nic in enumerate(self.now) if at not in self.taken and kind_of(nic) == kind]
        return [at for at in free if virtual or not self.now[at].virtual]

    def take(self, old: int, new: int, reason: str, *, is_guess: bool = False) -> None:
        """Note a match."""
        self.taken.add(new)
        self.found[old] = Match(self.before[old], self.now[new], reason, is_guess)


_Alike: TypeAlias = Callable[[Nic, Nic], bool]


def _pairs(work: _Matching, kind: str, alike: _Alike) -> Iterator[tuple[int, int]]:
    """Yield the cards of which exactly one on this machine is alike, and which are the only ones that it is like."""
    left, free = work.left(kind), work.free(kind, virtual=True)
    for old in left:
        same = [new for new in free if alike(work.before[old], work.now[new])]
        if len(same) == 1 and sum(alike(work.before[each], work.now[same[0]]) for each in left) == 1:
            yield old, same[0]


def _by_address(work: _Matching, kind: str) -> None:
    def same(one: Nic, other: Nic) -> bool:
        return bool(address_of(one)) and address_of(one) == address_of(other)

    def same_with_driver(one: Nic, other: Nic) -> bool:
        return same(one, other) and one.driver == other.driver

    for alike in (same, same_with_driver):
        for old, new in list(_pairs(work, kind, alike)):
            work.take(old, new, "it has the same address")


def _by_slot(work: _Matching, kind: str) -> None:
    def alike(one: Nic, other: Nic) -> bool:
        paths = (one.path, other.path) if one.path and other.path else (one.place, other.place)
        return bool(paths[0]) and paths[0] == paths[1] and bool(one.driver) and one.driver == other.driver

    for old, new in list(_pairs(work, kind, alike)):
        work.take(old, new, f"it has the same driver in the same slot, {slot_of(work.now[new])}")


def _by_driver(work: _Matching, kind: str) -> None:
    for driver in dict.fromkeys(work.before[at].driver for at in work.left(kind)):
        left = [at for at in work.left(kind) if work.before[at].driver == driver]
        free = [at for at in work.free(kind) if work.now[at].driver == driver]
        if driver and left and len(left) == len(free):
            for number, (old, new) in enumerate(zip(_in_order(left, work.before), _in_order(free, work.now))):  # noqa: B905
                which = "the only one" if len(free) == 1 else f"the {_ordinal(number)}"
                work.take(old, new, f"it is {which} with the same driver")


def _by_rest(work: _Matching, kind: str) -> None:
    left, free = work.left(kind), work.free(kind)
    if len(left) == len(free) == 1:
        only = "the only card" if not work.taken else "the only card that is left"
        work.take(left[0], free[0], f"it is {only}")


def _by_order(work: _Matching, kind: str) -> None:
    """Guess: cards with a link before those without if there are too many, then by slot."""
    left, free = _in_order(work.left(kind), work.before), _in_order(work.free(kind), work.now)
    linked = [at for at in free if work.now[at].carrier]
    why = "by the order of the slots"
    if len(left) < len(free):
        free = [*linked, *(at for at in free if at not in linked)]
        why = (
            "as it has a link"
            if len(left) == len(linked) == 1
            else f"{why}, those with a link first"
            if linked
            else why
        )
    elif len(left) > len(free):
        used = [at for at in left if work.before[at].carrier]
        left = [*used, *(at for at in left if at not in used)]
        why = f"{why}, those that had a link first" if used else why
    for old, new in zip(left, free):  # noqa: B905 - what is left over on either side gets nothing
        work.take(old, new, f"it was guessed, {why}", is_guess=True)


def _unmatched(nic: Nic, work: _Matching) -> Match:
    others = [each for at, each in enumerate(work.now) if at not in work.taken]
    reason = f"none of its kind is left; there are {', '.join(map(describe_nic, others))}" if others else "none is left"
    return Match(nic, None, reason)


def _in_order(places: Sequence[int], nics: Sequence[Nic]) -> list[int]:
    """Return positions by slot, as a person counts: 2 before 10."""

    def key(at: int) -> tuple[bool, list[tuple[int, str]], list[tuple[int, str]]]:
        slot, name = (
            [(int(number or -1), rest) for number, rest in _NUMBER.findall(text)]
            for text in (slot_of(nics[at]), nics[at].name)
        )
        return not slot, slot, name

    return sorted(places, key=key)


def _ordinal(number: int) -> str:
    return _ORDINALS[number] if number < len(_ORDINALS) else f"number {number + 1}"


def _find(word: str, nics: Sequence[Nic]) -> Nic | None:
    """Return the card that a person names; None where there is none, or an address that two have."""
    address = parse_address(word)
    if address:
        found = [nic for nic in nics if address_of(nic) == address] or [
            nic for nic in nics if parse_address(nic.mac) == address
        ]
        return found[0] if len(found) == 1 else None
    named = [nic for nic in nics if nic.name == word]
    named = named or [nic for nic in nics if any(each.partition("=")[2] == word for each in nic.properties)]
    return named[0] if named else None


def _unknown(word: str) -> Nic:
    address = parse_address(word)
    return Nic(name="" if address else word, mac=address)


def _is_same(one: Nic, other: Nic) -> bool:
    """Whether two records of the captured machine's cards mean the same one."""
    if address_of(one) and address_of(other):
        drivers = {one.driver, other.driver} - {""}
        return address_of(one) == address_of(other) and len(drivers) < 2
    return bool(one.name) and one.name == other.name


def _call(nic: Nic) -> str:
    return nic.name or address_of(nic)


def _listing(whose: str, nics: Sequence[Nic]) -> str:
    return f"{whose} cards: {'; '.join(map(describe_nic, nics)) or 'none'}."
