"""Damaged partition tables on a disk, and layout records that somebody with a machine's keys has made up."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from remetal.layout.model import Disk, GptTable, Layout, Partition
from remetal.layout.record import encode_layout
from remetal.repository.repository import load_machine_keys
from remetal.repository.session import open_session
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.units import MIB
from remetal.workflows.access import opened_repository
from tests.commands.site import Site, hash_file
from tests.real_disks import blank, make_gpt_disk

LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
GUID = "12345678-1234-4234-8234-1234567890AB"
SIZE = 16 * MIB


def dos_disk(path: Path, *ranges: tuple[int, int]) -> Path:
    """Make a disk with a DOS table of these primary partitions, in sectors, as no partitioner would write it."""
    disk = blank(path, SIZE)
    entries = b"".join(struct.pack("<B3sB3sII", 0, bytes(3), 0x83, bytes(3), *each) for each in ranges)
    with disk.open("r+b") as file:
        file.write(bytes(440) + b"\xef\xbe\xad\xde\0\0" + entries.ljust(64, b"\0") + b"\x55\xaa")
        for place in range(MIB, SIZE, MIB):
            file.seek(place)
            file.write(os.urandom(4096))
    return disk


@pytest.mark.parametrize(
    "ranges",
    [
        ((2048, 8192), (4096, 8192)),
        ((2048, 8192), (2048, 8192)),
        ((2048, 1 << 20),),
        ((0xFFFFFF00, 0xFFFFFF00),),
        ((0, 8192),),
    ],
)
def test_partitions_that_cannot_be_lose_nothing(
    site: Site, tmp_path: Path, ranges: tuple[tuple[int, int], ...]
) -> None:
    """Overlapping or out of range: nobody knows what is whose, so all bytes are carried, and that is said."""
    disk = dos_disk(tmp_path / "d.img", *ranges)
    before = hash_file(disk)
    assert "captured whole" in site.remetal("backup", "--disk", disk).err
    assert hash_file(disk) == before
    site.remetal("restore", "latest", "--map", tmp_path / "new.img", "--yes", "--no-adapt", "--verify")
    assert hash_file(tmp_path / "new.img") == before


def test_a_gpt_whose_disk_lost_its_end_loses_nothing(site: Site, tmp_path: Path) -> None:
    disk = make_gpt_disk(tmp_path / "d.img")
    os.truncate(disk, 90 * MIB)
    assert "captured whole" in site.remetal("backup", "--disk", disk).err
    site.remetal("restore", "latest", "--map", tmp_path / "new.img", "--yes", "--no-adapt")
    assert hash_file(tmp_path / "new.img") == hash_file(disk)


@pytest.mark.parametrize("place", [512 + 16, 512 + 72, 1024 + 3, 1024 + 40])
def test_a_damaged_gpt_with_a_good_backup_works_and_is_told(site: Site, tmp_path: Path, place: int) -> None:
    disk = make_gpt_disk(tmp_path / "d.img")
    with disk.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))
    assert "backup is used" in site.remetal("backup", "--disk", disk).err
    new = tmp_path / "new.img"
    site.remetal("restore", "latest", "--map", new, "--yes", "--no-adapt")
    said = subprocess.run(["sgdisk", "--verify", new], capture_output=True, text=True, check=False).stdout
    assert "No problems found" in said
    for start, sectors in ((110592, 20480), (2048, 2048)):
        with disk.open("rb") as one, new.open("rb") as other:
            one.seek(start * 512)
            other.seek(start * 512)
            assert one.read(sectors * 512) == other.read(sectors * 512)
    with attach_loop(Span(new, 131072 * 512, 65536 * 512)) as device:
        subprocess.run(["e2fsck", "-fn", device], check=True, capture_output=True)


def sample() -> Layout:
    """A blank disk with a table, so that there is nothing to capture."""
    table = GptTable(
        on="d.img",
        disk_guid=GUID,
        entry_count=128,
        partitions=(
            Partition(number=1, start=MIB, size=4 * MIB, type=LINUX, uuid=GUID, name="one"),
            Partition(number=2, start=5 * MIB, size=4 * MIB, type=LINUX, uuid=GUID, name="two"),
        ),
        protective_mbr=bytes(510) + b"\x55\xaa",
    )
    return Layout(disks=(Disk(name="d.img", size=SIZE),), layers=(table,))


def commit(site: Site, record: bytes) -> None:
    """Put a snapshot with this layout into the repository, signed with the machine's own keys."""
    with opened_repository(str(site.repository)) as repository:
        keys = load_machine_keys(site.folder / "state" / "machines" / "web", repository)
        assert keys is not None
        with open_session(repository, keys) as session:
            session.commit(layout=record, hostname="web")


