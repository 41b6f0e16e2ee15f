"""LVM's text survives being written and read; hostile text and hostile bytes are a group, or the one error."""

from __future__ import annotations

import re
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.ondisk.lvm import (
    parse_label,
    parse_volume_group,
    physical_ranges,
    read_metadata,
    visible_volumes,
    volume_size,
)
from remetal.ondisk.lvm_config import MAX_TEXT, Section, format_config, parse_config
from remetal.ondisk.regions import BadStructureError, Read

MIB = 1 << 20
SIZE = 2 * MIB
AREA, AREA_SIZE = 4096, 60 * 1024

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NAMES = TEXTS.filter(lambda name: name != "" and "/" not in name)
SCALARS = (
    st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
    | st.text("\"'\\#{}[]=, \n\tab", max_size=12)
)
VALUES = SCALARS | st.lists(SCALARS, max_size=4).map(tuple)
SECTIONS = st.recursive(
    st.builds(Section),
    lambda inner: st.dictionaries(NAMES, VALUES | inner, max_size=5).map(lambda tree: Section(tuple(tree.items()))),
    max_leaves=20,
)

GROUP = """
vg {
id = "2Evabm-zc6X-nQlM-SG0S-mFpU-0fo5-zfAXRK" seqno = 38 format = "lvm2" status = ["RESIZEABLE", "READ", "WRITE"]
flags = [] tags = ["vgtag"] extent_size = 2048 max_lv = 0 max_pv = 0 metadata_copies = 0
physical_volumes {
pv0 { id = "3Up1dc-bgMy-UBgS-VGH9-mf1P-2zU3-nKZHd0" device = "/dev/sda" status = ["ALLOCATABLE"] flags = []
dev_size = 524288 pe_start = 4096 pe_count = 200 ba_start = 2048 ba_size = 2048 }
pv1 { id = "p0HSXx-aoNO-wblX-VQrx-AOz6-hSUn-BiTEql" status = ["ALLOCATABLE"] flags = ["MISSING"] tags = ["fast"]
dev_size = 524288 pe_start = 2048 pe_count = 200 }
}
logical_volumes {
lin { id = "K3z8Eb-wGuj-XFUc-CiWc-3w1P-vHVq-Qzu3Ia" status = ["READ", "WRITE", "VISIBLE"] flags = [] segment_count = 2
segment1 { start_extent = 0 extent_count = 9 type = "striped" stripe_count = 1 stripes = ["pv0", 0] }
segment2 { start_extent = 9 extent_count = 8 type = "striped" stripe_size = 128 stripes = ["pv0", 9, "pv1", 0] } }
r1 { id = "G0qz4d-9HB2-TRG4-B04o-jhaY-1b9O-lEKC3Y" status = ["READ", "WRITE", "VISIBLE"] flags = [] segment_count = 1
segment1 { start_extent = 0 extent_count = 8 type = "raid1" device_count = 2 region_size = 4096
raids = ["r1_rmeta_0", "r1_rimage_0", "r1_rmeta_1", "r1_rimage_1"] } }
r1_rmeta_0 { id = "QfeUWA-qlTD-8M42-fAhq-JjCx-M66Q-AUjIgg" status = ["READ", "WRITE"] flags = []
segment1 { start_extent = 0 extent_count = 1 type = "striped" stripes = ["pv0", 20] } }
r1_rimage_0 { id = "yK9fDf-JuHs-awk7-vbim-jtVk-38fR-KexH2M" status = ["READ", "WRITE"] flags = []
segment1 { start_extent = 0 extent_count = 8 type = "striped" stripes = ["pv0", 21] } }
r1_rmeta_1 { id = "kdX7sq-mShC-e5qE-ehN6-mYfw-VAMV-kbonyr" status = ["READ", "WRITE"] flags = []
segment1 { start_extent = 0 extent_count = 1 type = "striped" stripes = ["pv1", 20] } }
r1_rimage_1 { id = "FVAmWX-YKqr-D35V-RtL2-4gea-0RPe-9D3IFK" status = ["READ", "WRITE"] flags = []
segment1 { start_extent = 0 extent_count = 8 type = "striped" stripes = ["pv1", 21] } }
pool { id = "oUljsS-7XJ9-0YtB-CeRF-reOe-Lnn0-NfkPeA" status = ["READ", "WRITE", "VISIBLE"] flags = []
segment1 { start_extent = 0 extent_count = 32 type = "thin-pool" metadata = "pool_tmeta" pool = "pool_tdata"
transaction_id = 3 chunk_size = 128 discards = "passdown" zero_new_blocks = 1 } }
pool_tmeta { id = "ublhl8-hf8x-jOYO-N90Q-TWle-RWgp-v9w2Px" status = ["READ", "WRITE"] flags = []
segment1 { start_extent = 0 extent_count = 2 type = "striped" stripes = ["pv0", 60] } }
pool_tdata { id = "2eacrf-3ZkK-XxwD-ceJo-oxkV-IRdO-wgoqXa" status = ["READ", "WRITE"] flags = []
segment1 { start_extent = 0 extent_count = 32 type = "striped" stripes = ["pv0", 62] } }
thin { id = "OuK8Jq-JzBH-vIAt-GLVG-thDS-MV4Q-eHdAgq" status = ["READ", "WRITE", "VISIBLE"] flags = []
segment1 { start_extent = 0 extent_count = 100 type = "thin" thin_pool = "pool" transaction_id = 0 device_id = 1 } }
thinsnap { id = "hSr7ot-2dSO-gxRd-7fws-vjOL-pIN2-RvLPZw" status = ["READ", "VISIBLE"] flags = ["ACTIVATION_SKIP"]
segment1 { start_extent = 0 extent_count = 100 type = "thin" thin_pool = "pool" transaction_id = 2 device_id = 3
origin = "thin" } }
cow { id = "EUjilW-f1Zz-J1iD-9rdZ-MtoG-N17b-weTfWX" status = ["READ", "WRITE"] flags = []
segment1 { start_extent = 0 extent_count = 8 type = "striped" stripes = ["pv1", 100] } }
snapshot0 { id = "fHe5K4-R7Nj-6S3N-OBIR-cFZs-tRMy-aZNguP" status = ["READ", "WRITE", "VISIBLE"] flags = []
segment1 { start_extent = 0 extent_count = 17 type = "snapshot" chunk_size = 8 origin = "lin" cow_store = "cow" } }
}
}
contents = "Text Format Volume Group" version = 1 description = "" creation_host = "lab" creation_time = 1795679812
"""
WORDS = re.findall(r'"[^"]*"|[^\s,\[\]]+|[,\[\]]', GROUP)
STRANGE = ["-1", "0", "1", "7", str(1 << 62), "1.5", '""', '"pv0"', '"r1"', "[]", "{", "}", "=", ",", "[", "]", '"-rf"']


