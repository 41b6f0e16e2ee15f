"""Which network card of the captured machine becomes which one of the machine that is restored onto.

Which cards the system uses is only known once its files are there. So the plan shows what becomes of those that were
switched on when it was captured, and the restore holds to it; what is only learnt then is told in its report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec.structs

from remetal.adapt.network import Choice, Match, Network, match_nics, parse_choices
from remetal.adapt.network.addresses import address_of
from remetal.adapt.network.matching import describe_nic, kind_of
from remetal.errors import UsageError
from remetal.layout.model import Layout, Nic
from remetal.layout.plan import NicFate, Plan, hash_choice


def with_nics(plan: Plan, source: Layout, now: Sequence[Nic] | None, words: Sequence[str]) -> Plan:
    """Return the plan with what becomes of the network cards; `words` are those of --nic. Pure.

    Raises UsageError if they name what does not exist, or contradict one another.
    """
    captured = source.inventory.nics if source.inventory is not None else ()
    if now is None:
        if words:
            raise UsageError(
                f"--nic {words[0]} has no meaning: the targets are disk files, and nobody said for which machine",
                hint="Add --inventory FILE, made on that machine by `remetal probe --json > FILE`.",
            )
        return plan
    chosen = parse_choices(words, captured, now)
    named = [choice.before for choice in chosen]
    used = [nic for nic in captured if nic.up and not nic.virtual] or [nic for nic in captured if not nic.virtual]
    wanted = [*(nic for nic in captured if nic in used or nic in named), *(nic for nic in named if nic not in captured)]
    fates = tuple(
        NicFate(before=each.before, now=each.now, reason=each.reason, guess=each.is_guess, chosen=each.before in named)
        for each in match_nics(wanted, now, chosen)
    )
    if not fates:
        return plan
    pairs = [f"{_key(each.before)}={_key(each.now) if each.now is not None else ''}" for each in fates]
    return msgspec.structs.replace(
        plan,
        nics=fates,
        id=hash_choice(plan, pairs),
        warnings=(*plan.warnings, *_warnings(fates, now)),
    )


def network_of(plan: Plan, source: Layout, now: Sequence[Nic] | None) -> Network | None:
    """Return what adaptation has to know of a plan's network cards; None for disk files."""
    if now is None:
        return None
    captured = source.inventory.nics if source.inventory is not None else ()
    chosen = tuple(Choice(each.before, each.now) for each in plan.nics if each.chosen)
    agreed = tuple(Match(each.before, each.now, each.reason, each.guess) for each in plan.nics if not each.chosen)
    return Network(captured, tuple(now), chosen, agreed)


def _key(nic: Nic) -> str:
    return address_of(nic) or nic.name


def _warnings(fates: Sequence[NicFate], now: Sequence[Nic]) -> Iterator[str]:
    for each in fates:
        others = [nic for nic in now if nic != each.now and kind_of(nic) == kind_of(each.before)]
        ways = " or ".join(f"{_key(nic)} ({nic.name})" for nic in others)
        if each.guess or (each.now is None and not each.chosen):
            choose = f". To choose another one: --nic {_key(each.before)}={ways}" if ways else ""
            yield f"network card {describe_nic(each.before)}: {each.reason}{choose}"