def put(*path: Any) -> Callable[[Any], None]:
    """Return a change that sets the value at `path[:-1]` to the last word."""

    def change(record: Any) -> None:
        for key in path[:-2]:
            record = record[key]
        record[path[-2]] = path[-1]

    return change


ARRAY = {
    "layer": "md",
    "device": "md/0",
    "size": 3 * MIB,
    "members": [{"space": "d.img:1", "slot": 0, "data_offset": MIB, "data_size": 3 * MIB}],
    "uuid": "00112233:44556677:8899aabb:ccddeeff",
    "level": "raid1",
    "metadata": "1.2",
    "slots": 1,
    "component_size": 3 * MIB,
}


def with_array(**changes: object) -> Callable[[Any], None]:
    return lambda record: record["layers"].append({**ARRAY, **changes})


HOSTILE: Mapping[str, Callable[[Any], None]] = {
    "overlapping partitions": put("layers", 0, "partitions", 1, "start", 2 * MIB),
    "a partition out of range": put("layers", 0, "partitions", 1, "size", 1 << 40),
    "a partition before the table": put("layers", 0, "partitions", 0, "start", 0),
    "a disk named -rf": put("disks", 0, "name", "-rf"),
    "a disk named $(x)": put("disks", 0, "name", "$(reboot)"),
    "a disk named ../sda": put("disks", 0, "name", "../sda"),
    "an array on itself": with_array(members=[{**ARRAY["members"][0], "space": "md/0"}]),  # type: ignore[index]
    "an array larger than its disk": with_array(size=1 << 50, component_size=1 << 50),
    "an array named md/../../etc": with_array(device="md/../../etc"),
    "layers on one another in a ring": lambda record: record["layers"].extend(
        [
            {**ARRAY, "device": "md/0", "members": [{"space": "md/1", "slot": 0, "data_size": 3 * MIB}]},
            {**ARRAY, "device": "md/1", "members": [{"space": "md/0", "slot": 0, "data_size": 3 * MIB}]},
        ]
    ),
    "half a million partitions": lambda record: record["layers"][0].update(
        partitions=[{"number": 1, "start": 0, "size": 1, "type": ""}] * 500_000
    ),
    "no layout at all": lambda record: record.clear(),
}


def test_hostile_layouts_are_refused_and_no_target_is_touched(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "target.img"
    target.write_bytes(os.urandom(SIZE))
    before = hash_file(target)
    site.remetal("backup", "--machine", "web", "--disk", dos_disk(tmp_path / "first.img"))
    commit(site, encode_layout(sample()))
    words = ("latest", "--map", target, "--overwrite", target)
    site.remetal("plan", *words)
    for name, change in HOSTILE.items():
        record = json.loads(encode_layout(sample()))
        change(record)
        commit(site, json.dumps(record).encode())
        told = site.remetal("plan", *words, code=3)
        assert "layout record" in told.err, name
        assert "another snapshot" in told.err, name
        site.remetal("restore", *words, "--yes", code=3)
        site.remetal("show", "latest", code=3)
        assert hash_file(target) == before, name
    assert not (tmp_path / "etc").exists()


def test_a_record_that_was_changed_in_the_repository_is_found(site: Site, tmp_path: Path) -> None:
    """Without a machine's keys nobody can change a record: the snapshot is sealed and signed."""
    disk = dos_disk(tmp_path / "d.img", (2048, 8192))
    site.remetal("backup", "--disk", disk)
    (snapshot,) = [path for path in (site.repository / "history").rglob("*") if path.is_file()]
    data = snapshot.read_bytes()
    target = tmp_path / "target.img"
    target.write_bytes(os.urandom(SIZE))
    before = hash_file(target)
    for place in range(0, len(data), max(len(data) // 12, 1)):
        snapshot.chmod(0o600)
        snapshot.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        told = site.remetal("restore", "latest", "--map", target, "--overwrite", target, "--yes", code=None)
        assert told.code in {2, 5}, told.err
        assert hash_file(target) == before
    assert site.remetal("check", code=5).out
