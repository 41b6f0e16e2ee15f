"""The picture of a plan: to scale, complete, and as wide as it may be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remetal.cli.picture import Block, draw_bar, draw_plan, find_blocks
from remetal.layout.model import Disk, FileSystem, GptTable, Layout, Luks, Partition, Swap
from remetal.layout.plan import ImageFacts, PlanOptions, Target, plan_restore

MIB = 1 << 20
GUID = "12345678-1234-4234-8234-1234567890AB"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def layout() -> Layout:
    """A disk of 400 MiB: free space in front, ext4, encrypted ext4, swap."""
    places = ((1, 40, 160), (2, 200, 160), (3, 360, 39))
    partitions = tuple(
        Partition(number=number, start=start * MIB, size=size * MIB, type=LINUX, uuid=GUID)
        for number, start, size in places
    )
    table = GptTable(on="sda", disk_guid=GUID, entry_count=128, partitions=partitions, protective_mbr=bytes(512))
    plain = FileSystem(on="sda:1", type="ext4", size=160 * MIB, used=MIB, block_size=4096)
    luks = Luks(
        on="sda:2", version=2, uuid="u", header_size=16 * MIB, size=144 * MIB, key_size=64, cipher="aes-xts-plain64"
    )
    inner = FileSystem(on="sda:2:luks", type="xfs", size=144 * MIB, used=MIB, block_size=4096)
    swap = Swap(on="sda:3", size=39 * MIB)
    return Layout(disks=(Disk(name="sda", size=400 * MIB),), layers=(table, plain, luks, inner, swap))


def test_blocks_are_what_lies_on_the_disk() -> None:
    assert [(block.label, block.size // MIB) for block in find_blocks(layout(), "sda")] == [
        ("", 40),
        ("1 ext4", 160),
        ("2 LUKS xfs", 160),
        ("3 swap", 39),
        ("", 1),
    ]


def test_a_plan_shows_source_and_target_to_one_scale() -> None:
    source = layout()
    images = {
        each.volume: ImageFacts(size=source.place(each.volume)[2], used=1, digest="d") for each in source.captured()
    }
    target = Target(path="/dev/sdb", name="sdb", size=800 * MIB)
    plan = plan_restore(source, images, {"sda": target}, snapshot="s", options=PlanOptions(grow=("sda:2:luks",)))
    above, below = draw_plan(source, plan, 120)
    assert max(len(above), len(below)) <= 120
    assert "400 MiB" in above
    assert "800 MiB" in below
    bars = [line[line.index("|") :] for line in (above, below)]
    assert abs(2 * len(bars[0]) - len(bars[1])) <= 2, "twice the size is twice as wide"
    assert all(word in bars[0] for word in ("1 ext4", "2 LUKS xfs", "3", "..."))
    parts = [len(part) for part in bars[1].strip("|").split("|")]
    assert max(parts) == parts[2], "what grew is the widest"
    assert "\x1b" not in above + below


@given(
    st.lists(st.builds(Block, st.sampled_from(["", "1 ext4", "2"]), st.integers(1, 1 << 44)), min_size=1, max_size=40),
    st.integers(4, 200),
)
def test_a_bar_holds_every_block_and_keeps_its_width(blocks: list[Block], width: int) -> None:
    bar = draw_bar(blocks, width)
    assert len(bar) == max(width, 2 * len(blocks) + 1)
    assert len(bar.strip("|").split("|")) == len(blocks)
