"""The process that keeps a promise if the one who gave it cannot: it runs programs when he is gone, or takes too long.

`python -I -S SCRIPT` gets a line of JSON: `wait`, in how many seconds it is time (or null), `limit`, how many
seconds each of the `commands` has, their environment `env`, `trusted`, the files that nobody else may be able to
change if anything is to run, and `again`. It says `ready`, and waits. A dot releases it. When the time is over, or who
asked is gone, it runs the commands one after the other, whatever becomes of each, and says `kept`. A JSON list of their
numbers is to run those, and to say nothing. For `again` seconds it runs again what has failed, and does all that as a
process that nobody waits for.

It imports nothing of remetal and writes to no file.
"""

import contextlib
import errno
import io
import json
import os
import select
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MOST_LINKS = 40
_PAUSE = 2.0
"""Seconds after which what has failed is run again."""


def wait_for_word(wait: float | None) -> bytes:
    """Wait until it is time, or somebody says something, and return that: nothing if it is time, or he is gone."""
    ready = select.select([0], [], [], wait)[0]
    return os.read(0, select.PIPE_BUF) if ready else b""


def run(argv: list[str], limit: float, env: dict[str, str]) -> bool:
    """Run a program for at most so many seconds, as a session of its own; return whether it succeeded."""
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return False


def find_weakness(path: Path) -> tuple[Path, str] | None:
    """Return what others may change of all that leads to a path, or of what is there, and how; None if nobody may.

    Raises OSError for what cannot be told.
    """
    for each in _way_to(path.absolute()):
        why = _why_not_ours(each.lstat())
        if why:
            return each, why
    return None


def _why_not_ours(about: os.stat_result) -> str:
    shared = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX
    if about.st_uid not in {0, os.geteuid()}:
        return f"belongs to user {about.st_uid}"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not shared and not stat.S_ISLNK(about.st_mode):
        return f"may be changed by others (mode {stat.S_IMODE(about.st_mode):04o})"
    return ""


def _way_to(path: Path) -> Iterator[Path]:
    """Yield all that leads to a path: each folder and each link, from the root on, and what it is itself.

    The caller looks at each before the next is asked for. Raises OSError.
    """
    done, links = Path("/"), 0
    yield done
    waiting = list(reversed(path.parts[1:]))
    while waiting:
        name = waiting.pop()
        if name == "..":
            done = done.parent
            continue
        place = done / name
        yield place
        if not place.is_symlink():
            done = place
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = place.readlink()
        if target.is_absolute():
            done = Path("/")
        waiting += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def _is_ours(path: str) -> bool:
    try:
        return find_weakness(Path(path)) is None
    except OSError:
        return False


def main() -> None:
    """Wait, and do what was promised."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("promise-keeper")  # `killall python3` does not mean it
    promise = json.loads(io.FileIO(0, closefd=False).readline())
    os.write(1, b"ready\n")
    word = wait_for_word(promise["wait"])
    if not word:
        keep(promise, promise["commands"])
    elif word != b".":
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever listens hears that it ends here
        keep(promise, [promise["commands"][number] for number in json.loads(word)])


def keep(promise: dict[str, Any], commands: list[list[str]]) -> None:
    """Run the commands, and those that fail again if that was asked for."""
    if promise["again"]:
        detach()
    until = time.monotonic() + promise["again"]
    commands = run_all(promise, commands)
    with contextlib.suppress(OSError):
        os.write(1, b"kept\n")
    while commands and time.monotonic() < until:
        time.sleep(_PAUSE)
        commands = run_all(promise, commands)


def run_all(promise: dict[str, Any], commands: list[list[str]]) -> list[list[str]]:
    """Run commands, if nobody else may change what is trusted, and return those that have failed."""
    if not all(map(_is_ours, promise["trusted"])):
        return []
    return [argv for argv in commands if not run(argv, promise["limit"], promise["env"])]


def detach() -> None:
    """Go on as a process of which whoever waits for this one knows nothing."""
    with contextlib.suppress(OSError):
        if os.fork():
            os._exit(0)


if __name__ == "__main__":
    main()
