"""How much time has surely passed between two moments, whatever the clocks say.

A clock may be wrong by an hour or by ten years, jump ahead, or go backwards. What is to wait for a time is therefore
told by witnesses: as long as a host is not booted again its uptime is trusted; beyond that the difference of two
clocks counts, but never as more than a part of the time to wait, and what one clock was ahead is taken back when the
other is asked again. So a single wrong clock cannot end it, however often the two alternate; only a clock that jumps
ahead in one boot after the other can.
"""

from __future__ import annotations

import time
from pathlib import Path

from remetal.repository.objects import Record


class Witness(Record, frozen=True, kw_only=True):
    """A moment by the clocks of a host: Unix time, and seconds since that boot of that host, sleep included."""

    time: float
    host_id: str
    boot_id: str
    uptime: float


def witness_now() -> Witness:
    """Return what this host's clocks say."""
    return Witness(
        time=time.time(),
        host_id=read_text("/etc/machine-id"),
        boot_id=read_text("/proc/sys/kernel/random/boot_id"),
        uptime=time.clock_gettime(time.CLOCK_BOOTTIME),
    )


def passed(before: Witness, after: Witness, most: float) -> float:
    """Return how many seconds have surely passed.

    Where only the time of day tells, at most `most`; at least `-most` if it was earlier now than before: then some of
    what counted before was no time.
    """
    if before.boot_id and before.boot_id == after.boot_id:
        return max(after.uptime - before.uptime, 0.0)
    return min(max(after.time - before.time, -most), most)


def read_text(path: str) -> str:
    """Return what the kernel or the host says in a file, without space around it; nothing if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
