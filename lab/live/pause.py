"""For how long a file system is held still that somebody writes to all the time, on this host itself."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.disk import fresh_disk
from lab.live.program import Program
from remetal.system.mounts import mounted
from remetal.units import GIB, MIB

RATE = 50 * 10**6
"""Bytes a second that are written."""
_SIZE, _FILE = 3 * GIB, GIB
_WRITE = 64 * 1024


LEAST = 45 * 10**6
"""Bytes a second that have to be written at least, so that the measurement counts."""
LONGEST = 2.0
"""Seconds for which the file system may be held."""


@dataclass(frozen=True, slots=True)
class Held:
    """For how many seconds the file system was held, by backup, and how many bytes a second were written meanwhile."""

    pauses: tuple[float, ...]
    rate: float


def hold_while_written(work: Path, backups: int = 5) -> Held:
    """Back up an ext4 with a file of 1 GiB that is overwritten at random places at RATE, and made durable each second.

    Returns the pauses in ascending order. Raises CalledProcessError if a backup fails; AssertionError if the kernel did
    not tell what was written, fewer than LEAST bytes a second were, or the file system was held for LONGEST or more.
    """
    program = Program(work)
    with fresh_disk(work / "disk.img", _SIZE) as device, mounted(device) as folder:
        with (folder / "file").open("wb") as file:
            for _ in range(_FILE // MIB):
                file.write(os.urandom(MIB))
        with _writing(folder / "file") as written:
            began, before = time.monotonic(), written[0]
            words = ("backup", "--disk", device, "--json", "--quiet")
            told = [json.loads(program.run(*words)) for _ in range(backups)]
            rate = (written[0] - before) / (time.monotonic() - began)
    ways = [each["way"] for backup in told for each in backup["volumes"]]
    held = Held(tuple(sorted(each["pause"] for each in told)), rate)
    assert ways == ["tracked"] * backups, f"the file system was captured in other ways: {ways}"
    assert rate >= LEAST, f"only {rate:.0f} bytes a second were written"
    assert held.pauses[-1] < LONGEST, f"the file system was held for {held.pauses} seconds"
    return held


@contextmanager
def _writing(path: Path) -> Iterator[list[int]]:
    """Overwrite a file until the block is left, as fast as RATE allows; yields how many bytes were written so far."""
    ended = threading.Event()
    count = [0]

    def write() -> None:
        dice = random.Random(1)
        piece = os.urandom(_WRITE)
        began = synced = time.monotonic()
        with path.open("r+b", buffering=0) as file:
            while not ended.is_set():
                file.seek(dice.randrange(_FILE // 4096 - _WRITE // 4096) * 4096)
                count[0] += file.write(piece)
                if time.monotonic() - synced > 1:
                    os.fsync(file.fileno())
                    synced = time.monotonic()
                time.sleep(max(count[0] / RATE - (time.monotonic() - began), 0))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield count
    finally:
        ended.set()
        thread.join()
