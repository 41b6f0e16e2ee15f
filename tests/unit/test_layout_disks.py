"""Real disk files are probed, planned onto other disk files, and the result is what the file systems' own
programs find sound."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import msgspec.structs
import pytest

from remetal.errors import RefusedError
from remetal.events import Event, Note, Warn
from remetal.layout.model import FileSystem, GptTable, Layout, MbrTable, Raw, Swap, spaces_of
from remetal.layout.plan import Plan, PlanOptions, plan_restore
from remetal.layout.probe import probe_layout
from remetal.layout.record import decode_layout, encode_layout
from remetal.layout.targets import probe_target
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from tests.real_disks import (
    MIB,
    Source,
    blank,
    fill,
    make_gpt_disk,
    make_mbr_disk,
    program,
    write,
)

KEEP, GROW = PlanOptions(keep_sizes=True), PlanOptions()


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = make_gpt_disk(tmp_path_factory.mktemp("gpt") / "gpt.img")
    return Source(path, probe_layout([path]))


@pytest.fixture(scope="module")
def mbr(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = make_mbr_disk(tmp_path_factory.mktemp("mbr") / "mbr.img")
    return Source(path, probe_layout([path]))


def plan_onto(source: Source, target: Path, options: PlanOptions = GROW) -> Plan:
    disk = source.layout.disks[0]
    found = probe_target(target, size_if_missing=disk.size)
    return plan_restore(
        source.layout, source.images(), {disk.name: found}, snapshot="s", options=options, overwrite=[found.path]
    )


def sfdisk(path: Path) -> list[dict[str, Any]]:
    table: dict[str, Any] = json.loads(program("sfdisk", "--json", path))["partitiontable"]
    for partition in table["partitions"]:
        partition["node"] = partition["node"].removeprefix(str(path))
    return [{"id": table["id"]}, *table["partitions"]]


def blkid(path: Path, start: int, size: int) -> dict[str, str]:
    lines = program("blkid", "-p", "-o", "export", "-O", str(start), "-S", str(size), path).splitlines()
    return dict(line.split("=", 1) for line in lines)


def differing_bytes(source: Source, target: Path) -> set[int]:
    """Return the KiB in which two disks differ, but for swap space, which is made anew."""
    (swap,) = (each for each in source.layout.volumes() if isinstance(each, Swap))
    _, start, size = source.layout.place(swap.on)
    before, after = source.path.read_bytes(), target.read_bytes()
    return {
        place // 1024
        for place in range(0, len(before), 1024)
        if before[place : place + 1024] != after[place : place + 1024] and not start <= place < start + size
    }


def check_file_systems(path: Path, layout: Layout) -> None:
    """Let every file system's own program find it sound."""
    checks = {"xfs": ["xfs_repair", "-n"], "vfat": ["fsck.vfat", "-n"]}
    for volume in layout.volumes():
        if isinstance(volume, FileSystem):
            _, start, size = layout.place(volume.on)
            with attach_loop(Span(path, start, size)) as device:
                program(*checks.get(volume.type, ["e2fsck", "-fn"]), device)


def test_gpt_disk_is_described_as_sfdisk_and_blkid_do(gpt: Source) -> None:
    table = gpt.layout.layer_on("gpt.img")
    assert isinstance(table, GptTable)
    known = sfdisk(gpt.path)
    assert table.disk_guid == known[0]["id"]
    for partition, other in zip(table.partitions, known[1:], strict=True):
        assert (partition.start, partition.size) == (other["start"] * 512, other["size"] * 512)
        assert (partition.type, partition.uuid, partition.name) == (other["type"], other["uuid"], other["name"])
    kinds = {spaces_of(layer)[0]: getattr(layer, "type", type(layer).__name__) for layer in gpt.layout.layers}
    assert kinds == {
        "gpt.img": "GptTable",
        "gpt.img:1": "",
        "gpt.img:2": "vfat",
        "gpt.img:3": "ext2",
        "gpt.img:4": "",
        "gpt.img:5": "ext4",
        "gpt.img:6": "Swap",
    }
    for volume in gpt.layout.volumes():
        if isinstance(volume, (FileSystem, Swap)):
            _, start, size = gpt.layout.place(volume.on)
            said = blkid(gpt.path, start, size)
            assert (volume.uuid, volume.label) == (said["UUID"], said.get("LABEL", ""))
            assert volume.size == size


