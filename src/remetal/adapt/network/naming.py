"""Letting each card have the name that its system knows it by: a .link file for each, or a rule for udev. Pure.

What a system says of its network it says by names, so these stay, and nothing else has to change. udev gives a card
its name when the card appears: by the first rule that has one for it, else by the first .link file that fits.

- `PermanentMACAddress=` is known to systemd 245 and newer, and holds also where a bond has covered the address; VLANs
  and bridges have none, so they never match. Older systems, and eudev, get a rule: there a .link file would match a
  VLAN as well as its card, and would not rename what an initramfs has renamed already (before 240).
- Only the first .link file that matches counts. Where another one of the administrator's might be the one, a rule
  gives the name, and what that file says still holds.
- A name can be given only while nobody has it. A card that the system does not use, but that udev would call by a
  name that is needed, gets one made of its address. Names of the kernel's own kind (eth0) are handed out by the
  kernel itself in the order in which cards appear, and no udev since 2013 waits until they are free (Debian's did
  until 244). So where several cards could get one, the system's files are told another name (net0).
- An initramfs that holds udev and the card's driver names the card first. `NamePolicy=keep`, which is in udev's own
  99-default.link, would leave it at that; these files do not have it, so the name is given again. But that fails
  where two names have to be exchanged, or a card is in use by then: so an initramfs is given these files, too.

Sources: systemd.link(5), systemd.net-naming-scheme(7), udev(7); systemd's src/udev/net/link-config.c, NEWS of 197,
240 and 245; systemd/systemd issues 14886, 29073 and 29957 on GitHub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from remetal.adapt.network.addresses import address_of, parse_address
from remetal.adapt.network.cards import Card, Cards, is_name, names_of
from remetal.adapt.network.matching import describe_nic, kind_of, slot_of
from remetal.adapt.network.sections import parse_sections
from remetal.adapt.network.udev_rules import place_on_bus
from remetal.layout.model import Nic

LINKS = "/etc/systemd/network"
RULES = "/etc/udev/rules.d/70-remetal-net.rules"

_KNOWS_PERMANENT = 245
_WAITS_UNTIL = 244
"""Debian's and Ubuntu's udev of this version and older waits until a name is free."""
_GAVE_UP = 197
"""All others have given up at once since this one."""
_KERNEL = re.compile(r"(eth|wlan|wwan|usb|ib)\d+")
_FREE_NAMES = ("net", "nic", "lan", "card")
_BY_HARDWARE, _SET = 0, 3


@dataclass(frozen=True, slots=True)
class Udev:
    """What gives names to the cards of a system: `systemd`, `eudev` or nothing; the version where it could be told."""

    kind: str = ""
    version: int = 0
    is_debian: bool = False

    @property
    def has_links(self) -> bool:
        """Whether .link files with permanent addresses work."""
        return self.kind == "systemd" and self.version >= _KNOWS_PERMANENT

    @property
    def exchanges(self) -> bool:
        """Whether two cards may exchange their names."""
        return 0 < self.version <= (_WAITS_UNTIL if self.is_debian else _GAVE_UP - 1)


@dataclass(frozen=True, slots=True)
class Naming:
    """The files that give names, by path; what became of names that could not stay; and what is to be said."""

    files: Mapping[str, str] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_naming(
    cards: Cards,
    udev: Udev,
    *,
    given: Collection[str] = (),
    links: Mapping[str, str] | None = None,
    used: Collection[str] = (),
) -> Naming:
    """Return the files that let every card have its name on this machine.

    `given` are names that the system's own files give already, `links` its other .link files by path, `used` all names
    of interfaces in its files, so that none of them is taken for another card.
    """
    placed = [card for card in cards.used if card.name and card.now is not None]
    if all(card.is_unchanged for card in placed):
        return Naming()
    renames = _find_renames(cards, udev, used)
    needed = [card for card in placed if card.name in renames or not (card.is_unchanged or card.name in given)]
    if not udev.kind:
        return Naming(notes=tuple(_no_udev_notes(needed, cards)))
    wanted = {renames.get(card.name, card.name): card.now for card in needed if card.now is not None}
    held = {renames.get(card.name, card.name) for card in placed}
    every = [*cards.others, *(card.now for card in cards.used if card.now is not None)]
    others = [nic for nic in cards.others if names_of(nic) & held and address_of(nic)]
    wanted |= {f"enx{address_of(nic).replace(':', '')}": nic for nic in others if len(address_of(nic)) == 17}
    files: dict[str, str] = {}
    rules: list[str] = []
    notes: list[str] = []
    old_names = {new: old for old, new in renames.items()}
    for name, nic in wanted.items():
        why = _why(name, nic, old_names.get(name, name), is_other=nic in others)
        keys = _link_keys(nic, every) if udev.has_links and not _may_match_other(nic, links or {}) else ()
        parts = _rule_parts(nic, every)
        if keys:
            files[f"{LINKS}/10-remetal-{name}.link"] = _link_text(name, why, keys)
        elif parts:
            rules += [*(f"# {line}" for line in why), f'{", ".join(parts)}, NAME="{name}"', ""]
        else:
            notes.append(
                f"{describe_nic(nic)} cannot be called {name}: its address is not its own, and its slot not known"
            )
    if rules:
        files[RULES] = "\n".join(["# Written by remetal when it restored this system onto other hardware.", "", *rules])
    return Naming(files, renames, tuple(notes))


def is_kernel_name(name: str) -> bool:
    """Whether a name is of the kind that the kernel hands out itself."""
    return _KERNEL.fullmatch(name) is not None


def _find_renames(cards: Cards, udev: Udev, used: Collection[str]) -> dict[str, str]:
    """Return the names of the kernel's kind that other cards might get first, and what they become."""
    if udev.exchanges or not udev.kind:
        return {}
    present = [*cards.others, *(card.now for card in cards.used if card.now is not None)]
    prone = []
    for card in cards.used:
        rivals = [nic for nic in present if card.now is not None and kind_of(nic) == kind_of(card.now)]
        if is_kernel_name(card.name) and card.now is not None and len(rivals) > 1:
            prone.append(card.name)
    if not prone:
        return {}
    stem = next((each for each in _FREE_NAMES if not any(name.startswith(each) for name in used)), "remetal")
    numbers: dict[str, str] = {}
    for name in prone:
        digits = re.sub(r"\D", "", name)
        new = f"{stem}{digits}"
        numbers[name] = new if new not in numbers.values() else f"{stem}{digits}x{len(numbers)}"
    return {old: new for old, new in numbers.items() if is_name(new)}


