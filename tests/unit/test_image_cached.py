"""What the kernel keeps of a disk while its maps are looked at: what was written is dropped, the rest stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.disk import fresh_disk
from remetal.image.cached import CachedMaps
from remetal.system.blockdev import Span, flush_cache, open_disk
from remetal.system.loop import attach_loop
from remetal.units import KIB, MIB

SIZE = 16 * MIB


@pytest.mark.parametrize("start", [0, 63 * 512, MIB])
def test_what_was_written_is_dropped_and_the_rest_stays(start: int, tmp_path: Path) -> None:
    """A loop device does not see what is written to its file, as a disk does not see what is to its partition."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"old!" * (SIZE // 4))
    grain = 256 * KIB
    with attach_loop(Span(path, 0, SIZE)) as device:
        span = Span(device, start, SIZE - MIB)
        maps = CachedMaps({"sda:1": (span, "vfat")})

        def read(at: int) -> bytes:
            with open_disk(device) as disk:
                return disk.read(at, 4)

        assert all(read(at) == b"old!" for at in range(0, SIZE, 4 * KIB))
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, b"new!" * (SIZE // 4), 0)
        os.fsync(fd)
        os.close(fd)
        assert read(start + 9 * grain) == b"old!", "the kernel has looked by itself"
        maps.note({"sda:1": {9}}, grain)
        maps.drop_stale("sda:1")
        first, last = start + 9 * grain, start + 10 * grain - 4
        assert {read(at) for at in (first, first + 64 * KIB, last)} == {b"new!"}
        assert read(start) == read(SIZE - 4 * KIB) == b"old!", "more was dropped than had to be"
        maps.drop_stale("sda:1")
        assert read(start) == b"old!"


def test_a_map_that_was_read_before_is_read_from_memory(tmp_path: Path) -> None:
    """As long as anybody has the disk open, which a mounted file system has."""
    with fresh_disk(tmp_path / "disk.img", 400 * MIB) as device, open_disk(device):
        maps = CachedMaps({"sda:1": (Span(device, 0, 400 * MIB), "ext4")})
        statistics = Path("/sys/class/block") / device.name / "stat"

        def fill() -> int:
            before = int(statistics.read_text().split()[0])
            maps.fill()
            return int(statistics.read_text().split()[0]) - before

        flush_cache(device)
        assert fill() > 0
        assert fill() == 0
