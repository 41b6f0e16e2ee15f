"""What the storage ring does with f2fs inside a kernel that has it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from lab.manifest import compare_manifests, take_manifest
from remetal.events import Event, Warn
from remetal.image.extents import probe_used
from remetal.image.ranges import Extent
from remetal.layout.layers import f2fs as layer
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from tests.storage.aging import copy_extents

SIZE = 64 << 20


def restore_onto_a_later_state(folder: Path) -> None:
    """What was written and synced after the backup must not come back, though its blocks are free in the backup.

    Kept apart by the one free block that the map calls used: without it, the kernel finds the newer files' nodes.
    """
    disk, backup = Span(_make(folder / "disk.img"), 0, SIZE), Span(folder / "backup.img", 0, SIZE)
    with attach_loop(disk, writable=True) as device, mounted(device) as root:
        for number in range(20):
            (root / f"{number}").write_bytes(os.urandom(30_000))
        (root / "changed").write_bytes(b"before" * 5000)
    subprocess.run(["cp", disk.path, backup.path], check=True)
    used = probe_used(backup, "f2fs")
    with attach_loop(backup) as device, mounted(device, options=("ro",)) as root:
        before = take_manifest(os.fspath(root))
    later = Span(folder / "later.img", 0, SIZE)
    with attach_loop(disk, writable=True) as device, mounted(device) as root:
        for name in ("changed", "new"):
            with (root / name).open("wb") as file:
                file.write(b"after!" * 9000)
                os.fsync(file.fileno())
        _copy(device, later.path)
    copy_extents(backup, later, used)
    with attach_loop(later, writable=True) as device, mounted(device) as root:
        differences = compare_manifests(before, take_manifest(os.fspath(root)))
    assert not differences, differences


def copy_while_mounted(folder: Path) -> None:
    """A copy of a mounted file system is captured whole, which is reported.

    It is so after a checkpoint that says that nobody unmounted it, and when a file was synced after one that says that
    somebody did.
    """
    disk, copy = Span(_make(folder / "disk.img"), 0, SIZE), Span(folder / "copy.img", 0, SIZE)
    for sync in ("fsync", "sync"):
        with attach_loop(disk, writable=True) as device, mounted(device) as root:
            with (root / sync).open("wb") as file:
                file.write(b"content" * 20_000)
                os.fsync(file.fileno())
            if sync == "sync":
                subprocess.run(["sync", "-f", root], check=True)
            _copy(device, copy.path)
        told: list[Event] = []
        assert probe_used(copy, "f2fs", report=told.append) == [Extent(0, SIZE)], sync
        assert any(isinstance(event, Warn) and "not unmounted cleanly" in event.text for event in told)
        assert probe_used(disk, "f2fs") != [Extent(0, SIZE)]


def grow_what_was_not_unmounted(folder: Path) -> None:
    """What was synced after the last checkpoint is kept."""
    size = 2 * SIZE
    disk, copy = Span(_make(folder / "disk.img", size), 0, size), Span(folder / "copy.img", 0, 2 * size)
    with attach_loop(disk, writable=True) as device, mounted(device) as root:
        with (root / "file").open("wb") as file:
            file.write(b"content" * 20_000)
            os.fsync(file.fileno())
        _copy(device, copy.path)
    with copy.path.open("r+b") as file:
        file.truncate(2 * size)
    assert layer.apply_growth(copy, 2 * size) > 0
    with attach_loop(copy) as device, mounted(device, options=("ro",)) as root:
        assert (root / "file").read_bytes() == b"content" * 20_000
        assert os.statvfs(root).f_blocks * 4096 > 1.7 * size


def _make(path: Path, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.f2fs", "-q", path], check=True, capture_output=True)
    return path


def _copy(device: Path, to: Path) -> None:
    """Copy what is on a device now, whatever the kernel still holds back."""
    subprocess.run(["dd", f"if={device}", f"of={to}", "bs=1M", "iflag=direct", "status=none"], check=True)
