"""What only its own system opens: carried byte for byte, and never onto sectors that it is known not to work on."""

from __future__ import annotations

from pathlib import Path

import pytest

from remetal.errors import RefusedError
from remetal.layout.layers import raw
from remetal.layout.layers.contract import Content
from remetal.layout.model import Disk, Layout, Raw
from remetal.layout.plan import Plan, PlanOptions, Target, plan_restore
from remetal.layout.probe import probe_layout
from remetal.layout.steps import ImageFacts
from remetal.system.blockdev import Span
from remetal.units import MIB
from tests.real_disks import blank, program


@pytest.mark.parametrize("sector", [512, 4096])
def test_the_sectors_of_a_bcache_are_read_from_it(sector: int, tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 32 * MIB)
    program("make-bcache", f"--block={sector}", "--bucket=64k", "--bdev", disk)
    found = probe_layout([disk]).layer_on("a.img")
    assert isinstance(found, Raw)
    assert (found.type, found.sector) == ("bcache", sector)


def test_the_sectors_of_a_bitlocker_are_read_from_it() -> None:
    boot = b"\xeb\x58\x90-FVE-FS-" + (4096).to_bytes(2, "little") + bytes(499)
    content = Content("sda:1", Span(Path("/none"), 0, MIB), lambda place, size: boot[place : place + size], "BitLocker")
    assert raw.probe_volume(content).sector == 4096


@pytest.mark.parametrize("stored", [b"", b"\0\0", b"\x01\x00", b"\xff\xff"])
def test_impossible_sectors_count_as_unknown(stored: bytes) -> None:
    content = Content("sda", Span(Path("/none"), 0, MIB), lambda place, size: stored, "BitLocker")
    assert raw.probe_volume(content).sector == 0


def test_what_blkid_says_becomes_plain_words() -> None:
    span = Span(Path("/none"), 0, MIB)
    content = Content("sda", span, lambda place, size: bytes(size), "-rf $(x)\n", uuid="--12;34")
    assert raw.probe_volume(content) == Raw(on="sda", size=MIB, type="-rf___x__", uuid="1234")


def plan(volume: Raw, sector: int) -> Plan:
    layout = Layout(disks=(Disk(name="sda", size=volume.size),), layers=(volume,))
    target = Target(path="/t/sda", name="sda", size=volume.size, logical_sector=sector)
    images = {"sda": ImageFacts(size=volume.size, used=1, digest="d", image="")}
    return plan_restore(layout, images, {"sda": target}, snapshot="s", options=PlanOptions())


def test_it_is_not_restored_onto_sectors_that_it_does_not_open_on() -> None:
    small = Raw(on="sda", size=64 * MIB, type="bcache", sector=512)
    with pytest.raises(RefusedError, match="the bcache on sda cannot lie on a disk with sectors of 4096 bytes"):
        plan(small, 4096)
    assert not plan(small, 512).notes
    assert not plan(Raw(on="sda", size=64 * MIB, type="bcache", sector=4096), 4096).notes


def test_the_plan_says_where_nobody_knows() -> None:
    pool = Raw(on="sda", size=64 * MIB, type="zfs_member")
    assert any("whether it opens there only its own system knows" in note for note in plan(pool, 4096).notes)
    assert not plan(pool, 512).notes
