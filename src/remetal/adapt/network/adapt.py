"""Fitting a restored system's network to the cards of the machine that it stands on now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from remetal.adapt.change import Adaptation, Change
from remetal.adapt.efi import find_esps
from remetal.adapt.fat_files import apply_fat_file, probe_fat, read_fat_file
from remetal.adapt.network.addresses import address_of
from remetal.adapt.network.boot import plan_boot_words
from remetal.adapt.network.cards import Card, Cards, Uses, describe_card, find_cards
from remetal.adapt.network.facts import probe_udev
from remetal.adapt.network.files import NetworkPlan, decode, encode, new_file_diff, plan_network, probe_uses
from remetal.adapt.network.matching import CHOSEN_NONE, Choice, Match, kind_of
from remetal.adapt.network.renaming import plan_renames
from remetal.adapt.restored import Restored
from remetal.adapt.rooted import create_inside, overwrite_inside, rename_inside
from remetal.adapt.roots import System, open_root
from remetal.adapt.text import TextPlan, diff_texts
from remetal.errors import RemetalError
from remetal.events import Report, Warn, silent
from remetal.layout.model import Nic

_VOLUMES = ("/usr", "/var", "/boot", "/etc")


@dataclass(frozen=True, slots=True)
class Network:
    """The cards of the captured machine, as far as they are known, and those of this one; what was chosen, and agreed.

    `agreed` are the matches that the plan has shown.
    """

    captured: tuple[Nic, ...]
    now: tuple[Nic, ...]
    chosen: tuple[Choice, ...] = ()
    agreed: tuple[Match, ...] = ()


def adapt_network(system: System, restored: Restored, network: Network | None, report: Report = silent) -> Adaptation:
    """Let a restored system find its network on this machine's cards; say what was changed, and what became of each.

    Without a `network` nobody knows what machine the disks will be in: nothing is changed. Raises RemetalError if a
    file system fails; running it again goes on.
    """
    with open_root(system, restored, inner=_VOLUMES) as root:
        uses = probe_uses(root)
        if network is None:
            return Adaptation(notes=tuple(_left_alone(uses)))
        cards = find_cards(uses, network.captured, network.now, network.chosen, network.agreed)
        plan = plan_network(root, cards, probe_udev(root, is_debian="debian" in system.ids), uses)
        diffs = {path: new_file_diff(root, path, text) for path, text in plan.files.items()}
    for each in _warnings(cards):
        report(each)
    if plan.changes:
        with open_root(system, restored, inner=_VOLUMES, writable=True) as root:
            apply_network(root, plan)
    done = Adaptation(_list_changes(plan, diffs), tuple(_notes(cards, plan, uses)), _count(plan))
    return done + _adapt_esps(system, restored, cards, plan.renames)


def apply_network(root: Path, plan: NetworkPlan) -> None:
    """Carry out a plan in the system mounted at `root`. Raises RemetalError if that fails; repeating it goes on."""
    for text in plan.texts:
        if text.changes:
            overwrite_inside(root, text.path, encode(text.text))
    for old, new in plan.moves:
        rename_inside(root, old, new)
    for path, content in plan.files.items():
        create_inside(root, path, encode(content))


def _list_changes(plan: NetworkPlan, diffs: dict[str, str]) -> tuple[Change, ...]:
    texts = [Change(each.path, "; ".join(each.changes), each.diff) for each in plan.texts if each.changes]
    moves = [Change(old, f"is called {new.rpartition('/')[2]} now") for old, new in plan.moves]
    files = [Change(path, _say(path), diffs[path]) for path in plan.files]
    return (*texts, *moves, *files)


def _say(path: str) -> str:
    return (
        "gives a network card its name" if path.endswith((".link", ".rules")) else "lets the initramfs name the cards"
    )


def _count(plan: NetworkPlan) -> int:
    texts = sum(len(encode(each.text)) for each in plan.texts if each.changes)
    return texts + sum(len(encode(text)) for text in plan.files.values())


def _notes(cards: Cards, plan: NetworkPlan, uses: Uses) -> Iterator[str]:
    for card in cards.used:
        if not card.is_unchanged:
            yield f"network: {describe_card(card)}{_how_to_choose(card, cards)}"
    yield from (note for each in plan.texts for note in each.notes)
    yield from plan.notes
    for card in cards.moved():
        old, new = address_of(card.before), address_of(card.now) if card.now is not None else ""
        if {card.name, old} & set(uses.dhcp) and old and old != new:
            yield (
                f"network: {card.called} gets its address by DHCP: a server that knows the machine by its network card "
                f"has to be told {new} instead of {old}"
            )


def _warnings(cards: Cards) -> Iterator[Warn]:
    for card in cards.used:
        if card.is_guess or (card.now is None and card.reason != CHOSEN_NONE):
            yield Warn(f"network: {describe_card(card)}", _how_to_choose(card, cards).lstrip(". ;"))


def _how_to_choose(card: Card, cards: Cards) -> str:
    """Return how another card is chosen, for one that was guessed or has become none."""
    every = (*cards.others, *(each.now for each in cards.used if each.now is not None))
    others = [nic for nic in every if address_of(nic) and nic != card.now and kind_of(nic) == kind_of(card.before)]
    if not (card.is_guess or card.now is None) or card.reason == CHOSEN_NONE or not others:
        return ""
    is_known = card.name == card.before.name or not address_of(card.before)
    old = card.called if is_known else address_of(card.before)
    ways = " or ".join(f"--nic {old}={address_of(nic)} ({nic.name})" for nic in others)
    return f". If it should be another one, run the same restore with {ways}"


def _left_alone(uses: Uses) -> Iterator[str]:
    if uses.names or uses.addresses or uses.pairs:
        yield (
            "the network was left as it is: these disks are in no machine yet, so nobody knows its network cards. "
            f"The system expects {', '.join(dict.fromkeys((*uses.names, *uses.addresses)))}"
        )


def _adapt_esps(system: System, restored: Restored, cards: Cards, renames: Mapping[str, str]) -> Adaptation:
    """Do the same for boot entries on EFI system partitions of this system."""
    done = Adaptation()
    if not any(cards.moved()):
        return done
    for space in find_esps(restored, [system]):
        try:
            tree = probe_fat(restored.span(space))
        except RemetalError:
            continue  # told where the boot loader is looked after
        for path in tree.paths:
            if path.lower().startswith("/loader/entries/") and path.lower().endswith(".conf"):
                plan = _plan_entry(decode(read_fat_file(tree.span, path)), cards, renames, path)
                if plan.changes:
                    tree = apply_fat_file(tree, path, encode(plan.text))
                    change = Change(path, "; ".join(plan.changes), plan.diff)
                    done += Adaptation((change,), bytes_written=len(encode(plan.text)))
    return done


def _plan_entry(text: str, cards: Cards, renames: Mapping[str, str], path: str) -> TextPlan:
    first = plan_boot_words(text, cards, path)
    then = plan_renames(first.text, renames, path)
    return TextPlan(path, then.text, (*first.changes, *then.changes), diff=diff_texts(path, text, then.text))
