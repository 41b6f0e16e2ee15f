"""What we read is what LVM reports about groups that it made; what we write it takes."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.uml import run_in_uml
from remetal.ondisk.lvm import (
    Area,
    LogicalVolume,
    PhysicalRange,
    VolumeGroup,
    find_volume,
    parse_label,
    parse_volume_group,
    physical_ranges,
    read_metadata,
    visible_volumes,
    volume_size,
)
from remetal.ondisk.lvm_config import (
    Entry,
    Section,
    find_entry,
    format_config,
    parse_config,
    replace_entry,
)
from remetal.ondisk.regions import BadStructureError, Read
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from tests.real_disks import blank

MIB = 1 << 20
DISKS = ("a", "b", "c", "d")
PVS = {f"/dev/ubd{name}": name for name in DISKS}

BUILD = """
lvm() {
  command lvm "$1" --devices /dev/ubda,/dev/ubdb,/dev/ubdc,/dev/ubdd \\
    --config 'activation{monitoring=0 udev_sync=0 udev_rules=0} devices{hints="none"}' "${@:2}"
}
export LVM_SYSTEM_DIR=
lvm pvcreate /dev/ubda /dev/ubdb
lvm pvcreate --dataalignment 4m --metadatacopies 2 /dev/ubdc
lvm pvcreate --metadatacopies 0 --bootloaderareasize 1m /dev/ubdd
lvm vgcreate -s 1m --maxlogicalvolumes 99 --addtag vgtag --addtag 'a/b=1' mix /dev/ubda /dev/ubdb /dev/ubdc /dev/ubdd
lvm pvchange --addtag fast /dev/ubda
lvm lvcreate -y -n linear -l 50 mix /dev/ubda:10-39 /dev/ubdb:0-19
lvm lvcreate -y -n striped -i 2 -I 64k -l 10 --addtag lvtag mix
for each in linear striped; do head -c $(blockdev --getsize64 /dev/mix/$each) /dev/urandom >$OUT/$each; done
for each in linear striped; do dd if=$OUT/$each of=/dev/mix/$each bs=1M conv=fsync status=none; done
lvm lvcreate -y -n r1 --type raid1 -m1 -l 4 mix
lvm lvcreate -y -n r5 --type raid5 -i2 -l 4 mix
lvm lvcreate -y -n r10 --type raid10 -i2 -m1 -l 4 mix
lvm lvcreate -y -n mirrored --type mirror -m1 -l 4 mix
lvm lvcreate -y -n pool --type thin-pool -l 8 -c 64k mix
lvm lvcreate -y -n thin1 -V 40m --thinpool pool mix
lvm lvcreate -y -n thin2 -V 20m --thinpool pool mix
lvm lvcreate -y -n thin1-snap -s mix/thin1
lvm lvcreate -y -n linear.snap -s -l 4 mix/linear
lvm lvcreate -y -n slow -l 8 mix
lvm lvcreate -y -n fast --type cache-pool -l 8 mix
lvm lvconvert -y --type cache --cachepool mix/fast mix/slow
lvm lvcreate -y -an -Zn -Wn -n slow2 -l 8 mix
lvm lvcreate -y -an -Zn -Wn -n fast2 -l 8 mix
lvm lvconvert -y --type writecache --cachevol fast2 mix/slow2
lvm vgcfgbackup -f $OUT/mix.vg mix
report() { lvm "$1" -a --units b --nosuffix --reportformat json -o "$2" --select vg_name=mix >$OUT/$3.json; }
report pvs pv_name,pv_uuid,vg_name,dev_size,pe_start,pv_pe_count,pv_mda_count,pv_ba_start,pv_ba_size,pv_tags,\\
pv_allocatable,pv_missing pvs
report vgs vg_name,vg_uuid,vg_seqno,vg_extent_size,vg_tags,max_lv,max_pv,pv_count,vg_systemid,vg_lock_type vgs
report lvs lv_name,lv_uuid,lv_size,lv_tags,origin,origin_size,pool_lv,data_lv,metadata_lv,mirror_log lvs
report lvs lv_name,seg_start_pe,seg_size_pe,segtype,stripe_size,region_size,chunk_size,thin_id,transaction_id,\\
seg_le_ranges segments
lvm lvs --reportformat json -o lv_name mix >$OUT/visible.json
lvm vgchange -an mix
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the disks, what LVM said about them, and what was written to two volumes."""
    folder = tmp_path_factory.mktemp("lvm")
    disks = [blank(folder / name, 192 * MIB) for name in DISKS]
    run_in_uml(BUILD, disks=disks, env={"OUT": str(folder)}, timeout=600)
    return folder


def reader(path: Path) -> tuple[Read, int]:
    size = path.stat().st_size

    def read(offset: int, count: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(count)
        assert len(data) == count
        return data

    return read, size


def said(folder: Path, name: str) -> list[dict[str, str]]:
    report: dict[str, list[dict[str, str]]] = json.loads((folder / f"{name}.json").read_text())["report"][0]
    (rows,) = report.values()
    return rows


def group_on(path: Path) -> VolumeGroup:
    text = read_metadata(*reader(path))
    assert text is not None
    return parse_volume_group(text)


def volume_of(group: VolumeGroup, name: str) -> LogicalVolume:
    volume = find_volume(group, name)
    assert volume is not None
    return volume


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


@pytest.mark.storage
def test_labels(built: Path) -> None:
    for row in said(built, "pvs"):
        label = parse_label(*reader(built / PVS[row["pv_name"]]))
        assert (label.uuid, label.device_size) == (row["pv_uuid"], int(row["dev_size"]))
        assert (label.data_start, len(label.metadata_areas)) == (int(row["pe_start"]), int(row["pv_mda_count"]))
        boot = label.boot_area or Area(0, 0)
        assert (boot.start, boot.size) == (int(row["pv_ba_start"]), int(row["pv_ba_size"]))
        assert label.used
        assert label.problems == ()


@pytest.mark.storage
def test_group_and_physical_volumes(built: Path) -> None:
    group = group_on(built / "a")
    (row,) = said(built, "vgs")
    assert (group.name, group.uuid, group.seqno) == (row["vg_name"], row["vg_uuid"], int(row["vg_seqno"]))
    assert group.extent_size == int(row["vg_extent_size"]) == MIB
    assert set(group.tags) == set(words(row["vg_tags"])) == {"vgtag", "a/b=1"}
    assert (group.max_lv, group.max_pv, len(group.pvs)) == (99, int(row["max_pv"]), int(row["pv_count"]))
    assert (group.system_id, group.lock_type) == (row["vg_systemid"], row["vg_lock_type"])
    rows = {row["pv_uuid"]: row for row in said(built, "pvs")}
    assert len(rows) == len(group.pvs)
    for pv in group.pvs:
        row = rows[pv.uuid]
        assert (pv.device_size, pv.data_start) == (int(row["dev_size"]), int(row["pe_start"]))
        assert (pv.extents, pv.tags) == (int(row["pv_pe_count"]), words(row["pv_tags"]))
        assert (pv.allocatable, pv.missing) == (row["pv_allocatable"] != "", row["pv_missing"] != "")
        assert (pv.boot_area is not None) == (int(row["pv_ba_size"]) > 0)


@pytest.mark.storage
def test_every_copy_and_the_backup_say_the_same(built: Path) -> None:
    group = group_on(built / "a")
    backup = parse_volume_group((built / "mix.vg").read_text())
    assert replace(backup, config=Section()) == replace(group, config=Section())
    assert find_entry(backup.config, "mix") == find_entry(group.config, "mix")
    assert group_on(built / "b") == group_on(built / "c") == group
    assert read_metadata(*reader(built / "d")) is None


@pytest.mark.storage
def test_logical_volumes(built: Path) -> None:
    group = group_on(built / "c")
    rows = {row["lv_name"].strip("[]"): row for row in said(built, "lvs")}
    # The text has one more, without a name of its own, for every snapshot that is not thin.
    assert {volume.name for volume in group.lvs if volume.type != "snapshot"} == set(rows)
    assert [v.name for v in group.lvs if v.visible] == [v.name for v in visible_volumes(group)]
    assert {v.name for v in visible_volumes(group)} == {row["lv_name"] for row in said(built, "visible")}
    for name, row in rows.items():
        volume = volume_of(group, name)
        segment = volume.segments[0]
        assert (volume.uuid, volume.size, volume.tags) == (row["lv_uuid"], int(row["lv_size"]), words(row["lv_tags"]))
        assert segment.pool == row["pool_lv"].strip("[]")
        assert segment.metadata == row["metadata_lv"].strip("[]")
        assert segment.data == row["data_lv"].strip("[]")
        assert segment.log == row["mirror_log"].strip("[]")
        if name == "linear.snap":
            assert volume_size(group, name) == int(row["origin_size"]) == 50 * MIB
        else:
            assert segment.origin == row["origin"].strip("[]")
            assert volume_size(group, name) == volume.size
    assert len(volume_of(group, "r10").segments[0].raid_metadata) == 4
    assert volume_of(group, "r5").segments[0].stripes == tuple((f"r5_rimage_{i}", 0) for i in range(3))


@pytest.mark.storage
def test_segments(built: Path) -> None:
    group = group_on(built / "b")
    pvs = {device: pv.id for device, pv in zip(PVS, group.pvs, strict=False)}
    rows = said(built, "segments")
    kinds = set()
    for row in rows:
        name = row["lv_name"].strip("[]")
        segments = {segment.start_extent: segment for segment in volume_of(group, name).segments}
        segment = segments[int(row["seg_start_pe"])]
        kinds.add(segment.type)
        kind = {"linear": "striped"}.get(row["segtype"], row["segtype"])
        assert (segment.type, segment.extents) == (kind, int(row["seg_size_pe"]))
        assert segment.stripe_size == int(row["stripe_size"])
        assert segment.region_size == int(row["region_size"])
        if segment.type in {"thin", "thin-pool"}:
            assert segment.transaction_id == int(row["transaction_id"])
            assert segment.device_id == int(row["thin_id"] or 0)
        if segment.type in {"thin-pool", "cache-pool"}:
            assert segment.chunk_size == int(row["chunk_size"])
        if segment.type == "striped":
            extents = segment.extents // len(segment.stripes)
            shown = [part.split(":") for part in row["seg_le_ranges"].split(",")]
            assert [(pvs[device], run) for device, run in shown] == [
                (pv, f"{first}-{first + extents - 1}") for pv, first in segment.stripes
            ]
    assert kinds == {"striped", "raid1", "raid5", "raid10", "mirror", "thin-pool", "thin", "cache", "cache-pool"} | {
        "writecache"
    }


@pytest.mark.storage
def test_physical_ranges_hold_what_was_written(built: Path) -> None:
    group = group_on(built / "a")
    disks = {pv.id: reader(built / name)[0] for pv, name in zip(group.pvs, DISKS, strict=False)}

    def content(range_: PhysicalRange) -> bytes:
        return disks[range_.pv](range_.offset, range_.size)

    ranges = physical_ranges(group, "linear")
    assert [range_.size for range_ in ranges] == [30 * MIB, 20 * MIB]
    assert b"".join(map(content, ranges)) == (built / "linear").read_bytes()
    stripes = [content(range_) for range_ in physical_ranges(group, "striped")]
    size = volume_of(group, "striped").segments[0].stripe_size
    pieces = [stripe[at : at + size] for at in range(0, len(stripes[0]), size) for stripe in stripes]
    assert b"".join(pieces) == (built / "striped").read_bytes()
    assert physical_ranges(group, "pool_tmeta")
    for name in ("thin1", "r1", "nothing"):
        with pytest.raises(BadStructureError, match=name):
            physical_ranges(group, name)


@pytest.mark.storage
def test_damaged_copies(built: Path, tmp_path: Path) -> None:
    disk = tmp_path / "c"
    shutil.copy(built / "c", disk)
    whole = read_metadata(*reader(disk))
    first, second = parse_label(*reader(disk)).metadata_areas

    def damage(place: int) -> None:
        with disk.open("r+b") as file:
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 0x10]))

    damage(first.start + 3000)
    (offset,) = struct.unpack_from("<Q", reader(disk)[0](first.start + 40, 8))
    damage(first.start + offset + 100)
    label = parse_label(*reader(disk))
    assert len(label.problems) == 1
    assert f"byte {first.start} is damaged: its text" in label.problems[0]
    assert read_metadata(*reader(disk)) == whole
    damage(second.start + 4)
    assert f"byte {second.start} is damaged: its header" in parse_label(*reader(disk)).problems[1]
    with pytest.raises(BadStructureError, match="its text's checksum is wrong"):
        read_metadata(*reader(disk))
    damage(512 + 32)
    with pytest.raises(BadStructureError, match="label in sector 1 is damaged"):
        parse_label(*reader(disk))


def lvm(*words: str | Path) -> str:
    """Run an LVM command that needs no device-mapper in this kernel."""
    done = subprocess.run(
        ["lvm", words[0], "--driverloaded", "n", *words[1:]],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LVM_SYSTEM_DIR": "", "LVM_SUPPRESS_FD_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_text_that_runs_round_the_ring(tmp_path: Path) -> None:
    disk = blank(tmp_path / "disk", 8 * MIB)
    wrapped = 0
    old: list[str] = []
    with attach_loop(Span(disk, 0, 8 * MIB), writable=True) as device:
        lvm("pvcreate", "--devices", device, "--metadatasize", "32k", "--dataalignment", "64k", device)
        lvm("vgcreate", "--devices", device, "ring", device)
        # An area of 60 KiB, texts of some 14 KB
        for round_ in range(10):
            new = [f"{round_}.{number:0100}" for number in range(100)]
            changes = [word for tag in new for word in ("--addtag", tag)] + [
                w for tag in old for w in ("--deltag", tag)
            ]
            lvm("vgchange", "--devices", device, *changes, "ring")
            lvm("vgcfgbackup", "--devices", device, "--file", tmp_path / "backup", "ring")
            old = new
            read, size = reader(disk)
            (area,) = parse_label(read, size).metadata_areas
            offset, length = struct.unpack_from("<QQ", read(area.start + 40, 16))
            wrapped += offset + length > area.size
            text = read_metadata(read, size)
            assert text is not None
            backup = parse_config((tmp_path / "backup").read_text())
            assert find_entry(parse_config(text), "ring") == find_entry(backup, "ring")
            assert set(parse_volume_group(text).tags) == set(new)
    assert wrapped


def test_the_newest_of_two_copies_counts(tmp_path: Path) -> None:
    disk = blank(tmp_path / "disk", 16 * MIB)
    with attach_loop(Span(disk, 0, 16 * MIB), writable=True) as device:
        lvm("pvcreate", "--devices", device, "--metadatacopies", "2", device)
        assert read_metadata(*reader(disk)) is None
        assert not parse_label(*reader(disk)).used
        lvm("vgcreate", "--devices", device, "lab", device)
        before = disk.read_bytes()
        lvm("vgchange", "--devices", device, "--addtag", "later", "lab")
    assert group_on(disk).tags == ("later",)
    for area in parse_label(*reader(disk)).metadata_areas:
        after = disk.read_bytes()
        with disk.open("r+b") as file:
            file.seek(area.start)
            file.write(before[area.start : area.start + area.size])
        assert group_on(disk).tags == ("later",)
        disk.write_bytes(after)
    disk.write_bytes(before)
    assert group_on(disk).tags == ()


def test_the_label_may_be_in_any_of_four_sectors(tmp_path: Path) -> None:
    disk = blank(tmp_path / "disk", 16 * MIB)
    with attach_loop(Span(disk, 0, 16 * MIB), writable=True) as device:
        lvm("pvcreate", "--devices", device, "--labelsector", "3", device)
    label = parse_label(*reader(disk))
    assert label.data_start == MIB
    assert label.problems == ()
    with disk.open("r+b") as file:
        file.seek(3 * 512)
        copy = file.read(512)
        file.seek(2 * 512)
        file.write(copy)
    assert replace(parse_label(*reader(disk)), problems=()) == label
    assert parse_label(*reader(disk)).problems == ("the label in sector 2 is damaged",)


def test_ignored_metadata_areas(tmp_path: Path) -> None:
    disk = blank(tmp_path / "disk", 16 * MIB)
    other = blank(tmp_path / "other", 16 * MIB)
    with (
        attach_loop(Span(disk, 0, 16 * MIB), writable=True) as device,
        attach_loop(Span(other, 0, 16 * MIB), writable=True) as second,
    ):
        both = f"{device},{second}"
        lvm("pvcreate", "--devices", both, device, second)
        lvm("vgcreate", "--devices", both, "lab", device, second)
        lvm("pvchange", "--devices", both, "--metadataignore", "y", second)
    assert read_metadata(*reader(other)) is None
    assert parse_label(*reader(other)).used
    assert len(group_on(disk).pvs) == 2


@pytest.mark.storage
def test_lvm_restores_what_we_write(built: Path, tmp_path: Path) -> None:
    group = group_on(built / "a")
    longer = {"device_size": 32 * MIB // 512, "extents": 32}
    config = group.config
    for pv in group.pvs:
        place = ("mix", "physical_volumes", pv.id)
        config = replace_entry(config, (*place, "dev_size"), pv.device_size // 512 + longer["device_size"])
        config = replace_entry(config, (*place, "pe_count"), pv.extents + longer["extents"])
    description = tmp_path / "mix.vg"
    description.write_text(format_config(config))
    for pv, name in zip(group.pvs, DISKS, strict=False):
        disk = blank(tmp_path / name, 224 * MIB)
        copies = str(len(parse_label(*reader(built / name)).metadata_areas))
        with attach_loop(Span(disk, 0, 224 * MIB), writable=True) as device:
            what = ("--uuid", pv.uuid, "--restorefile", description, "--metadatacopies", copies, "--yes")
            lvm("pvcreate", "--devices", device, *what, device)
    spans = [Span(tmp_path / name, 0, 224 * MIB) for name in DISKS[:4]]
    with (
        attach_loop(spans[0], writable=True) as a,
        attach_loop(spans[1], writable=True) as b,
        attach_loop(spans[2], writable=True) as c,
        attach_loop(spans[3], writable=True) as d,
    ):
        devices = ",".join(map(str, (a, b, c, d)))
        lvm("vgcfgrestore", "--devices", devices, "--force", "--file", description, "mix")
        lvm("vgck", "--devices", devices, "mix")
    restored = group_on(tmp_path / "c")
    assert restored.lvs == group.lvs
    assert (restored.uuid, restored.tags, restored.seqno) == (group.uuid, group.tags, group.seqno + 1)
    assert restored.pvs == tuple(
        replace(pv, device_size=224 * MIB, extents=pv.extents + longer["extents"]) for pv in group.pvs
    )


def lvmconfig(folder: Path, text: str) -> tuple[int, str]:
    """Return how lvmconfig(8) ends for a text as lvm.conf, and the text as it understood it."""
    (folder / "lvm.conf").write_text(text)
    done = subprocess.run(
        ["lvmconfig"],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LVM_SYSTEM_DIR": str(folder), "LVM_SUPPRESS_FD_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def as_lvm_prints(entry: Entry) -> Any:
    """Return an entry with what lvmconfig's output does not tell: lists of one, and digits behind the sixth."""
    if isinstance(entry, Section):
        return {name: as_lvm_prints(inner) for name, inner in entry.entries}
    if isinstance(entry, tuple):
        return as_lvm_prints(entry[0]) if len(entry) == 1 else [as_lvm_prints(each) for each in entry]
    return float(f"{entry:f}") if isinstance(entry, float) else entry


