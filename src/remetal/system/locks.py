"""Locks between processes of one host."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remetal.errors import UnavailableError


@contextmanager
def held_lock(path: Path, *, what: str) -> Iterator[None]:
    """Hold an exclusive lock on the file at `path` for the length of a block; the kernel frees it if we die.

    `what` names the guarded thing in the error. Raises UnavailableError at once if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(fd, 64, 0).decode("ascii", "replace").strip() or "unknown"
            raise UnavailableError(
                f"another remetal (process {owner}) is at work on {what}",
                hint="Wait until it has ended, then run the command again.",
            ) from error
        os.truncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)
