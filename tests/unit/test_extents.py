"""Maps of used blocks: parsing partclone's, and real ones of real file systems."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from remetal.errors import RemetalError
from remetal.events import Event, Warn
from remetal.image.extents import clip, parse_ext_map, parse_xfs_map, probe_used, total
from remetal.image.ranges import Extent, Extents
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted


def parse_partclone(text: str) -> set[int]:
    """Return the numbers of the 512-byte sectors that partclone's map (ddrescue's format) says are used."""
    sectors: set[int] = set()
    for line in [line for line in text.splitlines() if not line.startswith("#")][1:]:
        start, size, state = line.split()
        if state == "+":
            first = int(start, 16)
            sectors.update(range(first // 512, (first + int(size, 16)) // 512))
    return sectors


def probe_partclone(program: str, place: Span, folder: Path) -> set[int]:
    """Return the used sectors as partclone, an independent reader of file systems, sees them."""
    with attach_loop(place) as device:
        argv: list[str | Path] = [
            program,
            "-D",
            "-s",
            device,
            "-o",
            folder / "map",
            "--offset_domain=0",
            "-L",
            folder / "log",
        ]
        subprocess.run(argv, check=True, capture_output=True)
    return parse_partclone((folder / "map").read_text())


def sectors_of(extents: Sequence[Extent]) -> set[int]:
    """Return the numbers of the 512-byte sectors in extents."""
    return {sector for each in extents for sector in range(each.start // 512, each.end // 512)}


EXT_HEAD = "Block count:              100\nFree blocks:              {free}\nBlock size:               1024\n"
XFS_HEAD = "blocksize = 4096\ndblocks = 100\nagblocks = 50\nfdblocks = {free}\n    agno    agbno      len\n"


def test_what_is_not_free_is_used() -> None:
    text = EXT_HEAD.format(free=13) + "  Free blocks: 10-19, 30\n  Free blocks: \n  Free blocks: 98-99\n"
    assert parse_ext_map(text.splitlines()) == [Extent(0, 10240), Extent(20480, 10240), Extent(31744, 68608)]
    rows = "       0        6        4\n       0        1        1\n       1        0        5\n"
    found = parse_xfs_map((XFS_HEAD.format(free=10) + rows).splitlines())
    assert found == [
        Extent(0, 4096),
        Extent(2 * 4096, 4 * 4096),
        Extent(10 * 4096, 40 * 4096),
        Extent(55 * 4096, 45 * 4096),
    ]


@pytest.mark.parametrize(
    "lines",
    ["  Free blocks: 10-8\n", "  Free blocks: 10-19, 15\n", "  Free blocks: 95-100\n", "  Free blocks: 10-29\n"],
)
def test_an_ext_map_that_makes_no_sense_is_refused(lines: str) -> None:
    with pytest.raises(RemetalError, match="free"):
        parse_ext_map((EXT_HEAD.format(free=12) + lines).splitlines())


@pytest.mark.parametrize(
    "rows", ["       0       48        4\n       1        1        4\n", "       2        0        1\n"]
)
def test_an_xfs_map_that_makes_no_sense_is_refused(rows: str) -> None:
    with pytest.raises(RemetalError, match="free"):
        parse_xfs_map((XFS_HEAD.format(free=50) + rows).splitlines())


def test_very_many_extents_are_kept_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remetal.image.ranges.WAITING", 10)
    for count in (0, 1, 9, 10, 11, 20, 35):
        plain = [Extent(100 * number, 1 + number) for number in range(count)]
        extents = Extents(plain)
        assert extents == plain
        assert list(extents) == plain
        assert [extents[number] for number in range(count)] == plain
        assert extents[3:25:4] == plain[3:25:4]
        assert extents != [*plain, Extent(10_000, 1)]
        with pytest.raises(IndexError):
            extents[count]


def test_a_map_without_sizes_is_refused() -> None:
    for parse in (parse_ext_map, parse_xfs_map):
        with pytest.raises(RemetalError, match="size"):
            parse([])


def test_extents_are_cut_at_the_volume_end() -> None:
    assert list(clip([Extent(0, 10), Extent(20, 10), Extent(40, 5)], 25)) == [Extent(0, 10), Extent(20, 5)]


def test_unknown_content_is_used_as_a_whole(tmp_path: Path) -> None:
    assert probe_used(Span(tmp_path / "any", 512, 4096), "") == [Extent(0, 4096)]


@pytest.mark.parametrize(
    ("kind", "make", "program"),
    [
        ("ext2", ["mkfs.ext2", "-q", "-b", "1024"], "partclone.extfs"),
        ("ext3", ["mkfs.ext3", "-q"], "partclone.extfs"),
        ("ext4", ["mkfs.ext4", "-q"], "partclone.extfs"),
        ("ext4", ["mkfs.ext4", "-q", "-O", "^flex_bg,^64bit,meta_bg,^resize_inode", "-b", "2048"], "partclone.extfs"),
        ("xfs", ["mkfs.xfs", "-q"], "partclone.xfs"),
        ("xfs", ["mkfs.xfs", "-q", "-m", "rmapbt=1,reflink=1", "-b", "size=1024"], "partclone.xfs"),
    ],
)
def test_used_blocks_are_those_that_an_independent_reader_finds(
    tmp_path: Path, kind: str, make: list[str], program: str
) -> None:
    """The volume is aged: files were made, cut, and deleted, so that free space is in many pieces."""
    size = 320 << 20
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(size + 1024)
    place = Span(disk, 1024, size)
    with attach_loop(place, writable=True) as device:
        subprocess.run([*make, device], check=True, capture_output=True)
        with mounted(device) as folder:
            age(folder)
    extents = probe_used(place, kind)
    assert extents[0].start == 0
    assert all(a.end < b.start for a, b in pairwise(extents))
    assert len(extents) > 10
    ours, theirs = sectors_of(extents), probe_partclone(program, place, tmp_path)
    assert theirs <= ours
    assert len(ours) <= len(theirs) * 1.01


def age(folder: Path) -> None:
    """Make, cut and delete files until free space is in pieces."""
    chance = random.Random(3)
    for number in range(400):
        (folder / f"file-{number}").write_bytes(chance.randbytes(chance.randrange(200_000)))
    for number in chance.sample(range(400), 250):
        path = folder / f"file-{number}"
        if number % 3:
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2)
    with (folder / "sparse").open("wb") as file:
        file.truncate(50 << 20)
        file.seek(20 << 20)
        file.write(b"island")


@pytest.mark.parametrize(("bits", "megabytes"), [(12, 8), (16, 60), (32, 80)])
def test_used_clusters_are_all_that_a_fat_needs(tmp_path: Path, bits: int, megabytes: int) -> None:
    """Only the used bytes are copied onto garbage; mtools and fsck.vfat then find every file. Not held against
    partclone, whose map of a FAT12 leaves out clusters of files.
    """
    disk, copy = tmp_path / "disk.img", tmp_path / "copy.img"
    size = megabytes << 20
    with disk.open("wb") as file:
        file.truncate(size)
    clusters = "1" if bits == 32 else "8"
    subprocess.run(["mkfs.vfat", "-F", str(bits), "-s", clusters, disk], check=True, capture_output=True)
    chance = random.Random(bits)
    for number in range(30):
        source = tmp_path / f"file-{number}"
        source.write_bytes(chance.randbytes(chance.randrange(100_000)))
        subprocess.run(["mcopy", "-i", disk, source, "::"], check=True)
    for number in range(0, 30, 3):
        subprocess.run(["mdel", "-i", disk, f"::file-{number}"], check=True)
    extents = probe_used(Span(disk, 0, size), "vfat")
    assert len(extents) > 5
    copy.write_bytes(chance.randbytes(size))
    with disk.open("rb") as source_file, copy.open("r+b") as target_file:
        for each in extents:
            source_file.seek(each.start)
            target_file.seek(each.start)
            target_file.write(source_file.read(each.size))
    told = subprocess.run(["fsck.vfat", "-n", copy], check=True, capture_output=True, text=True).stdout
    used_clusters = int(told.rsplit(", ", 1)[1].split("/")[0])
    free_of_files = extents[0].size
    assert total(extents) - free_of_files == used_clusters * int(clusters) * 512
    for number in set(range(30)) - set(range(0, 30, 3)):
        subprocess.run(["mcopy", "-n", "-i", f"{copy}", f"::file-{number}", f"{tmp_path}/back"], check=True)
        assert (tmp_path / "back").read_bytes() == (tmp_path / f"file-{number}").read_bytes()
        (tmp_path / "back").unlink()


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
