"""A layout record comes from a repository that somebody may have tampered with."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import msgspec.json
import msgspec.structs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.errors import RefusedError
from remetal.layout.model import (
    ArrayMember,
    Disk,
    GptTable,
    Layer,
    Layout,
    Partition,
)
from remetal.layout.plan import PlanOptions, Target, plan_restore
from remetal.layout.record import ImpossibleLayoutError, check_layout, decode_layout, encode_layout
from tests.sample_layout import (
    ARRAY,
    GROUP,
    GUID,
    LINUX,
    METADATA,
    MIB,
    images_of,
    sample,
)


def tampered(change: Any) -> bytes:
    record = json.loads(encode_layout(sample()))
    change(record)
    return json.dumps(record).encode()


def put(*path: Any) -> Any:
    """Return a change that sets the value at `path[:-1]` to the last word."""

    def change(record: Any) -> None:
        for key in path[:-2]:
            record = record[key]
        record[path[-2]] = path[-1]

    return change


def metadata(before: str, after: str) -> Any:
    """Return a change of the text that describes the volume group."""
    assert before in METADATA

    def change(record: Any) -> None:
        record["layers"][11]["metadata"] = METADATA.replace(before, after)

    return change


def twice(layer: int, field: str, **changes: Any) -> Any:
    """Return a change that repeats the first item of a list, with other values."""

    def change(record: Any) -> None:
        items = record["layers"][layer][field]
        items.append({**items[0], **changes} if isinstance(items[0], dict) else items[0])

    return change


def both(*changes: Any) -> Any:
    def change(record: Any) -> None:
        for each in changes:
            each(record)

    return change


def rename_group(name: str) -> Any:
    """Return a change that gives the group another name everywhere."""
    return both(put("layers", 11, "name", name), metadata("vg0 {", f'"{name}" {{'))


OTHER_ID = "zzzzzz-zzzz-zzzz-zzzz-zzzz-zzzz-zzzzzz"
HOSTILE = {
    "newer version": put("version", 2),
    "unknown field": put("extra", 1),
    "name with a slash": put("disks", 0, "name", "../sda"),
    "name like an option": put("disks", 0, "name", "-rf"),
    "name with an escape": put("disks", 0, "name", "a\x1b[2J"),
    "same name": put("disks", 1, "name", "sda"),
    "no size": put("disks", 0, "size", 0),
    "negative size": put("disks", 0, "size", -512),
    "huge size": put("disks", 0, "size", 1 << 63),
    "odd size": put("disks", 0, "size", 16 * MIB + 1),
    "sector of one byte": put("disks", 0, "logical_sector", 1),
    "sector of no byte": put("disks", 0, "logical_sector", 0),
    "partition before the entries": put("layers", 0, "partitions", 0, "start", 512),
    "partition at a negative place": put("layers", 0, "partitions", 0, "start", -MIB),
    "partition behind the disk": put("layers", 0, "partitions", 1, "start", 16 * MIB),
    "partition over the backup": put("layers", 0, "partitions", 1, "size", 5 * MIB),
    "partition over another": put("layers", 0, "partitions", 0, "size", 10 * MIB + 512),
    "partition of no size": put("layers", 0, "partitions", 1, "size", 0),
    "partition of a negative size": put("layers", 0, "partitions", 1, "size", -512),
    "partition between sectors": put("layers", 0, "partitions", 1, "start", 11 * MIB + 1),
    "size between sectors": put("layers", 0, "partitions", 1, "size", MIB - 1),
    "same number": put("layers", 0, "partitions", 1, "number", 1),
    "number behind the entries": put("layers", 0, "partitions", 1, "number", 129),
    "number zero": put("layers", 0, "partitions", 1, "number", 0),
    "type that is no GUID": put("layers", 0, "partitions", 1, "type", "linux"),
    "lower-case GUID": put("layers", 0, "partitions", 1, "uuid", GUID.lower()),
    "long name": put("layers", 0, "partitions", 1, "name", "x" * 37),
    "name beyond the basic plane": put("layers", 0, "partitions", 1, "name", "\U0001f4a9" * 19),
    "name with a zero": put("layers", 0, "partitions", 1, "name", "a\0b"),
    "attributes of 65 bits": put("layers", 0, "partitions", 1, "attributes", 1 << 64),
    "record on GPT": put("layers", 0, "partitions", 1, "record", 512),
    "many entries": put("layers", 0, "entry_count", 1 << 40),
    "no entries": put("layers", 0, "entry_count", 0),
    "short boot record": put("layers", 0, "protective_mbr", "AAAA"),
    "first usable behind a partition": put("layers", 0, "first_usable", 12 * MIB),
    "table on a partition": put("layers", 0, "on", "m.img:1"),
    "table nowhere": put("layers", 0, "on", "sdz"),
    "two layers on a space": put("layers", 3, "on", "sda:1"),
    "layer nowhere": put("layers", 3, "on", "sda:9"),
    "layer on nothing": put("layers", 3, "on", ":"),
    "layer with an odd number": put("layers", 3, "on", "sda:02"),
    "unknown layer": put("layers", 3, "layer", "rm"),
    "volume larger than its space": put("layers", 2, "size", 11 * MIB),
    "volume of a negative size": put("layers", 2, "size", -1),
    "type like an option": put("layers", 2, "type", "ext4 -F /dev/sda"),
    "type like a path": put("layers", 2, "type", "../../bin/sh"),
    "empty type": put("layers", 2, "type", ""),
    "uuid like an option": put("layers", 2, "uuid", "--all /dev/sda"),
    "label with a zero": put("layers", 2, "label", "a\0"),
    "blocks of no size": put("layers", 2, "block_size", 0),
    "used more than there is": put("layers", 2, "used", 1 << 60),
    "pages of three bytes": put("layers", 3, "page_size", 3),
    "tiny swap": put("layers", 3, "size", 4096),
    "long swap label": put("layers", 3, "label", "ä" * 9),
    "raw type like an option": put("layers", 5, "type", "-x y"),
    "signature": put("layers", 4, "signature", "xyz"),
    "boot code": put("layers", 4, "boot_code", "AAAA"),
    "MBR type": put("layers", 4, "partitions", 0, "type", "0x83"),
    "MBR type zero": put("layers", 4, "partitions", 0, "type", "00"),
    "MBR status": put("layers", 4, "partitions", 0, "attributes", 256),
    "MBR with GUIDs": put("layers", 4, "partitions", 0, "uuid", GUID),
    "logical outside": put("layers", 4, "partitions", 2, "start", 13 * MIB),
    "logical over the next record": put("layers", 4, "partitions", 2, "size", 2 * MIB + 512),
    "logical numbers with a gap": put("layers", 4, "partitions", 3, "number", 7),
    "records in one place": put("layers", 4, "partitions", 3, "record", 4 * MIB),
    "record outside": put("layers", 4, "partitions", 3, "record", 512),
    "record behind its partition": put("layers", 4, "partitions", 3, "record", 10 * MIB),
    "logical without record": put("layers", 4, "partitions", 3, "record", 0),
    "logical that holds others": put("layers", 4, "partitions", 3, "type", "05"),
    "two extended": put("layers", 4, "partitions", 0, "type", "0f"),
    "logical without extended": put("layers", 4, "partitions", 1, "type", "83"),
    "volume on the extended": put("layers", 5, "on", "m.img:2"),
    **{
        f"array named {name!r}": put("layers", 8, "device", name)
        for name in (
            "md/-rf",
            "md/$(x)",
            "md/../sda",
            "../md/root",
            "md/",
            "root",
            "md/a b",
            "md/a\x1b[2J",
            "sda",
            "vg0/root",
            "",
        )
    },
    **{
        f"array that calls itself {name!r}": put("layers", 8, "name", name)
        for name in ("$(x)", "a/b", "a\nb", "x" * 33, "\x1b[2J", "a'b")
    },
    "array uuid": put("layers", 8, "uuid", "--uuid=1"),
    "array of level raid7": put("layers", 8, "level", "raid7"),
    "array of another level": put("layers", 8, "level", "raid5"),
    "array with metadata ddf": put("layers", 8, "metadata", "ddf"),
    "array with metadata 0.90 and a name": put("layers", 8, "metadata", "0.90"),
    "array with a layout": put("layers", 8, "layout", "-f"),
    "array with chunks": put("layers", 8, "chunk", 65536),
    "array with half a chunk": both(put("layers", 8, "level", "raid0"), put("layers", 8, "chunk", 513)),
    "array with a negative chunk": put("layers", 8, "chunk", -1024),
    "array of no slots": put("layers", 8, "slots", 0),
    "array of fewer slots": put("layers", 8, "slots", 1),
    "array of 10**9 slots": put("layers", 8, "slots", 10**9),
    "array of a negative size": put("layers", 8, "size", -MIB),
    "array larger than its members": put("layers", 8, "size", 1 << 60),
    "array of no component": put("layers", 8, "component_size", 0),
    "array with components beyond": both(
        put("layers", 8, "component_size", 64 * MIB), put("layers", 8, "size", 64 * MIB)
    ),
    "array with a negative offset": put("layers", 8, "members", 0, "data_offset", -MIB),
    "array with data beyond its member": put("layers", 8, "members", 0, "data_size", 1 << 60),
    "array with less data than component": put("layers", 8, "members", 0, "data_size", MIB),
    "array with a huge bitmap chunk": put("layers", 8, "bitmap_chunk", 1 << 50),
    "array with a bitmap chunk of three": put("layers", 8, "bitmap_chunk", 3),
    "array with a negative minor": put("layers", 8, "minor", -2),
    "array with a member twice": twice(8, "members", slot=-1),
    "array with a slot twice": put("layers", 8, "members", 1, "slot", 0),
    "array with a slot beyond": put("layers", 8, "members", 1, "slot", 2),
    "array with a slot of minus two": put("layers", 8, "members", 1, "slot", -2),
    "array whose members are out of order": both(
        put("layers", 8, "members", 0, "slot", 1), put("layers", 8, "members", 1, "slot", 0)
    ),
    "array with a missing spare": twice(8, "members", space="", slot=-1),
    "array without members": put("layers", 8, "members", []),
    "array of missing members": both(
        put("layers", 8, "members", 0, "space", ""), put("layers", 8, "members", 1, "space", "")
    ),
    "array that lacks too many": both(put("layers", 8, "level", "raid0"), put("layers", 8, "members", 1, "space", "")),
    "array on itself": put("layers", 8, "members", 0, "space", "md/root"),
    "array on what stands on it": put("layers", 8, "members", 0, "space", "md/root:luks"),
    "array on a later device": put("layers", 8, "members", 0, "space", "vg0/root"),
    "array on a space that is taken": put("layers", 8, "members", 0, "space", "sda:1"),
    "array nowhere": put("layers", 8, "members", 0, "space", "sdz"),
    "two arrays of one name": both(
        put(
            "layers",
            5,
            {
                **json.loads(msgspec.json.encode(ARRAY)),
                "members": [{"space": "m.img:5", "slot": 0, "data_size": MIB}],
                "slots": 1,
                "size": MIB,
                "component_size": MIB,
                "bitmap": False,
                "bitmap_chunk": 0,
            },
        ),
    ),
    "LUKS of version 3": put("layers", 9, "version", 3),
    "LUKS with an uuid like an option": put("layers", 9, "uuid", "-rf"),
    "LUKS with a path for a cipher": put("layers", 9, "cipher", "../../etc/passwd"),
    "LUKS with a label with a zero": put("layers", 9, "label", "a\0"),
    "LUKS with sectors of three": put("layers", 9, "sector_size", 3),
    "LUKS with no header": put("layers", 9, "header_size", 0),
    "LUKS with a header as large as a disk": put("layers", 9, "header_size", 1 << 40),
    "LUKS with a header between sectors": put("layers", 9, "header_size", 2 * MIB - 1),
    "LUKS larger than its space": put("layers", 9, "size", 61 * MIB),
    "LUKS of half a sector": put("layers", 9, "size", 59 * MIB + 512),
    "LUKS of no size": put("layers", 9, "size", 0),
    "LUKS with a huge key": put("layers", 9, "key_size", 1 << 40),
    "LUKS with a negative key": put("layers", 9, "key_size", -1),
    "LUKS with slot 32": put("layers", 9, "key_slots", [32]),
    "LUKS with a slot twice": put("layers", 9, "key_slots", [1, 1]),
    "LUKS with an odd token": put("layers", 9, "tokens", ["\x1b[2J"]),
    "LUKS on itself": put("layers", 9, "on", "md/root:luks"),
    "LUKS on its header": put("layers", 9, "on", "md/root:header"),
    "layer on a header": put("layers", 10, "on", "md/root:header"),
    "layer on a key": put("layers", 10, "on", "md/root:key"),
    "layer on a pool": put("layers", 13, "on", "vg0/pool"),
    "layer on a hidden volume": put("layers", 13, "on", "vg0/pool_tdata"),
    **{f"group named {name!r}": rename_group(name) for name in ("-rf", "$(x)", "../x", "..", ".", "md", "a b", "a/b")},
    "group uuid": both(put("layers", 11, "uuid", "--uuid"), metadata('"vvvvvv', '"--uuid')),
    "group with extents of no size": put("layers", 11, "extent_size", 0),
    "group with extents of a negative size": put("layers", 11, "extent_size", -512),
    "group with extents of three bytes": put("layers", 11, "extent_size", 3),
    "group with other extents": put("layers", 11, "extent_size", 2 * MIB),
    "group with a missing volume": put("layers", 11, "members", 0, "space", ""),
    "group with a member twice": put("layers", 11, "members", 1, "space", "sdb:2"),
    "group with more extents": put("layers", 11, "members", 0, "extents", 1 << 40),
    "group with negative extents": put("layers", 11, "members", 0, "extents", -1),
    "group that begins elsewhere": put("layers", 11, "members", 0, "data_start", 2 * MIB),
    "group that begins before": put("layers", 11, "members", 0, "data_start", -MIB),
    "group with nine copies of its metadata": put("layers", 11, "members", 0, "metadata_copies", 9),
    "group without metadata": both(
        put("layers", 11, "members", 0, "metadata_copies", 0), put("layers", 11, "members", 1, "metadata_copies", 0)
    ),
    "group with another name for a member": put("layers", 11, "members", 0, "name", "pv7"),
    "group without members": put("layers", 11, "members", []),
    "two groups of one name": put(
        "layers",
        5,
        {
            **json.loads(msgspec.json.encode(GROUP)),
            "members": [{"space": "m.img:5", "name": "pv0", "uuid": OTHER_ID, "data_start": 0, "extents": 0}],
            "volumes": [],
        },
    ),
    "volume of another size": put("layers", 11, "volumes", 0, "size", 100 * MIB),
    "volume of another name": put("layers", 11, "volumes", 0, "name", "toor"),
    "volume of another uuid": put("layers", 11, "volumes", 0, "uuid", OTHER_ID),
    "volume that is twice there": twice(11, "volumes"),
    "volume that the text lacks": twice(11, "volumes", name="more", uuid=OTHER_ID),
    "volume that is not linear": put("layers", 11, "volumes", 2, "kind", "linear"),
    "volume with another pool": put("layers", 11, "volumes", 2, "pool", "root"),
    "volume that stems from itself": put("layers", 11, "volumes", 2, "origin", "thin.1"),
    "text that is none": put("layers", 11, "metadata", ""),
    "text of something else": put("layers", 11, "metadata", "version = 1"),
    "text with an escape": put("layers", 11, "metadata", "\x1b[2J"),
    "text with another group": metadata("vg0 {", "vg1 {"),
    "text with another uuid": metadata("vvvvvv-vvvv", "vvvvvv-vvvw"),
    "text with two groups": metadata("contents =", "other { id = 1 }\ncontents ="),
    "text with larger extents": metadata("extent_size = 8192", "extent_size = 16384"),
    "text with no extents": metadata("extent_size = 8192", "extent_size = 0"),
    "text with fewer extents": metadata("pe_count = 31", "pe_count = 30"),
    "text with volumes elsewhere": metadata("pe_start = 2048", "pe_start = 0"),
    "text with another member": metadata("pppppp-pppp", "pppppp-pppq"),
    "text with a smaller volume": metadata("extent_count = 4", "extent_count = 3"),
    "text with a hidden root": metadata(
        'rrrrrr"\nstatus = ["READ", "WRITE", "VISIBLE"]', 'rrrrrr"\nstatus = ["READ", "WRITE"]'
    ),
    "text without a volume": metadata("thin.1 {", "thin.2 {"),
    "text with a volume beyond": metadata('"pv0", 0', '"pv0", 20'),
    "text with volumes that overlap": metadata('"pv1", 5', '"pv1", 3'),
    "text with a volume on nothing": metadata('"pv1", 5', '"pv2", 5'),
    "text with a volume on itself": metadata('"pv1", 5', '"pool_tdata", 0'),
    "text of an exported group": metadata('["RESIZEABLE", "READ", "WRITE"]', '["EXPORTED"]'),
    "text of a shared group": metadata('format = "lvm2"', 'lock_type = "sanlock"'),
    "text with a name like an option": both(
        put("layers", 11, "volumes", 0, "name", "-rf"),
        put("layers", 12, "on", "vg0/-rf"),
        metadata("root {", '"-rf" {'),
    ),
    "parts of an ext4": put("layers", 14, "type", "ext4"),
    "parts that begin elsewhere": put("layers", 14, "on", "sdc:3"),
    "parts with a number twice": put("layers", 14, "parts", 1, "number", 1),
    "parts with number zero": put("layers", 14, "parts", 1, "number", 0),
    "parts in one place": put("layers", 14, "parts", 1, "space", "sdb:3"),
    "parts nowhere": put("layers", 14, "parts", 1, "space", "sdz"),
    "parts beyond their space": both(
        put("layers", 14, "parts", 1, "size", 1 << 40), put("layers", 14, "size", (1 << 40) + 120 * MIB)
    ),
    "parts of a negative size": both(put("layers", 14, "parts", 1, "size", -MIB), put("layers", 14, "size", 119 * MIB)),
    "parts of other sizes": put("layers", 14, "size", 1 << 40),
    "feature like an option": put("layers", 14, "features", ["none,^extent /dev/sda"]),
    "feature with an escape": put("layers", 14, "features", ["\x1b[2J"]),
    "blocks of three bytes": put("layers", 14, "block_size", 4097),
    "sectors of three bytes": put("layers", 14, "sector", 3),
    "sectors of a negative size": put("layers", 14, "sector", -512),
    "files of a negative number": put("layers", 10, "making", "inodes_used", -1),
    "inodes of three bytes": put("layers", 10, "making", "inode_size", 3),
    "mount option with a comma": put("layers", 10, "making", "mount_options", ["acl,journal_data"]),
    "mount text with a zero": put("layers", 10, "making", "mount_text", "a\0"),
    "a journal of a negative size": put("layers", 10, "making", "journal", -1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_record(name: str) -> None:
    assert decode_layout(tampered(lambda record: None)) == sample()
    with pytest.raises(ImpossibleLayoutError) as caught:
        decode_layout(tampered(HOSTILE[name]))
    assert caught.value.hint
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"disks":1}'])
def test_no_record_at_all(data: bytes) -> None:
    with pytest.raises(ImpossibleLayoutError):
        decode_layout(data)


def leaves(record: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(record, dict):
        return [leaf for key, value in record.items() for leaf in leaves(value, (*path, key))]
    if isinstance(record, list):
        return [leaf for index, value in enumerate(record) for leaf in leaves(value, (*path, index))]
    return [path]


VALUES: st.SearchStrategy[object] = st.one_of(
    st.integers(-(1 << 70), 1 << 70),
    st.integers(0, 32).map(lambda value: value * 512 * 1024),
    st.integers(0, 8),
    st.text(max_size=20),
    st.sampled_from([None, True, 1.5, [], {}, "sda:1", "sda:boot", "m.img", "05", LINUX]),
    st.sampled_from(["sdb:1", "sdb:2", "md/root", "md/root:luks", "vg0/root", "raid0", "raid10", "n2", "1.0", "btrfs"]),
)


@settings(max_examples=400)
@given(st.data())
def test_whatever_is_accepted_can_be_planned_or_is_refused(data: st.DataObject) -> None:
    """Two tampered values at a time: the record is refused, or planning it ends in a plan inside its disks."""
    record = json.loads(encode_layout(sample()))
    for path in data.draw(st.lists(st.sampled_from(leaves(record)), min_size=1, max_size=2)):
        put(*path, data.draw(VALUES))(record)
    try:
        layout = decode_layout(json.dumps(record).encode())
    except ImpossibleLayoutError:
        return
    images = images_of(layout)
    targets = {
        disk.name: Target(path=f"/t/{disk.name}", name=disk.name, size=disk.size + 4 * MIB, is_file=True)
        for disk in layout.disks
    }
    with suppress(RefusedError):
        check_layout(plan_restore(layout, images, targets, snapshot="s", options=PlanOptions()).result)


def test_hostile_images_are_refused() -> None:
    layout = sample()
    targets = {disk.name: Target(path=f"/{disk.name}", name=disk.name, size=disk.size) for disk in layout.disks}
    good = images_of(layout)
    plan_restore(layout, good, targets, snapshot="s", options=PlanOptions())
    least = {each.volume: each.size for each in layout.captured()}
    for volume, facts in good.items():
        for size in (-1, 0, least[volume] - 1, facts.size + 512):
            bad = {**good, volume: msgspec.structs.replace(facts, size=size)}
            with pytest.raises(RefusedError, match=f"image of {volume}"):
                plan_restore(layout, bad, targets, snapshot="s", options=PlanOptions())
        missing = {name: each for name, each in good.items() if name != volume}
        with pytest.raises(RefusedError, match=f"no image of volume {volume}"):
            plan_restore(layout, missing, targets, snapshot="s", options=PlanOptions())


def long(count: int, **fields: object) -> Any:
    """Return a change that repeats a list's first item until it has that many, numbered where they need it."""
    (path, item), *_ = fields.items()
    layer, _, name = path.partition("_")

    def change(record: Any) -> None:
        assert callable(item)
        record["layers"][int(layer[1:])][name] = [item(index) for index in range(count)]

    return change