def reader(disk: bytes) -> Read:
    def read(offset: int, count: int) -> bytes:
        assert offset >= 0 <= count
        assert offset + count <= len(disk)
        return disk[offset : offset + count]

    return read


def checksum(data: bytes) -> int:
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def physical_volume(text: bytes, place: int = 1024) -> bytearray:
    """Make a volume with one metadata area, whose text begins at byte `place` of its ring."""
    disk = bytearray(SIZE)
    header = b"3Up1dcbgMyUBgSVGH9mf1P2zU3nKZHd0" + struct.pack("<Q", SIZE)
    header += struct.pack("<8Q", MIB, 0, 0, 0, AREA, AREA_SIZE, 0, 0) + struct.pack("<IIQQ", 2, 1, 0, 0)
    label = struct.pack("<I8s", 32, b"LVM2 001") + header.ljust(512 - 32, b"\0")
    disk[512:1024] = struct.pack("<8sQI", b"LABELONE", 1, checksum(label)) + label
    stored = text + b"\0"
    ring = bytearray(AREA_SIZE - 512)
    for index, byte in enumerate(stored):
        ring[(place - 512 + index) % len(ring)] = byte
    area = b" LVM2 x[5A%r0N*>" + struct.pack("<IQQ", 1, AREA, AREA_SIZE)
    area = (area + struct.pack("<QQII", place, len(stored), checksum(stored), 0)).ljust(508, b"\0")
    disk[AREA : AREA + AREA_SIZE] = struct.pack("<I", checksum(area)) + area + ring
    return disk


