"""A span as a block device of its own, for programs that cannot take an offset."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remetal.errors import RefusedError
from remetal.system.blockdev import Span, is_block_device, probe_geometry
from remetal.system.run import ProgramFailedError, run
from remetal.system.udev import lock_device

_SECTOR = 512
_TRIES = 20
"""How often somebody else may take the free loop device that we were about to use."""
_MOMENT = 0.5
"""For how many seconds udev may look at a device that was free."""
_SYS_ADMIN = 21
"""The number of CAP_SYS_ADMIN (capabilities(7), <linux/capability.h>)."""


def need_loops() -> None:
    """Raise RefusedError unless this process may attach loop devices and mount."""
    found = re.search(r"^CapEff:\s+([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None or not int(found[1], 16) >> _SYS_ADMIN & 1:
        raise RefusedError(
            "looking into file systems needs the rights of root, which remetal does not have here",
            hint="Run the same command with sudo; in a container, one that is allowed to mount.",
        )


@contextmanager
def attach_loop(span: Span, *, writable: bool = False) -> Iterator[Path]:
    """Attach a loop device to a span and yield the device's path; detached when the block is left.

    The kernel itself detaches it when nobody has it open any more, so that none is left behind if we are killed. It is
    locked from before it shows anything, so that udev does not activate what is on it.
    Works for spans of regular files and of block devices, and needs no partition scanning. The device is
    read-only unless `writable`. Needs root. Raises RefusedError if the span is empty or leaves its disk: the kernel
    would quietly attach something else.
    """
    need_loops()
    disk = probe_geometry(span.path).size
    if span.start < 0 or span.size <= 0 or span.start + span.size > disk:
        raise RefusedError(
            f"{span.size} bytes at byte {span.start} are not a part of {span.path}, which has {disk} bytes"
        )
    device, fd = _attach(span, writable)
    try:
        run(["losetup", "--detach", device])  # takes effect at the last close (loop(4), LO_FLAGS_AUTOCLEAR)
        yield device
        if writable:
            os.fsync(fd)
    finally:
        os.close(fd)


def _attach(span: Span, writable: bool) -> tuple[Path, int]:
    """Attach a free loop device to a span; return its path and our descriptor of it, which is locked."""
    options = ["--offset", str(span.start), "--sizelimit", str(span.size), *([] if writable else ["--read-only"])]
    sector = probe_geometry(span.path).logical_sector
    if sector != _SECTOR and span.start % sector == 0 and span.size % sector == 0:
        options += ["--sector-size", str(sector)]  # what is made on it must fit the disk itself
    for attempt in range(_TRIES):
        device = Path(run(["losetup", "--find"]).text.strip())
        fd = os.open(device, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            lock_device(fd, device, patience=_MOMENT)
            run(["losetup", *options, device, span.path])
        except BaseException as error:
            os.close(fd)
            busy = isinstance(error, ProgramFailedError) and "busy" in error.stderr
            taken = busy or isinstance(error, RefusedError)  # locked: somebody is about to attach something to it
            if not taken or attempt == _TRIES - 1:
                raise
        else:
            return device, fd
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def open_device(span: Span, *, writable: bool = False) -> Iterator[Path]:
    """Yield a path that programs can use as the device of this span: the disk itself if the span is all of it."""
    whole = span.start == 0 and is_block_device(span.path)
    if whole and span.size == probe_geometry(span.path).size:
        yield span.path
        return
    with attach_loop(span, writable=writable) as device:
        yield device