@pytest.mark.parametrize(
    "text",
    [
        "config { checks = 0 }",
        "x=-12 y=+7 z=010 w=1. v=.5 u=-1.25#comment\n",
        'a = "say \\"x\\" \\\\ \\n" b = \'it\\"s\' c = "" d = "two\nlines" e = "#{}"',
        'list = [ "a", 1, 2.5, \'b\' ] empty = [] one = ["a"] last = ["a",] loose = ["a" "b"]',
        '"a#b" = 1 \'c"d\' = 2 1 = 3 x+y.z-_ = 4',
        "bare = a/word,with[brackets] other = @x",
        "a = 1 a = 2",
        'devices/dir = "/a" /devices//scan = "/b" devices { filter = "a|x|" } devices { dir = "/c" }',
        'ü = "ö€" x = 9223372036854775807 y = -9223372036854775808 \t\v\f\r\n# end',
        "a = 5b = 6",
    ],
)
def test_config_means_what_lvm_reads(tmp_path: Path, text: str) -> None:
    code, output = lvmconfig(tmp_path, text)
    assert code == 0
    ours = parse_config(text)
    assert as_lvm_prints(ours) == as_lvm_prints(parse_config(output))
    code, again = lvmconfig(tmp_path, format_config(ours))
    assert (code, parse_config(again)) == (0, parse_config(output))