BASE = bytes(physical_volume(GROUP.encode()))


@settings(max_examples=300)
@given(SECTIONS)
def test_format_then_parse(tree: Section) -> None:
    assert parse_config(format_config(tree)) == tree


@settings(max_examples=400)
@given(st.lists(st.sampled_from([*WORDS[:60], *STRANGE, "a/b", "#", "\n", "'", '"', "0", "9.", "x"]), max_size=30))
def test_any_text(words: list[str]) -> None:
    try:
        tree = parse_config(" ".join(words))
    except BadStructureError:
        return
    assert parse_config(format_config(tree)) == tree


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        *("a{" * 1_000_000, "a/" * 1_000_000 + "b=1", "a/b{" * 1_000_000, "}" * 1_000_000, "/" * 1_000_000),
        *("a=[" * 1_000_000, "a=[" + "1," * 1_000_000, '"' + "\\" * 1_000_000, '"' + '\\"' * 1_000_000),
        *("a=" + "9" * 1_000_000, "a=" + "1" * 1_000_000 + ".", "a=0" + "7" * 300, "a = " * 1_000_000),
        *(" " * MAX_TEXT + "x", "x" * 1_000_000, "a" * 1_000_000 + " = "),
    ],
    ids=lambda text: text[:8].strip() or "space",
)
def test_hostile_text_is_refused_soon(text: str) -> None:
    with pytest.raises(BadStructureError):
        parse_config(text)


def test_large_but_allowed() -> None:
    assert parse_config(" " * 1_000_000 + "#" * 1_000_000 + "\n#" * 1_000_000) == Section()
    assert len(parse_config("".join(f"a{number} = {number}\n" for number in range(100_000))).entries) == 100_000
    with pytest.raises(BadStructureError, match="too many"):
        parse_config("a=1\n" * 700_000)


def test_sections_may_be_nested_so_deeply() -> None:
    tree = parse_config("a{" * 32 + "}" * 32)
    assert parse_config(format_config(tree)) == tree
    with pytest.raises(BadStructureError, match="too deeply"):
        parse_config("a{" * 33 + "}" * 33)
    for _ in range(2):
        tree = Section((("a", tree),))
    with pytest.raises(BadStructureError, match="too deeply"):
        format_config(tree)


def check_group(text: str) -> None:
    """Parse it; a group, if it is one, can be asked for everything."""
    try:
        group = parse_volume_group(text)
    except BadStructureError:
        return
    pvs = {pv.id: pv for pv in group.pvs}
    assert set(visible_volumes(group)) <= set(group.lvs)
    for volume in group.lvs:
        assert volume.type == volume.segments[0].type
        assert volume_size(group, volume.name) > 0
        assert all(name in pvs or any(name == lv.name for lv in group.lvs) for name in volume.segments[0].volumes)
        try:
            ranges = physical_ranges(group, volume.name)
        except BadStructureError:
            continue
        assert sum(range_.size for range_ in ranges) == volume.size
        for range_ in ranges:
            pv = pvs[range_.pv]
            assert pv.data_start <= range_.offset
            assert range_.offset + range_.size <= pv.data_start + pv.extents * group.extent_size


def test_the_sound_group() -> None:
    group = parse_volume_group(GROUP)
    assert [volume.name for volume in visible_volumes(group)] == ["lin", "r1", "pool", "thin", "thinsnap", "cow"]
    assert volume_size(group, "cow") == 17 * MIB
    check_group(GROUP)