def test_mbr_disk_with_logical_partitions(mbr: Source) -> None:
    table = mbr.layout.layer_on("mbr.img")
    assert isinstance(table, MbrTable)
    known = sfdisk(mbr.path)
    assert f"0x{table.signature}" == known[0]["id"]
    assert [(each.start // 512, each.size // 512, int(each.type, 16)) for each in table.partitions] == [
        (each["start"], each["size"], int(each["type"], 16)) for each in known[1:]
    ]
    assert mbr.layout.layer_on("mbr.img:2") is None
    assert isinstance(mbr.layout.layer_on("mbr.img:boot"), Raw)
    assert [layer.on[-1] for layer in mbr.layout.volumes()] == ["t", "1", "5", "6", "7"]


def test_layout_survives_its_record(gpt: Source, mbr: Source) -> None:
    for source in (gpt, mbr):
        assert decode_layout(encode_layout(source.layout)) == source.layout


@pytest.mark.parametrize("name", ["gpt", "mbr"])
def test_same_size_is_byte_for_byte_the_same(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Source = request.getfixturevalue(name)
    target = tmp_path / "new.img"
    plan = plan_onto(source, target)
    assert plan.result.layers == source.layout.layers
    assert source.apply(plan, target) > 0
    name = source.layout.disks[0].name
    assert probe_layout([target], names={target: name}) == source.layout
    assert differing_bytes(source, target) == set()
    assert source.apply(plan_onto(source, target), target) == 0
    check_file_systems(target, plan.result)


@pytest.mark.parametrize("name", ["gpt", "mbr"])
def test_larger_target(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Source = request.getfixturevalue(name)
    target = blank(tmp_path / "new.img", 300 * MIB + 512 * 77)
    plan = plan_onto(source, target)
    source.apply(plan, target)
    root = {"gpt": "gpt.img:5", "mbr": "mbr.img:6"}[name]
    assert plan.grown == (root,)
    if name == "gpt":
        assert "No problems found" in program("sgdisk", "--verify", target)
    assert "No errors detected" in program("sfdisk", "--verify", target)
    check_file_systems(target, plan.result)
    found = probe_layout([target], names={target: source.layout.disks[0].name})
    ours = {spaces_of(layer): layer for layer in plan.result.layers}
    for layer in found.layers:
        expected = ours[spaces_of(layer)]
        if isinstance(layer, GptTable) and isinstance(expected, GptTable):
            assert layer.partitions == expected.partitions
        elif isinstance(layer, FileSystem) and isinstance(expected, FileSystem):
            assert (layer.size, layer.uuid, layer.label) == (expected.size, expected.uuid, expected.label)
        else:
            assert layer == expected
    size = found.disks[0].size
    last = max(start + length for _, start, length in (found.place(each.on) for each in found.volumes()))
    assert size - last < 2 * MIB
    again = plan_onto(source, target)
    assert again.id == plan.id
    assert [step for step in again.steps if step not in plan.steps] == []


def test_keep_sizes_leaves_the_rest_free(gpt: Source, tmp_path: Path) -> None:
    target = blank(tmp_path / "new.img", 200 * MIB)
    plan = plan_onto(gpt, target, KEEP)
    gpt.apply(plan, target)
    assert plan.result.layers == gpt.layout.layers
    assert "stays free" in " ".join(plan.notes)
    assert sfdisk(target) == sfdisk(gpt.path)
    assert "No problems found" in program("sgdisk", "--verify", target)
    assert gpt.apply(plan, target) == 0


def test_smaller_target_is_refused_with_the_numbers(gpt: Source, mbr: Source, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"too small: partition 6 of gpt\.img needs .* short by") as refused:
        plan_onto(gpt, blank(tmp_path / "small.img", 20 * MIB))
    needed, there, short = map(int, re.findall(r"\((\d+) bytes\)", refused.value.message))
    assert there == 20 * MIB
    assert needed - there == short > 0
    assert plan_onto(gpt, blank(tmp_path / "enough.img", needed)).result.disks[0].size == needed
    with pytest.raises(RefusedError, match=r"too small: partition 2 of mbr\.img"):
        plan_onto(mbr, tmp_path / "small.img")


def test_smaller_target_that_still_holds_everything(gpt: Source, tmp_path: Path) -> None:
    target = blank(tmp_path / "new.img", 107 * MIB)
    plan = plan_onto(gpt, target)
    gpt.apply(plan, target)
    assert "No problems found" in program("sgdisk", "--verify", target)
    check_file_systems(target, plan.result)
    assert gpt.apply(plan, target) == 0


@pytest.mark.parametrize("size", [128, 160])
def test_interrupted_anywhere_it_goes_on(gpt: Source, tmp_path: Path, size: int) -> None:
    target = blank(tmp_path / "new.img", size * MIB)
    plan = plan_onto(gpt, target)
    for done in range(0, len(plan.steps), 3):
        gpt.apply(plan, target, until=done)
        assert plan_onto(gpt, target).id == plan.id
    code = target.read_bytes()[:440]
    assert not any(code), "boot code came before the last step"
    gpt.apply(plan, target)
    check_file_systems(target, plan.result)
    assert "No problems found" in program("sgdisk", "--verify", target)


def test_what_was_there_before_does_not_shine_through(mbr: Source, tmp_path: Path) -> None:
    """A former life as GPT disk with other file systems leaves no mark that a probe could find."""
    target = blank(tmp_path / "new.img", 128 * MIB)
    program("sfdisk", "-q", target, data="label: gpt\nsize=20MiB\n,\n")
    fill(target, 2048, 40960, "mkfs.vfat", "-F", "32")
    fill(target, 45056, 65536, "mkfs.ext4", "-q")
    write(target, 112640 * 512 + 65536 + 64, b"_BHRfS_M")
    plan = plan_onto(mbr, target, KEEP)
    mbr.apply(plan, target)
    assert probe_layout([target], names={target: "mbr.img"}) == mbr.layout
    assert "PTTYPE=dos" in program("blkid", "-p", "-o", "export", target)
    assert "gpt" not in program("wipefs", target)
    assert mbr.apply(plan_onto(mbr, target, KEEP), target) == 0


def test_an_array_member_of_old_does_not_hide_the_new_file_system(gpt: Source, tmp_path: Path) -> None:
    """MD keeps version 1.0 superblocks 8 KiB before the end, in blocks that a new file system may never use."""
    target = blank(tmp_path / "new.img", 128 * MIB)
    _, start, size = gpt.layout.place("gpt.img:5")
    sector = (size // 512 - 16) & ~7
    superblock = struct.pack("<II8x16s32s", 0xA92B4EFC, 1, b"u" * 16, b"old array").ljust(0x90, b"\0")
    write(target, start + sector * 512, superblock + struct.pack("<Q", sector))
    assert blkid(target, start, size)["TYPE"] == "linux_raid_member"
    gpt.apply(plan_onto(gpt, target), target)
    assert blkid(target, start, size)["TYPE"] == "ext4"
    assert gpt.apply(plan_onto(gpt, target), target) == 0


def test_xfs_grows(tmp_path: Path) -> None:
    disk = blank(tmp_path / "x.img", 340 * MIB)
    program("sfdisk", "-q", disk, data="label: gpt\n,,L\n")
    fill(disk, 2048, 337 * 2048, "mkfs.xfs", "-q", "-L", "data", "-d", "size=320m")
    source = Source(disk, probe_layout([disk]))
    target = blank(tmp_path / "new.img", 700 * MIB)
    plan = plan_onto(source, target)
    source.apply(plan, target)
    found = probe_layout([target])
    volume, expected = found.layer_on("new.img:1"), plan.result.layer_on("x.img:1")
    assert isinstance(volume, FileSystem)
    assert isinstance(expected, FileSystem)
    assert volume.size == expected.size > 690 * MIB
    assert (volume.uuid, volume.label) == (expected.uuid, "data")
    check_file_systems(target, found)


def test_whole_disk_file_system(tmp_path: Path) -> None:
    disk = blank(tmp_path / "data.img", 64 * MIB)
    program("mkfs.ext4", "-q", "-L", "data", disk)
    source = Source(disk, probe_layout([disk]))
    assert [(spaces_of(layer), type(layer)) for layer in source.layout.layers] == [(("data.img",), FileSystem)]
    target = blank(tmp_path / "new.img", 100 * MIB)
    program("sfdisk", "-q", target, data="label: gpt\nsize=20MiB\n,\n")
    plan = plan_onto(source, target)
    assert plan.grown == ("data.img",)
    source.apply(plan, target)
    found = probe_layout([target])
    check_file_systems(target, found)
    (volume,) = found.volumes()
    assert volume.size == 100 * MIB


def test_unknown_and_blank_disks(tmp_path: Path) -> None:
    heard: list[Event] = []
    empty, unknown = blank(tmp_path / "empty.img", MIB), blank(tmp_path / "unknown.img", MIB)
    write(unknown, 300_000, b"data")
    layout = probe_layout([empty, unknown], report=heard.append)
    assert layout.layers == (Raw(on="unknown.img", size=MIB),)
    assert [type(event) for event in heard] == [Note]


def test_contents_that_are_carried_whole_are_reported(tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 400 * MIB)
    program("sfdisk", "-q", disk, data="label: gpt\nsize=150MiB\nsize=20MiB\nsize=20MiB\nsize=60MiB\n")
    fill(disk, 2048, 150 * 2048, "mkfs.btrfs", "-q")
    fill(
        disk,
        2048 + 150 * 2048,
        20 * 2048,
        "cryptsetup",
        "luksFormat",
        "-q",
        "--pbkdf=pbkdf2",
        "--key-file=/etc/hostname",
    )
    heard: list[Event] = []
    layout = probe_layout([disk], report=heard.append)
    found = {volume.on: getattr(volume, "type", "") for volume in layout.volumes()}
    assert found == {"a.img:1": "btrfs", "a.img:2": "crypto_LUKS", "a.img:3": "", "a.img:4": ""}
    said = " ".join(event.text for event in heard if isinstance(event, (Note, Warn)))
    assert "a.img:1 holds btrfs, which is captured whole" in said
    assert "a.img:2 holds crypto_LUKS" in said


def test_damaged_table_is_carried_whole(tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 8 * MIB)
    program("sfdisk", "-q", disk, data="label: gpt\nsize=2MiB\n")
    write(disk, 512, b"XX")
    heard: list[Event] = []
    layout = probe_layout([disk], report=heard.append)
    assert isinstance(layout.layer_on("a.img"), GptTable)
    assert [event for event in heard if isinstance(event, Warn) and "its backup is used" in event.text]
    write(disk, 8 * MIB - 512, b"XX")
    heard.clear()
    assert probe_layout([disk], report=heard.append).layers == (Raw(on="a.img", size=8 * MIB, type="PMBR"),)
    assert [event for event in heard if isinstance(event, Warn) and "both copies" in event.text]


def test_targets(tmp_path: Path, gpt: Source) -> None:
    missing = probe_target(tmp_path / "new.img", size_if_missing=5 * MIB)
    assert (missing.size, missing.exists, missing.content, missing.is_file) == (5 * MIB, False, "", True)
    full = probe_target(gpt.path, size_if_missing=1)
    assert (
        full.content == "GPT table with 6 partitions (2 unknown content, vfat 'EFI', ext2 'small', ext4 'root', swap)"
    )
    with pytest.raises(RefusedError, match="no disk"):
        probe_target(Path("/dev/sdzz"), size_if_missing=MIB)
    with pytest.raises(RefusedError, match="neither a block device nor a regular file"):
        probe_target(tmp_path, size_if_missing=MIB)
    with pytest.raises(RefusedError, match="no folder"):
        probe_target(tmp_path / "a" / "b.img", size_if_missing=MIB)


def test_a_blank_device_and_one_with_unknown_content(tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 4 * MIB)
    with attach_loop(Span(disk, 0, 4 * MIB), writable=True) as device:
        found = probe_target(device, size_if_missing=0)
        assert (found.content, found.is_file, found.size, found.path) == ("", False, 4 * MIB, str(device))
    write(disk, 4 * MIB - 100, b"x")
    with attach_loop(Span(disk, 0, 4 * MIB)) as device:
        found = probe_target(device, size_if_missing=0)
        assert found.content == "unknown content"
        assert found.uses == ("the kernel holds it read-only",)


def test_a_disk_that_cannot_be_read_is_described_all_the_same(tmp_path: Path) -> None:
    """A loop device whose file was cut short fails like a dying disk."""
    disk = blank(tmp_path / "a.img", 4 * MIB)
    with attach_loop(Span(disk, 0, 4 * MIB)) as device:
        blank(disk, 1 * MIB)
        found = probe_target(device, size_if_missing=0)
    assert found.size == 4 * MIB
    assert any("failed" in use for use in found.uses), found.uses


def test_a_disk_file_that_cannot_take_it_all_is_refused(gpt: Source, tmp_path: Path) -> None:
    target = probe_target(tmp_path / "new.img", size_if_missing=128 * MIB)
    assert target.room is not None
    tight = msgspec.structs.replace(target, room=10 * MIB)
    with pytest.raises(RefusedError, match=r"there is 10\.0 MiB"):
        plan_restore(gpt.layout, gpt.images(), {"gpt.img": tight}, snapshot="s", options=GROW)


def test_sources_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="cannot open"):
        probe_layout([tmp_path / "none.img"])
    with pytest.raises(RefusedError, match="empty"):
        probe_layout([blank(tmp_path / "zero.img", 0)])
    with pytest.raises(RefusedError, match="named twice"):
        probe_layout([tmp_path / "zero.img", tmp_path / "zero.img"])
