"""Maps of used blocks: parsing partclone's, and real ones of real file systems."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from remetal.errors import RemetalError
from remetal.events import Event, Warn
from remetal.image.extents import Extent, clip, parse_mapfile, probe_used, total
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted

HEAD = "# comment\n0x1000 ?\n# pos size status\n"


def test_finished_extents_are_joined_and_the_rest_is_left_out() -> None:
    text = HEAD + "0x0000 0x1000 +\n0x1000 0x1000 +\n0x2000 0x4000 ?\n0x6000 0x1000 +\n"
    assert parse_mapfile(text) == [Extent(0, 0x2000), Extent(0x6000, 0x1000)]


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "0x0 0x1000 ?\n",
        "0x1000 0x1000 +\n0x0 0x1000 +\n",
        "0x0 0x2000 +\n0x1000 0x1000 +\n",
        "nonsense\n",
        "0x0 -5 +\n",
        "0x00000000000000000000 0x1 +\n",
    ],
)
def test_a_map_that_makes_no_sense_is_refused(lines: str) -> None:
    with pytest.raises(RemetalError, match="map"):
        parse_mapfile(HEAD + lines)


def test_extents_are_cut_at_the_volume_end() -> None:
    assert list(clip([Extent(0, 10), Extent(20, 10), Extent(40, 5)], 25)) == [Extent(0, 10), Extent(20, 5)]


def test_unknown_content_is_used_as_a_whole(tmp_path: Path) -> None:
    assert probe_used(Span(tmp_path / "any", 512, 4096), "") == [Extent(0, 4096)]


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("ext2", ["mkfs.ext2", "-q", "-b", "1024"]),
        ("ext4", ["mkfs.ext4", "-q"]),
        ("vfat", ["mkfs.vfat", "-F", "32"]),
        ("xfs", ["mkfs.xfs", "-q"]),
    ],
)
def test_a_fresh_file_system_uses_little(tmp_path: Path, kind: str, make: list[str]) -> None:
    disk = tmp_path / "disk.img"
    size = 400 << 20
    with disk.open("wb") as file:
        file.truncate(size + 1024)
    with attach_loop(Span(disk, 1024, size), writable=True) as device:
        subprocess.run([*make, device], check=True, capture_output=True)
    extents = probe_used(Span(disk, 1024, size), kind)
    assert extents[0].start == 0
    assert all(a.end < b.start for a, b in zip(extents, extents[1:], strict=False))
    assert 0 < total(extents) < size // 3


def test_an_unclean_journal_means_that_everything_is_captured(tmp_path: Path) -> None:
    """A copy of a mounted file system whose journal holds changes: its free-block map may be a lie."""
    disk, copy = tmp_path / "disk.img", tmp_path / "copy.img"
    size = 64 << 20
    with disk.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    with attach_loop(Span(disk, 0, size), writable=True) as device, mounted(device) as folder:
        (folder / "file").write_bytes(b"x" * 100_000)
        subprocess.run(["sync", "-f", folder], check=True)
        subprocess.run(["dd", f"if={device}", f"of={copy}", "bs=1M", "status=none"], check=True)
    told: list[Event] = []
    assert probe_used(Span(copy, 0, size), "ext4", report=told.append) == [Extent(0, size)]
    assert any(isinstance(event, Warn) and "not unmounted cleanly" in event.text for event in told)
    assert total(probe_used(Span(disk, 0, size), "ext4")) < size // 3
