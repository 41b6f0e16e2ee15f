"""Setting processes apart that have to outlive us. Source: cgroups(7)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def set_apart(pid: int) -> None:
    """Take a process out of our control groups, so that what ends, stops or starves all in them does not reach it.

    That is how a service manager stops a unit, and how some kill what uses too much memory. Where it is not allowed,
    the process stays where it is.
    """
    unified = (_CGROUPS / "cgroup.controllers").is_file()
    for root in [_CGROUPS] if unified else _CGROUPS.glob("*"):
        with suppress(OSError):
            (root / "cgroup.procs").write_text(str(pid))