MANY = 1_000_000
HUGE = {
    "partitions": long(MANY, l0_partitions=lambda index: {"number": index, "start": 0, "size": 1, "type": ""}),
    "logical partitions": long(
        MANY // 2, l4_partitions=lambda index: {"number": index + 5, "start": 0, "size": 1, "type": "83", "record": 1}
    ),
    "layers": put("layers", [{"layer": "raw", "on": "sda", "size": 1}] * MANY),
    "disks": put("disks", [{"name": "a", "size": 512}] * MANY),
    "members": long(MANY, l8_members=lambda index: {"space": "sdb:1", "slot": index}),
    "missing members": long(MANY, l8_members=lambda index: {"space": "", "slot": index}),
    "physical volumes": long(
        MANY // 2, l11_members=lambda index: {"space": "", "name": "", "uuid": "", "data_start": 0, "extents": 0}
    ),
    "logical volumes": long(
        MANY // 2, l11_volumes=lambda index: {"name": f"v{index}", "uuid": "", "size": 1, "kind": ""}
    ),
    "parts": long(MANY, l14_parts=lambda index: {"space": "sdb:3", "number": index, "size": 1}),
    "features": put("layers", 14, "features", ["a"] * MANY),
    "key slots": put("layers", 9, "key_slots", [1] * MANY),
    "tokens": put("layers", 9, "tokens", ["a"] * MANY),
    "words of a volume group": put("layers", 11, "metadata", "a = 1\n" * MANY),
    "a long text": put("layers", 11, "metadata", METADATA + "#" * (60 << 20)),
    "sections in sections": put("layers", 11, "metadata", "a {" * MANY),
    "extents": both(
        put("layers", 11, "members", 0, "extents", 1 << 62), metadata("pe_count = 31", f"pe_count = {1 << 62}")
    ),
    "slots": both(put("layers", 8, "slots", 1 << 62), put("layers", 8, "level", "raid5")),
    "copies": both(put("layers", 8, "level", "raid10"), put("layers", 8, "layout", f"n{1 << 62}")),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_records_are_refused_at_once(name: str) -> None:
    data = tampered(HUGE[name])
    began = time.process_time()
    with pytest.raises(ImpossibleLayoutError):
        decode_layout(data)
    assert time.process_time() - began < 1


def mirrors(levels: int, copies: int) -> bytes:
    """Return a record of mirrors on mirrors: each of the partitions of the one below."""
    disk = Disk(name="sda", size=1 << 50)
    layers: list[Layer] = []
    place, size = "sda", disk.size
    for level in range(levels):
        share = (size - (1 << 30)) // copies // (1 << 30) * (1 << 30)
        partitions = tuple(
            Partition(number=index + 1, start=(1 << 29) + index * share, size=share, type=LINUX, uuid=GUID)
            for index in range(copies)
        )
        layers.append(
            GptTable(on=place, disk_guid=GUID, entry_count=128, partitions=partitions, protective_mbr=bytes(512))
        )
        members = tuple(
            ArrayMember(space=f"{place}:{each.number}", slot=each.number - 1, data_size=share) for each in partitions
        )
        array = msgspec.structs.replace(
            ARRAY, device=f"md/{level}", members=members, slots=copies, component_size=share, size=share
        )
        layers.append(array)
        place, size = array.device, share
    return encode_layout(Layout(disks=(disk,), layers=tuple(layers)))


@pytest.mark.parametrize("shape", [(4, 100), (17, 2), (33, 1), (400, 1)])
def test_towers_of_layers_are_refused_at_once(shape: tuple[int, int]) -> None:
    """A walk through such a record would never end: every path from a volume to the disks is gone."""
    data = mirrors(*shape)
    began = time.process_time()
    with pytest.raises(ImpossibleLayoutError, match=r"more layers|impossible|overlap"):
        decode_layout(data)
    assert time.process_time() - began < 1


def test_what_real_machines_stack_is_taken() -> None:
    layout = decode_layout(mirrors(3, 4))
    targets = {"sda": Target(path="/t/sda", name="sda", size=1 << 50)}
    plan_restore(layout, {}, targets, snapshot="s", options=PlanOptions())
