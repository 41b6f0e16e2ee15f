"""Programs that are not ours: they run for so long and no longer, whatever they do, and see nothing of ours.

Each is a session and a process group of its own, which a Ctrl-C on the terminal does not reach.
"""

from __future__ import annotations

import os
import pwd
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from remetal.errors import RefusedError
from remetal.system.run import (
    Argv,
    Completed,
    Process,
    ProgramFailedError,
    die_with_parent,
    not_started,
    resolve_program,
    search_path,
    wait_for_end,
)

_KEPT = 1 << 16
"""Bytes that are kept of what a program prints: of standard output the first, of standard error the last."""
_TICK = 0.01
_BRIEF = 0.2
"""Seconds that a killed program has to be gone; one that waits for a frozen file system goes when it is let go."""


def run_within(seconds: float, argv: Argv, *, env: Mapping[str, str], user: str | None = None) -> Completed:
    """Run a program for at most so many seconds and return what it printed, up to 64 KiB of either output.

    `env` is all that it gets but PATH and LANG, and HOME if it runs as another `user`, with whose groups it does. What
    it leaves running keeps running, without an output; if it has not ended itself, its process group is killed. Raises
    ProgramMissingError, or ProgramFailedError for any exit code but 0, a signal, or when the time is over; RefusedError
    if there is no such user.
    """
    with _started(argv, env, user, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        printed = _read_both(process, time.monotonic() + seconds)
        out, err = bytes(printed[process.stdout]), bytes(printed[process.stderr])
        ended = process.poll()
    if ended is None:
        ending = f"did not end within {seconds:.3g} s and was stopped"
        raise ProgramFailedError(_words(process), -signal.SIGKILL, err.decode("utf-8", "replace"), ending=ending)
    if ended != 0:
        raise ProgramFailedError(_words(process), ended, err.decode("utf-8", "replace"))
    return Completed(ended, out, err)


@contextmanager
def attended(argv: Argv, *, env: Mapping[str, str]) -> Iterator[Process]:
    """Run a program beside us and talk to it by three pipes, which are not buffered; see `run_within` for `env`.

    When the block is left its input is closed, and its process group is killed. Raises as `run_within` does.
    """
    with _started(argv, env, None, stdin=subprocess.PIPE) as process:
        yield process


def own_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return all that such a program finds in its environment."""
    return {"PATH": search_path(), "LANG": "C.UTF-8", **env}


@contextmanager
def _started(argv: Argv, env: Mapping[str, str], user: str | None, *, stdin: int) -> Iterator[Process]:
    command = resolve_program(argv)
    entry = None if user is None else _entry_of(user)
    try:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=own_environment({**({"HOME": entry.pw_dir} if entry else {}), **env}),
            cwd="/",
            start_new_session=True,
            **({} if entry is None or entry.pw_uid == os.geteuid() else _identity(entry)),
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, whose function was loaded at import
        )
    except (OSError, ValueError) as error:
        raise not_started(command, error) from error
    try:
        yield process
    finally:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        _end(process)


def _entry_of(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise RefusedError(f"there is no user '{user}'") from None


def _identity(entry: pwd.struct_passwd) -> dict[str, Any]:
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}


def _end(process: Process) -> None:
    """Kill a program's process group, if it still runs; nobody waits for one that waits for what we hold."""
    if process.poll() is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if wait_for_end(process, _BRIEF) is None:
        threading.Thread(target=process.wait, daemon=True).start()


def _read_both(process: Process, until: float) -> dict[IO[bytes], bytearray]:
    """Read a program's outputs until it ends, or it is time."""
    printed = {pipe: bytearray() for pipe in (process.stdout, process.stderr) if pipe is not None}
    opened = list(printed)
    while True:
        ended = process.poll() is not None  # what it has printed by now is read once more
        while ready := select.select(opened, [], [], 0 if ended else _TICK)[0]:
            for pipe in ready:
                data = os.read(pipe.fileno(), _KEPT)
                printed[pipe] += data
                del printed[pipe][slice(_KEPT, None) if pipe is process.stdout else slice(-_KEPT)]
                if not data:
                    opened.remove(pipe)
            if time.monotonic() >= until:
                break
        if ended or time.monotonic() >= until:
            return printed


def _words(process: Process) -> list[str]:
    assert isinstance(process.args, list)
    return [str(word) for word in process.args]
