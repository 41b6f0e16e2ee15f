"""The greatest resident size of a command, as the kernel tells it when the command has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from remetal.units import KIB

_LAUNCHER = """
import os, sys
pid = os.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
os.write(3, b"%d %d" % (os.waitstatus_to_exitcode(status), usage.ru_maxrss))
"""
"""A process takes over the greatest size of the one that it was forked from: so a small one stands in between."""


@dataclass(frozen=True)
class Usage:
    """Exit code, and bytes of the greatest resident size of a command or anything that it ran (getrusage(2))."""

    returncode: int
    resident: int


def run_resident(argv: Sequence[str | os.PathLike[str]], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command, which is given by its path, to its end; what it prints to standard output is dropped."""
    reading, writing = os.pipe()
    try:
        launcher = [sys.executable, "-I", "-S", "-c", f"import os; os.dup2({writing}, 3)\n{_LAUNCHER}"]
        subprocess.run([*launcher, *argv], env=environment, pass_fds=[writing], stdout=subprocess.DEVNULL, check=True)
        returncode, resident = os.read(reading, 100).split()
    finally:
        os.close(reading)
        os.close(writing)
    return Usage(int(returncode), int(resident) * KIB)
