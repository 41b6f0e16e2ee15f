"""Runs in a kernel that frees what an XFS has set aside behind a file's end when anybody closes it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
import time
from pathlib import Path

from remetal.image.leftout import Omission, Place
from remetal.image.ranges import Extent
from remetal.system.watchdog import FIFREEZE, FITHAW
from remetal.units import MIB

DEVICE = "/dev/ubda"
SIZE = 1400 * MIB
HELD = 4.0


def prove(files: int, *, given_up: bool) -> None:
    """Look at files on a frozen XFS that are written to: it takes no time, and they are left out, or given up."""
    folder = Path("/run/xfs")
    folder.mkdir()
    subprocess.run(["mkfs.xfs", "-q", DEVICE], check=True)
    subprocess.run(["mount", "-t", "xfs", DEVICE, folder], check=True)
    for number in range(files):
        writer = os.open(folder / str(number), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for _ in range(9):
            os.write(writer, bytes(65536))
        os.fsync(writer)  # some of what lies behind its end is set aside for more
    omission = Omission(folder.stat().st_dev, 4096, [Place(folder, folder, ".")])
    root = os.open(folder, os.O_RDONLY)
    fcntl.ioctl(root, FIFREEZE, 0)
    threading.Timer(HELD, lambda: fcntl.ioctl(root, FITHAW, 0)).start()
    began = time.monotonic()
    omission.take_from([Extent(0, SIZE)], held=True)
    assert time.monotonic() - began < HELD / 2
    assert (omission.places == []) == (omission.sizes == {}) == given_up
    closed = threading.Thread(target=lambda: os.close(os.open(folder / "1", os.O_RDONLY)))
    closed.start()
    omission = Omission(folder.stat().st_dev, 4096, [Place(folder, folder, ".")])
    omission.take_from([Extent(0, SIZE)], held=True)
    assert time.monotonic() - began < HELD / 2
    assert omission.sizes == {}, "of a file that somebody else closes now the kernel does not even tell where it lies"
    assert closed.is_alive(), "whoever closes a file waits on this kernel"
    closed.join()
    while len(list(Path("/proc/self/fd").iterdir())) > files + 10:
        assert time.monotonic() - began < 60
        time.sleep(0.1)