def _why(name: str, nic: Nic, old: str, *, is_other: bool) -> list[str]:
    """Return the lines of comment that tell an administrator why a file is there."""
    where = f"{describe_nic(nic)}, at {slot_of(nic)}" if slot_of(nic) else describe_nic(nic)
    if is_other:
        return [f"{where}:", "this system does not use it; called by its address, it takes no name that another needs."]
    if old != name:
        return [
            f"{where}:",
            f"it takes the place of the card that was called {old}. The kernel gives such names itself, and this",
            f"machine has several cards that could get it; so it is called {name}.",
        ]
    return [
        f"{where}:",
        f"it takes the place of the card that was called {name}; all that is said of {name} holds.",
    ]


def _link_text(name: str, why: Sequence[str], keys: Sequence[str]) -> str:
    head = ["# Written by remetal when it restored this system onto other hardware.", *(f"# {line}" for line in why)]
    return "\n".join([*head, "[Match]", *keys, "", "[Link]", f"Name={name}", ""])


def _link_keys(nic: Nic, every: Sequence[Nic]) -> tuple[str, ...]:
    """Return what a .link file matches a card by; nothing if a rule has to do."""
    address = address_of(nic)
    if address and nic.assigned in {_BY_HARDWARE, -1, _SET} and (nic.permanent or nic.assigned != _SET):
        twins = [each for each in every if address_of(each) == address]
        return (f"PermanentMACAddress={address}", *((f"Driver={nic.driver}",) if len(twins) > 1 and nic.driver else ()))
    return (f"Path={nic.path}",) if nic.path else ()


def _rule_parts(nic: Nic, every: Sequence[Nic]) -> list[str]:
    address = address_of(nic)
    twins = [each for each in every if address_of(each) == address]
    driver = nic.driver if len(twins) > 1 and nic.driver else "?*"
    head = ['SUBSYSTEM=="net"', 'ACTION=="add"', f'DRIVERS=="{driver}"']
    if address and (nic.permanent or nic.assigned in {_BY_HARDWARE, -1}):
        kind = ['ATTR{type}=="1"'] if len(address) == 17 else []
        return [*head, f'ATTR{{address}}=="{address}"', *kind]
    place = place_on_bus(nic)
    return [*head, f'KERNELS=="{place}"'] if place else []


def _may_match_other(nic: Nic, links: Mapping[str, str]) -> bool:
    """Whether another .link file might be meant for a card, as far as can be told from here."""
    for path, text in links.items():
        settings = list(parse_sections(text))
        if path.rpartition("/")[2].startswith("10-remetal-") or not any(each.section == "Link" for each in settings):
            continue
        addresses = [
            each for each in settings if each.section == "Match" and each.key in {"MACAddress", "PermanentMACAddress"}
        ]
        listed = {parse_address(word) for each in addresses for _, _, word in each.words()}
        paths = [
            word for each in settings if (each.section, each.key) == ("Match", "Path") for _, _, word in each.words()
        ]
        if addresses and address_of(nic) not in listed:
            continue
        if paths and nic.path and not any(fnmatchcase(nic.path, word) for word in paths):
            continue
        return True
    return False


def _no_udev_notes(needed: Sequence[Card], cards: Cards) -> Iterator[str]:
    """Yield what is to be said where nobody gives names: the kernel's own ones have to do."""
    several = len(cards.others) + sum(card.now is not None for card in cards.used) > 1
    for card in needed:
        if card.now is not None and (several or not is_kernel_name(card.name) or not card.name.endswith("0")):
            yield (
                f"the system has no udev that calls {describe_nic(card.now)} {card.name}: if the kernel does not, "
                f"let nameif do it, with the line '{card.name} {address_of(card.now)}' in /etc/mactab"
            )
