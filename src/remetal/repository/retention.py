"""Which snapshots a machine keeps. Pure; it looks at no clock, only at the snapshots' own times and order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import msgspec

from remetal.errors import UsageError
from remetal.repository.retired import Retired, find_successors
from remetal.repository.snapshots import Snapshot


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """How many snapshots to keep: the newest, and the newest of so many hours, days, weeks, months and years.

    Only periods that have a snapshot count. A snapshot with one of `keep_tag` is always kept.
    """

    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0
    keep_tag: tuple[str, ...] = ()


def check_policy(policy: Policy) -> None:
    """Raise UsageError for a policy that keeps nothing, or a negative number of snapshots."""
    counts = [count for _, count, _ in _rules(policy)]
    if min(counts) < 0:
        raise UsageError("a number of snapshots to keep is negative")
    if not any(counts):
        raise UsageError(
            "the policy keeps no snapshot by its age", hint="Give at least one --keep-…, such as --keep-daily 7."
        )


def choose_kept(
    snapshots: Sequence[Snapshot], policy: Policy, retired: Mapping[str, Retired] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return the ids of one machine's snapshots that the policy keeps, each with the reasons.

    The newest snapshot is always kept. Newest means made last, by number; whatever times the snapshots say. Those of a
    machine that was `retired` were made before those of its successor.
    """

    def made(snapshot: Snapshot) -> tuple[int, int]:
        return -len(find_successors(snapshot.machine_id, retired or {})), snapshot.sequence

    newest_first = sorted(snapshots, key=made, reverse=True)
    reasons: dict[str, list[str]] = {}
    for snapshot in newest_first[:1]:
        reasons.setdefault(snapshot.id, []).append("newest")
    for name, count, period in _rules(policy):
        seen: set[str] = set()
        for snapshot in newest_first:
            found = period(snapshot)
            if found not in seen and len(seen) < count:
                seen.add(found)
                reasons.setdefault(snapshot.id, []).append(name)
    for snapshot in newest_first:
        for tag in sorted(set(policy.keep_tag) & set(snapshot.tags)):
            reasons.setdefault(snapshot.id, []).append(f"tag {tag}")
    return {identity: tuple(each) for identity, each in reasons.items()}


def _rules(policy: Policy) -> list[tuple[str, int, Callable[[Snapshot], str]]]:
    return [
        ("last", policy.keep_last, lambda each: each.id),
        ("hourly", policy.keep_hourly, lambda each: _moment(each, "%Y-%m-%d %H")),
        ("daily", policy.keep_daily, lambda each: _moment(each, "%Y-%m-%d")),
        ("weekly", policy.keep_weekly, lambda each: _moment(each, "%G-W%V")),
        ("monthly", policy.keep_monthly, lambda each: _moment(each, "%Y-%m")),
        ("yearly", policy.keep_yearly, lambda each: _moment(each, "%Y")),
    ]


def _moment(snapshot: Snapshot, form: str) -> str:
    """Return the period that a snapshot belongs to, UTC; a time that is none is a period of its own."""
    try:
        return datetime.fromisoformat(snapshot.time).strftime(form)
    except ValueError:
        return snapshot.time