@settings(max_examples=500)
@given(
    st.lists(
        st.tuples(st.integers(0, len(WORDS) - 1), st.sampled_from([*STRANGE, *WORDS]), st.sampled_from("rid")),
        min_size=1,
        max_size=3,
    )
)
def test_any_group(changes: list[tuple[int, str, str]]) -> None:
    words = list(WORDS)
    for place, word, how in changes:
        place = min(place, len(words) - 1)
        words[place : place + (how != "i")] = [] if how == "d" else [word]
    check_group(" ".join(words))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('stripes = ["pv0", 62]', 'stripes = ["pool", 0]', "contains itself"),
        ('stripes = ["pv0", 62]', 'stripes = ["pool_tdata", 0]', "contains itself"),
        ('stripes = ["pv0", 62]', 'stripes = ["pv7", 0]', "needs volume 'pv7'"),
        ('stripes = ["pv0", 62]', 'stripes = ["pv0", 61]', "use extent 61 of pv0"),
        ('stripes = ["pv0", 62]', 'stripes = ["pv0", 169]', "reach beyond pv0"),
        ('stripes = ["pv0", 62]', "stripes = []", "does not go up into its stripes"),
        ("start_extent = 9", "start_extent = 10", "gaps or overlap"),
        ("extent_count = 9", "extent_count = 0", "gaps or overlap"),
        ("thinsnap {", '"$(x)" {', "cannot be the name"),
        ("thinsnap {", '"-rf" {', "cannot be the name"),
        ("thinsnap {", '".." {', "cannot be the name"),
        ("hSr7ot", "hSr7o", "not an identity"),
        ("hSr7ot-2dSO-gxRd-7fws-vjOL-pIN2-RvLPZw", "OuK8Jq-JzBH-vIAt-GLVG-thDS-MV4Q-eHdAgq", "the same identity"),
        ("extent_size = 2048", "extent_size = 0", "extent size"),
        ("version = 1", "version = 2", "not the metadata"),
        ("contents =", "other { } contents =", "or several"),
        ('"r1_rmeta_1", ', "", "list of pairs"),
        ("seqno = 38", "seqno = -38", "not a count"),
        ("pe_start = 4096", f"pe_start = {1 << 60}", "not a count"),
    ],
)
def test_groups_that_are_refused(old: str, new: str, reason: str) -> None:
    assert old in GROUP
    with pytest.raises(BadStructureError, match=reason):
        parse_volume_group(GROUP.replace(old, new, 1))


@pytest.mark.parametrize("place", [512, 1024, AREA_SIZE - 1, AREA_SIZE - 2000])
def test_the_ring(place: int) -> None:
    disk = bytes(physical_volume(GROUP.encode(), place))
    assert read_metadata(reader(disk), SIZE) == GROUP
    assert parse_label(reader(disk), SIZE).problems == ()


PLACES = st.integers(512, 1023) | st.integers(AREA, AREA + 600) | st.integers(0, AREA + 8192)


@settings(max_examples=400)
@given(
    st.dictionaries(PLACES, st.binary(min_size=1, max_size=8), max_size=6),
    st.booleans(),
    st.just(SIZE) | st.integers(0, SIZE),
)
def test_any_bytes(patches: dict[int, bytes], sealed: bool, size: int) -> None:
    disk = bytearray(BASE)
    for place, data in patches.items():
        disk[place : place + len(data)] = data
    if sealed:
        disk[528:532] = struct.pack("<I", checksum(bytes(disk[532:1024])))
        offset, length = struct.unpack_from("<QQ", disk, AREA + 40)
        if offset + length <= AREA_SIZE:
            disk[AREA + 56 : AREA + 60] = struct.pack(
                "<I", checksum(bytes(disk[AREA + offset : AREA + offset + length]))
            )
        disk[AREA : AREA + 4] = struct.pack("<I", checksum(bytes(disk[AREA + 4 : AREA + 512])))
    read = reader(bytes(disk[:size]))
    try:
        label = parse_label(read, size)
    except BadStructureError:
        with pytest.raises(BadStructureError):
            read_metadata(read, size)
        return
    assert all(area.start + area.size <= size for area in label.metadata_areas)
    try:
        text = read_metadata(read, size)
    except BadStructureError:
        assert label.problems
        return
    if text is not None:
        check_group(text)
