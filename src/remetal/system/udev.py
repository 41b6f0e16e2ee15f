"""Keeping udev away from what we work on.

Where udev runs, its rules assemble arrays and activate volume groups as soon as a device with such content appears or
was written to. It leaves alone what somebody holds locked: it puts off what it has to do there. So nobody may wait for
it to be done (`udevadm settle`) while something is locked. Source: systemd's "Block Device Locking"
(https://systemd.io/BLOCK_DEVICE_LOCKING), flock(2).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remetal.errors import RefusedError

_PATIENCE = 10.0
"""Seconds: how long udev may be at work on a device before we give up."""


def lock_device(fd: int, path: Path, *, patience: float = _PATIENCE) -> None:
    """Lock an open block device until it is closed, so that udev passes it and its partitions over.

    Raises RefusedError if somebody else holds it locked for longer than `patience` seconds.
    """
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise RefusedError(
                    f"another program has locked {path}",
                    hint="Does an installer, a partitioner or another remetal work on it? Let it end first.",
                ) from error
            time.sleep(0.05)
        else:
            return


@contextmanager
def kept_from_udev(path: Path) -> Iterator[None]:
    """Hold a block device locked for the length of a block. Raises RefusedError if somebody else has it locked."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lock_device(fd, path)
        yield
    finally:
        os.close(fd)
