"""Restoring some volumes and leaving others alone: `--only`, `--keep`, `--protect`, through the program itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from remetal.system.blockdev import Span
from tests.commands.site import Site
from tests.real_disks import MIB, blank, fill, program, write

SCRIPT = """label: gpt
start=2048, size=40960, type=linux, name="first"
start=43008, size=40960, type=linux, name="second"
start=83968, size=40960, type=linux, name="third"
"""
FIRST, SECOND, THIRD = (Span(Path(), start * 512, 20 * MIB) for start in (2048, 43008, 83968))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = blank(tmp_path / "m.img", 64 * MIB)
    program("sfdisk", "-q", path, data=SCRIPT)
    for number, start in enumerate((2048, 43008), 1):
        fill(path, start, 40960, "mkfs.ext4", "-q", "-L", f"number{number}")
    write(path, THIRD.start, b"unknown content" * 1000)
    return path


def part(path: Path, span: Span) -> str:
    """Return the hash of a range of a disk file."""
    with path.open("rb") as file:
        file.seek(span.start)
        return hashlib.sha256(file.read(span.size)).hexdigest()


def spoil(path: Path) -> None:
    """Write over the middle of every partition."""
    for span in (FIRST, SECOND, THIRD):
        write(path, span.start + MIB, b"spoiled" * 100)


def test_only_one_volume_is_restored(site: Site, disk: Path) -> None:
    good = {span: part(disk, span) for span in (FIRST, SECOND, THIRD)}
    site.remetal("backup", "--disk", disk)
    spoil(disk)
    spoiled = {span: part(disk, span) for span in (FIRST, SECOND, THIRD)}
    site.remetal("restore", "latest", "--map", disk, "--only", "m.img:3", "--yes")
    assert part(disk, THIRD) == good[THIRD]
    assert [part(disk, FIRST), part(disk, SECOND)] == [spoiled[FIRST], spoiled[SECOND]]
    plan = site.remetal("plan", "latest", "--map", disk, "--only", "m.img:2", "--json").json
    assert {step["step"] for step in plan["steps"]} == {"clear-signatures", "write-image"}
    assert {fate["volume"]: fate["action"] for fate in plan["fates"]} == {
        "m.img:1": "kept",
        "m.img:2": "restored",
        "m.img:3": "kept",
    }


def test_a_kept_partition_is_not_touched(site: Site, disk: Path) -> None:
    good = {span: part(disk, span) for span in (FIRST, SECOND, THIRD)}
    site.remetal("backup", "--disk", disk)
    spoil(disk)
    kept = part(disk, THIRD)
    site.remetal("restore", "latest", "--map", disk, "--keep", "m.img:3", "--yes")
    assert [part(disk, FIRST), part(disk, SECOND)] == [good[FIRST], good[SECOND]]
    assert part(disk, THIRD) == kept
    program("e2fsck", "-fn", f"{disk}?offset={FIRST.start}")


def test_both_need_the_partitions_to_be_there(site: Site, disk: Path) -> None:
    site.remetal("backup", "--disk", disk)
    empty = blank(site.folder / "empty.img", 64 * MIB)
    for option in ("--only", "--keep"):
        said = site.remetal("restore", "latest", "--map", empty, option, "m.img:2", "--yes", code=3).err
        assert "does not have the partitions of the snapshot" in said
    assert not any(empty.read_bytes())
    assert "nothing on 'm.img:9'" in site.remetal("plan", "latest", "--map", disk, "--only", "m.img:9", code=2).err
    both = ("--only", "m.img:1", "--keep", "m.img:2")
    assert "exclude each other" in site.remetal("plan", "latest", "--map", disk, *both, code=2).err


def test_a_protected_disk_is_never_written(site: Site, disk: Path) -> None:
    site.remetal("backup", "--disk", disk)
    before = hashlib.sha256(disk.read_bytes()).hexdigest()
    link = site.folder / "another-name.img"
    link.symlink_to(disk)
    words = ("--map", disk, "--protect", link, "--overwrite", disk, "--yes")
    assert "was named with --protect" in site.remetal("restore", "latest", *words, code=3).err
    assert hashlib.sha256(disk.read_bytes()).hexdigest() == before
