"""Backups that are killed while they hold a file system still: how long it takes until somebody can write again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lab.disk import fresh_disk
from lab.live.program import Program
from remetal.system.mounts import mounted
from remetal.system.run import find_program
from remetal.system.watchdog import FIFREEZE, FITHAW
from remetal.units import MIB

KILLS = 20
LIMIT = 5.0
"""Seconds for which the backups may hold the file system."""
_SIZE = 64 * MIB
_WRITE = "import os, sys; file = open(sys.argv[1], 'wb'); file.write(b'x'); file.flush(); os.fsync(file.fileno())"


@dataclass(frozen=True, slots=True)
class Kills:
    """How many backups were killed, and the longest that a writer waited, in seconds: after that, and altogether."""

    count: int
    longest: float
    altogether: float


def kill_while_held(work: Path, seed: int) -> Kills:
    """Kill backups of a file system in use at random moments while they hold it, and write to it each time.

    Every other one is killed in the hold that counts, the rest in the one before it. Raises AssertionError if nothing
    was frozen when one was killed, or one that was killed is listed; TimeoutExpired if the file system was frozen for
    longer than LIMIT.
    """
    dice = random.Random(seed)
    longest, altogether = 0.0, 0.0
    program = Program(work, _make_slow(work))
    with fresh_disk(work / "disk.img", _SIZE) as device, mounted(device) as folder:
        for number in range(KILLS):
            (work / "hold").write_text(str(number % 2 + 1))
            killed, waited = _kill_one(program, work, device, folder, dice.uniform(0, LIMIT / 2))
            longest, altogether = max(longest, waited - killed), max(altogether, waited)
            assert json.loads(program.run("snapshots", "--json")) == [], (
                f"the backup that was killed as number {number}"
            )
        program.environment["PATH"] = os.environ["PATH"]
        program.run("backup", "--disk", device, "--quiet")
    return Kills(KILLS, longest, altogether)


def _kill_one(program: Program, work: Path, device: Path, folder: Path, after: float) -> tuple[float, float]:
    """Kill a backup some seconds after the file system was seen to be frozen.

    Returns when it was killed and when a writer that waited since then could write, in seconds after that.
    """
    begun = work / "begun"
    for each in (begun, work / "looks"):
        each.unlink(missing_ok=True)
    with program.start("backup", "--disk", device, "--freeze-limit", str(LIMIT)) as process:
        while not begun.exists():
            assert process.poll() is None, "the backup ended before it held anything"
            time.sleep(0.01)
        seen = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", _WRITE, folder / "after"]) as writer:
            time.sleep(after)
            _need_frozen(folder)
            process.kill()
            killed = time.monotonic() - seen
            try:
                code = writer.wait(seen + LIMIT - time.monotonic())
            except subprocess.TimeoutExpired:
                writer.kill()
                raise
            waited = time.monotonic() - seen
    assert code == 0, "the writer failed"
    return killed, waited


def _need_frozen(folder: Path) -> None:
    """Raise AssertionError if a file system is not frozen: then the kernel would let us freeze it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, FIFREEZE, 0)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
    else:
        fcntl.ioctl(fd, FITHAW, 0)
        raise AssertionError("the file system was not frozen when the backup was to be killed")
    finally:
        os.close(fd)


def _make_slow(work: Path) -> Path:
    """Return a folder with a dumpe2fs that takes longer than the limit, and tells when it has begun to.

    It does so in the hold of the number that stands in a file. The first look is before any of them.
    """
    tools = work / "tools"
    tools.mkdir()
    slow = tools / "dumpe2fs"
    slow.write_text(
        f"#!/bin/sh\ncd {work}; echo >> looks\n"
        f"[ $(wc -l < looks) != $(($(cat hold) + 1)) ] || {{ : > begun; sleep {2 * LIMIT}; }}\n"
        f'exec {find_program("dumpe2fs")} "$@"\n'
    )
    slow.chmod(0o755)
    return tools