@pytest.mark.parametrize(
    "text",
    [
        *("config { a = [,1] }", "config { a = 0x10 }", "config { a = [1 2] }", "config { a = [b, c] }"),
        *("config { a = }", "config {", "}", '"" = 1', "config { a = 1.2.3 }", "config { a b = 1 }"),
        *("config { a = 5x }", "[config = 1", "config { a = 1, }", "config = { a = 1 }", "config { } }"),
        *("config { a = [1, 2 }", "config { a = [1, {}] }", "config { a = 9223372036854775808 }", "= 1", "config"),
    ],
)
def test_config_that_lvm_does_not_read(tmp_path: Path, text: str) -> None:
    assert lvmconfig(tmp_path, text)[0] != 0
    with pytest.raises(BadStructureError, match="line 1 of the LVM configuration is wrong"):
        parse_config(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = 1 a { b = 1 }", "a section and a value"),
        ("a { b = 1 } a = 1", "a section and a value"),
        ("a = 1 a/b = 1", "a section and a value"),
        ('a = "x', "does not end"),
        ("a/ = 1", "empty"),
        ("a = -", "not a number"),
        ("a = 08", "not a number"),
        ("a = \0", "cannot stand here"),
        ("\n\n\na = [", "line 4"),
    ],
)
def test_config_that_we_do_not_read(text: str, reason: str) -> None:
    with pytest.raises(BadStructureError, match=reason):
        parse_config(text)


@pytest.mark.parametrize(
    "entry",
    [("", 1), ("a/b", 1), ("a", "x\0y"), ("a", float("inf")), ("a", float("nan")), ("a", 1 << 63), ("a", (1, "\0"))],
)
def test_config_that_cannot_be_written(entry: tuple[str, Entry]) -> None:
    with pytest.raises(BadStructureError):
        format_config(Section((entry,)))


def test_entries_are_found_and_replaced() -> None:
    tree = parse_config("a { b { c = 1 d = 2 } } e = [3]")
    assert find_entry(tree, "a", "b", "d") == 2
    assert find_entry(tree, "e") == (3,)
    assert find_entry(tree, "a", "x", "d") is None
    assert find_entry(tree, "e", "f") is None
    assert find_entry(tree) == tree
    changed = replace_entry(replace_entry(tree, ("a", "b", "c"), 7), ("a", "b", "new"), ("x",))
    assert format_config(changed) == 'a {\n\tb {\n\t\tc = 7\n\t\td = 2\n\t\tnew = ["x"]\n\t}\n}\ne = [3]\n'
    with pytest.raises(BadStructureError, match="no section 'x'"):
        replace_entry(tree, ("a", "x", "d"), 1)
