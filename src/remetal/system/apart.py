"""Setting processes apart that have to outlive us. Source: cgroups(7)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from remetal.system.run import Process, converse

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


@contextmanager
def outliving(script: str, *words: str, pass_fds: Sequence[int] = ()) -> Iterator[Process]:
    """Run a script of ours that outlives us, and talk to it; see `converse`.

    Its command does not have our name, so that `pkill -f` with that name does not end both.
    """
    fd = os.open(script, os.O_RDONLY | os.O_CLOEXEC)
    try:
        argv = [str(Path(sys.executable).resolve()), "-I", "-S", f"/proc/self/fd/{fd}", *words]
        with converse(argv, pass_fds=[fd, *pass_fds]) as process:
            yield process
    finally:
        os.close(fd)
