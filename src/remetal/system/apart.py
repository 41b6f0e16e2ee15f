"""Setting processes apart that have to outlive us. Source: cgroups(7)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from remetal.system.run import (
    Argv,
    Process,
    ProgramFailedError,
    clean_environment,
    converse,
    not_started,
    resolve_program,
    wait_for_end,
)

_CGROUPS = Path("/sys/fs/cgroup")
_MAX_TOLD = 1 << 16


def set_apart(pid: int) -> None:
    """Take a process out of our control groups, so that what ends, stops or starves all in them does not reach it.

    That is how a service manager stops a unit, and how some kill what uses too much memory. Where it is not allowed,
    the process stays where it is.
    """
    for path in _outermost_groups():
        with suppress(OSError):
            path.write_text(str(pid))


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


class UnbrokenProgram:
    """A program that changes what must not stay half changed: nothing ends it, neither our end nor who interrupts us.

    Nor does what ends all in our control groups: it leaves them before it begins. What it says goes to a file without a
    name, because a pipe would break with us. Raises ProgramMissingError, or ProgramFailedError if it cannot be started.
    """

    def __init__(self, argv: Argv) -> None:
        """Start it, in a session of its own."""
        self._command = resolve_program(argv)
        self._told = ""
        self._said = tempfile.TemporaryFile(prefix="remetal-")  # noqa: SIM115 - for as long as the program runs
        with _opened_groups() as groups:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._said,
                    stderr=self._said,
                    env=clean_environment(),
                    cwd="/",
                    start_new_session=True,
                    preexec_fn=partial(_enter, groups),  # noqa: PLW1509 - a few system calls, on files that are open
                )
            except (OSError, ValueError) as error:
                self._said.close()
                raise not_started(self._command, error) from error

    def ends(self, timeout: float) -> bool:
        """Wait for its end; return whether it came within `timeout` seconds. Raises ProgramFailedError if it failed."""
        code = wait_for_end(self._process, timeout)
        if code is None:
            return False
        if not self._said.closed:
            with self._said:
                self._said.seek(0)
                self._told = self._said.read(_MAX_TOLD).decode("utf-8", "replace")
        if code != 0:
            raise ProgramFailedError(self._command, code, self._told)
        return True


def _outermost_groups() -> list[Path]:
    """Return the files that take the processes of each hierarchy's outermost group."""
    unified = (_CGROUPS / "cgroup.controllers").is_file()
    return [root / "cgroup.procs" for root in ([_CGROUPS] if unified else _CGROUPS.glob("*"))]


@contextmanager
def _opened_groups() -> Iterator[list[int]]:
    """Open the outermost groups that may be entered, for who has no time to look for them."""
    with ExitStack() as stack:
        opened = []
        for path in _outermost_groups():
            with suppress(OSError):
                opened.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
                stack.callback(os.close, opened[-1])
        yield opened


def _enter(groups: Sequence[int]) -> None:
    """Let this process enter groups that are open; where that is not allowed, it stays where it is."""
    for group in groups:
        with suppress(OSError):
            os.write(group, b"0")
