"""A layout record comes from a repository that somebody may have tampered with."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import msgspec.structs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remetal.errors import DamagedError, RefusedError
from remetal.layout.model import (
    Disk,
    FileSystem,
    GptTable,
    Layout,
    MbrTable,
    Partition,
    Raw,
    Swap,
    check_layout,
    decode_layout,
    encode_layout,
)
from remetal.layout.plan import ImageFacts, PlanOptions, Target, plan_restore

MIB = 1 << 20
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
GUID = "12345678-1234-4234-8234-1234567890AB"


def sample() -> Layout:
    """A layout with one of everything."""
    gpt = GptTable(
        on="sda",
        disk_guid=GUID,
        entry_count=128,
        first_usable=MIB,
        partitions=(
            Partition(number=1, start=MIB, size=10 * MIB, type=LINUX, uuid=GUID, name="root"),
            Partition(number=2, start=11 * MIB, size=MIB, type=LINUX, uuid=GUID),
        ),
        protective_mbr=bytes(512),
    )
    mbr = MbrTable(
        on="m.img",
        signature="0badcafe",
        partitions=(
            Partition(number=1, start=MIB, size=2 * MIB, type="83", attributes=0x80),
            Partition(number=2, start=4 * MIB, size=8 * MIB, type="05"),
            Partition(number=5, start=5 * MIB, size=MIB, type="83", record=4 * MIB),
            Partition(number=6, start=8 * MIB, size=MIB, type="83", record=7 * MIB),
        ),
        boot_code=bytes(440),
    )
    return Layout(
        disks=(Disk(name="sda", size=16 * MIB), Disk(name="m.img", size=16 * MIB)),
        layers=(
            gpt,
            Raw(on="sda:boot", size=MIB - 34 * 512),
            FileSystem(on="sda:1", type="ext4", size=9 * MIB, used=MIB, block_size=4096, uuid=GUID.lower(), label="r"),
            Swap(on="sda:2", size=MIB, uuid=GUID.lower(), label="s"),
            mbr,
            Raw(on="m.img:5", size=MIB, type="LVM2_member"),
        ),
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
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_record(name: str) -> None:
    assert decode_layout(tampered(lambda record: None)) == sample()
    with pytest.raises(DamagedError) as caught:
        decode_layout(tampered(HOSTILE[name]))
    assert caught.value.hint
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"disks":1}'])
def test_no_record_at_all(data: bytes) -> None:
    with pytest.raises(DamagedError):
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
)


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_whatever_is_accepted_can_be_planned_or_is_refused(data: st.DataObject) -> None:
    """Two tampered values at a time: the record is refused, or planning it ends in a plan inside its disks."""
    record = json.loads(encode_layout(sample()))
    for path in data.draw(st.lists(st.sampled_from(leaves(record)), min_size=1, max_size=2)):
        put(*path, data.draw(VALUES))(record)
    try:
        layout = decode_layout(json.dumps(record).encode())
    except DamagedError:
        return
    images = {
        volume.on: ImageFacts(size=layout.place(volume.on)[2], used=0, digest="d") for volume in layout.captured()
    }
    targets = {
        disk.name: Target(path=f"/t/{disk.name}", name=disk.name, size=disk.size + 4 * MIB, is_file=True)
        for disk in layout.disks
    }
    with suppress(RefusedError):
        check_layout(plan_restore(layout, images, targets, snapshot="s", options=PlanOptions()).result)


def test_hostile_images_are_refused() -> None:
    layout = sample()
    targets = {disk.name: Target(path=f"/{disk.name}", name=disk.name, size=disk.size) for disk in layout.disks}
    good = {volume.on: ImageFacts(size=layout.place(volume.on)[2], used=0, digest="d") for volume in layout.captured()}
    plan_restore(layout, good, targets, snapshot="s", options=PlanOptions())
    for volume, facts in good.items():
        for size in (-1, 0, facts.size - 2 * MIB, facts.size + 512):
            bad = {**good, volume: msgspec.structs.replace(facts, size=size)}
            with pytest.raises(RefusedError, match=f"image of {volume}"):
                plan_restore(layout, bad, targets, snapshot="s", options=PlanOptions())
        missing = {name: each for name, each in good.items() if name != volume}
        with pytest.raises(RefusedError, match=f"no image of volume {volume}"):
            plan_restore(layout, missing, targets, snapshot="s", options=PlanOptions())
