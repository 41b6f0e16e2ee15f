"""Locks between processes of one host."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from remetal.errors import UnavailableError


@contextmanager
def held_lock(path: Path, *, what: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the file at `path` for the length of a block; the kernel frees it if we die.

    `what` names the guarded thing in what is said. If another process holds it: raises UnavailableError at once, or
    with `waiting` tells it who that is and waits. Raises UnavailableError too if the place takes no lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _no_lock(path, error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(fd, 64, 0).decode("ascii", "replace").strip() or "unknown"
            said = f"another remetal (process {owner}) is at work on {what}"
            if waiting is None:
                raise UnavailableError(said, hint="Wait until it has ended, then run the command again.") from error
            waiting(said)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            raise _no_lock(path, error) from error
        with suppress(OSError):  # the number is only told to others; a full disk must not stop a restore
            os.truncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def process_start(pid: int) -> int | None:
    """Return when a process started, in ticks after boot; 0 if it is gone or a zombie, None if that cannot be told."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except OSError:  # such as no descriptor left: that does not make anybody dead
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in {"Z", "X"} else 0


def _no_lock(path: Path, error: OSError) -> UnavailableError:
    return UnavailableError(
        f"cannot lock {path}: {os.strerror(error.errno or 0)}", hint="Make that folder writable, or choose another."
    )
