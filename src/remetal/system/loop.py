"""A span as a block device of its own, for programs that cannot take an offset."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remetal.errors import RefusedError
from remetal.system.blockdev import Span, is_block_device, probe_geometry
from remetal.system.run import run


@contextmanager
def attach_loop(span: Span, *, writable: bool = False) -> Iterator[Path]:
    """Attach a loop device to a span and yield the device's path; detached when the block is left.

    Works for spans of regular files and of block devices, and needs no partition scanning. The device is
    read-only unless `writable`. Needs root. Raises RefusedError if the span is empty or leaves its disk: the kernel
    would quietly attach something else.
    """
    disk = probe_geometry(span.path).size
    if span.start < 0 or span.size <= 0 or span.start + span.size > disk:
        raise RefusedError(
            f"{span.size} bytes at byte {span.start} are not a part of {span.path}, which has {disk} bytes"
        )
    argv = ["losetup", "--find", "--show", "--offset", str(span.start), "--sizelimit", str(span.size)]
    device = Path(run([*argv, *([] if writable else ["--read-only"]), span.path]).text.strip())
    try:
        yield device
    finally:
        if writable:
            _sync(device)
        run(["losetup", "--detach", device])


@contextmanager
def open_device(span: Span, *, writable: bool = False) -> Iterator[Path]:
    """Yield a path that programs can use as the device of this span: the disk itself if the span is all of it."""
    whole = span.start == 0 and is_block_device(span.path)
    if whole and span.size == probe_geometry(span.path).size:
        yield span.path
        return
    with attach_loop(span, writable=writable) as device:
        yield device


def _sync(device: Path) -> None:
    fd = os.open(device, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def probe_written(device: Path) -> int:
    """Return the bytes that the kernel has written to a block device so far (Documentation/block/stat.rst)."""
    return int(Path("/sys/class/block", device.name, "stat").read_text().split()[6]) * 512
