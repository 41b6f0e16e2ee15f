"""How much time has surely passed between two moments, whatever the clocks say.

A clock may be wrong by an hour or by ten years, jump ahead, or go backwards, and no two hosts need to agree. So each
host is a witness by itself: how long something has waited is told by what passed between two looks of one and the same
host. As long as it is not booted again its uptime is trusted; beyond that the difference of its clock counts, but never
as more than a part of the time to wait, and what it was ahead is taken back once it goes back. So however many clocks
are wrong, none of them ends it; only one that jumps ahead in one boot after the other does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from remetal.repository.objects import Record

MAX_WITNESSES = 32
"""So many hosts are remembered of what waits: those that know of the longest wait."""


class Witness(Record, frozen=True, kw_only=True):
    """A moment by the clocks of a host: Unix time, and seconds since that boot of that host, sleep included."""

    time: float
    host_id: str
    boot_id: str
    uptime: float


class Waited(Record, frozen=True, kw_only=True):
    """What one host knows of how long something has waited: its last look, and the seconds that had surely passed."""

    witness: Witness
    age: float


def witness_now() -> Witness:
    """Return what this host's clocks say."""
    return Witness(
        time=time.time(),
        host_id=read_text("/etc/machine-id"),
        boot_id=read_text("/proc/sys/kernel/random/boot_id"),
        uptime=time.clock_gettime(time.CLOCK_BOOTTIME),
    )


def passed(before: Witness, after: Witness, most: float) -> float:
    """Return how many seconds have surely passed between two looks of one host.

    Where only the time of day tells, at most `most`; at least `-most` if it was earlier now than before: then some of
    what counted before was no time.
    """
    if before.boot_id and before.boot_id == after.boot_id:
        return max(after.uptime - before.uptime, 0.0)
    return min(max(after.time - before.time, -most), most)


def waited_until(waited: Sequence[Waited], now: Witness, most: float) -> tuple[Waited, ...]:
    """Return what hosts know of how long something has waited, once one of them has looked at it again.

    A host that has not seen it before begins to wait. `most` as for `passed`; of many hosts those stay that know most.
    """
    own = next((each for each in waited if _is_same_host(each.witness, now)), None)
    age = max(own.age + passed(own.witness, now, most), 0.0) if own is not None else 0.0
    others = sorted((each for each in waited if each is not own), key=lambda each: each.age, reverse=True)
    return (Waited(witness=now, age=age), *others[: MAX_WITNESSES - 1])


def _is_same_host(one: Witness, other: Witness) -> bool:
    return bool((one.boot_id and one.boot_id == other.boot_id) or (one.host_id and one.host_id == other.host_id))


def read_text(path: str) -> str:
    """Return what the kernel or the host says in a file, without space around it; nothing if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
