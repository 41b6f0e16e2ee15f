"""What we read is what sfdisk, sgdisk and blkid read; what we write they find sound."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from remetal.ondisk.ext import parse_ext
from remetal.ondisk.fat import parse_fat
from remetal.ondisk.gpt import Gpt, encode_gpt, parse_gpt
from remetal.ondisk.mbr import Mbr, encode_mbr, parse_mbr
from remetal.ondisk.regions import Piece, Read
from remetal.ondisk.swap import parse_swap
from remetal.ondisk.xfs import parse_xfs

MIB = 1 << 20

GPT_SCRIPT = """label: gpt
label-id: 12345678-1234-4234-8234-123456789ABC
start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649, name="BIOS boot"
start=4096, size=20480, type=uefi, name="ESP", attrs="RequiredPartition"
start=24576, size=40960, type=linux, name="größe ☃", attrs="LegacyBIOSBootable,GUID:60"
7 : start=65536, size=20480, type=swap, uuid=0FC63DAF-8483-4772-8E79-3D69D8477DE5
"""
MBR_SCRIPT = """label: dos
label-id: 0xdeadbeef
start=2048, size=20480, type=83, bootable
start=22528, size=80000, type=5
start=24576, size=4096, type=83
start=30720, size=4096, type=82
start=36864, size=8192, type=c
"""


def program(*argv: str | Path, data: str | None = None) -> str:
    done = subprocess.run(argv, input=data, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reader(path: Path) -> Read:
    def read(offset: int, size: int) -> bytes:
        with path.open("rb") as disk:
            disk.seek(offset)
            data = disk.read(size)
        assert len(data) == size
        return data

    return read


def blank(path: Path, size: int) -> Path:
    with path.open("wb") as disk:
        disk.truncate(size)
    return path


def write(path: Path, pieces: tuple[Piece, ...]) -> None:
    with path.open("r+b") as disk:
        for piece in pieces:
            disk.seek(piece.offset)
            disk.write(piece.data)


def table_of(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(program("sfdisk", "--json", path))["partitiontable"]
    for partition in table["partitions"]:
        partition["node"] = partition["node"].removeprefix(table["device"])
    del table["device"]
    return table


def read_gpt(path: Path) -> Gpt:
    table = parse_gpt(reader(path), path.stat().st_size, 512)
    assert table is not None
    return table


def read_mbr(path: Path) -> Mbr:
    table = parse_mbr(reader(path), path.stat().st_size, 512)
    assert table is not None
    return table


def test_gpt_is_read_as_sfdisk_reads_it(tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 64 * MIB)
    program("sfdisk", "-q", disk, data=GPT_SCRIPT)
    ours, theirs = read_gpt(disk), table_of(disk)
    assert ours.problems == ()
    assert ours.disk_guid == theirs["id"]
    assert ours.first_usable == theirs["firstlba"]
    for entry, partition in zip(ours.entries, theirs["partitions"], strict=True):
        assert str(entry.number) == partition["node"]
        assert (entry.first, entry.last - entry.first + 1) == (partition["start"], partition["size"])
        assert (entry.type_guid, entry.unique_guid) == (partition["type"], partition["uuid"])
        assert entry.name == partition.get("name", "")
    assert [entry.attributes for entry in ours.entries] == [0, 1, 4 | 1 << 60, 0]


@pytest.mark.parametrize("size", [64 * MIB, 64 * MIB + 512, 201 * MIB])
def test_gpt_is_written_as_sgdisk_wants_it(tmp_path: Path, size: int) -> None:
    source = blank(tmp_path / "a.img", 64 * MIB)
    program("sfdisk", "-q", source, data=GPT_SCRIPT)
    target = blank(tmp_path / "b.img", size)
    write(target, encode_gpt(read_gpt(source), size, 512))
    before, after = table_of(source), table_of(target)
    assert after.pop("lastlba") == size // 512 - 34
    before.pop("lastlba")
    assert after == before
    assert "No problems found" in program("sgdisk", "--verify", target)
    if size == 64 * MIB:
        assert target.read_bytes() == source.read_bytes()


def test_gpt_of_sgdisk_with_few_and_moved_usable_sectors(tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 64 * MIB)
    program("sgdisk", "--clear", "--set-alignment=1", "--new=1:34:2047", "--new=2:2048:+8M", "--change-name=2:x", disk)
    copy = blank(tmp_path / "b.img", 64 * MIB)
    write(copy, encode_gpt(read_gpt(disk), 64 * MIB, 512))
    assert copy.read_bytes() == disk.read_bytes()


def test_gpt_with_sectors_of_4096_bytes(tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 64 * MIB)
    loop = program("losetup", "--find", "--show", "--sector-size", "4096", disk).strip()
    try:
        program("sfdisk", "-q", "--no-reread", loop, data="label: gpt\nsize=10MiB, name=one\nname=two\n")
    finally:
        program("losetup", "--detach", loop)
    table = parse_gpt(reader(disk), 64 * MIB, 4096)
    assert table is not None
    assert [entry.name for entry in table.entries] == ["one", "two"]
    assert table.problems == ()
    copy = blank(tmp_path / "b.img", 64 * MIB)
    write(copy, encode_gpt(table, 64 * MIB, 4096))
    assert copy.read_bytes() == disk.read_bytes()


def test_gpt_after_the_disk_became_larger(tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 64 * MIB)
    program("sfdisk", "-q", disk, data=GPT_SCRIPT)
    with disk.open("r+b") as file:
        file.truncate(80 * MIB)
    assert "not at the end of the disk" in read_gpt(disk).problems[0]


def test_mbr_is_read_as_sfdisk_reads_it(tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 64 * MIB)
    program("sfdisk", "-q", disk, data=MBR_SCRIPT)
    ours, theirs = read_mbr(disk), table_of(disk)
    assert f"0x{ours.signature:08x}" == theirs["id"]
    for entry, partition in zip(ours.entries, theirs["partitions"], strict=True):
        assert str(entry.number) == partition["node"]
        assert (entry.start, entry.sectors) == (partition["start"], partition["size"])
        assert f"{entry.type:x}" == partition["type"]
        assert (entry.status == 0x80) == partition.get("bootable", False)


@pytest.mark.parametrize("size", [64 * MIB, 100 * MIB])
def test_mbr_is_written_as_sfdisk_wants_it(tmp_path: Path, size: int) -> None:
    source = blank(tmp_path / "a.img", 64 * MIB)
    program("sfdisk", "-q", source, data=MBR_SCRIPT)
    target = blank(tmp_path / "b.img", size)
    write(target, encode_mbr(read_mbr(source), size, 512))
    assert table_of(target) == table_of(source)
    assert "No errors detected" in program("sfdisk", "--verify", target)
    if size == 64 * MIB:
        assert target.read_bytes() == source.read_bytes()


def test_mbr_after_logical_partitions_were_deleted_and_reordered(tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 64 * MIB)
    program("sfdisk", "-q", disk, data=MBR_SCRIPT)
    program("sfdisk", "-q", "--delete", disk, "5")
    program("sfdisk", "-q", "--append", disk, data="start=24576, size=2048, type=83\n")
    copy = blank(tmp_path / "b.img", 64 * MIB)
    write(copy, encode_mbr(read_mbr(disk), 64 * MIB, 512))
    assert table_of(copy) == table_of(disk)
    assert [entry.start for entry in read_mbr(copy).entries if entry.number > 4] == [
        partition["start"] for partition in table_of(disk)["partitions"][2:]
    ]


def blkid(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in program("blkid", "-p", "-o", "export", path).splitlines())


@pytest.mark.parametrize(("kind", "options"), [("ext2", "-b1024"), ("ext3", "-b4096"), ("ext4", "-O64bit")])
def test_ext_superblock(tmp_path: Path, kind: str, options: str) -> None:
    disk = blank(tmp_path / "a.img", 40 * MIB)
    program(f"mkfs.{kind}", "-q", options, "-L", "wörter", disk, "32M")
    found = parse_ext(reader(disk), 40 * MIB)
    said = dict(
        line.split(":", 1) for line in program("dumpe2fs", "-h", disk).splitlines() if ":" in line and line[0] != " "
    )
    block = int(said["Block size"])
    assert found.block_size == block
    assert found.size == int(said["Block count"]) * block == 32 * MIB
    assert found.used == found.size - int(said["Free blocks"]) * block
    assert found.features == tuple(sorted(said["Filesystem features"].split(), key=found.features.index))
    assert (found.uuid, found.label) == (blkid(disk)["UUID"], "wörter")


def test_xfs_superblock(tmp_path: Path) -> None:
    disk = blank(tmp_path / "a.img", 320 * MIB)
    program("mkfs.xfs", "-q", "-L", "data", "-d", "size=310m", disk)
    found = parse_xfs(reader(disk), 320 * MIB)
    said = program("xfs_db", "-r", "-c", "sb 0", "-c", "p dblocks blocksize fdblocks", disk)
    values = {key: int(value) for key, value in (line.split(" = ") for line in said.splitlines())}
    assert found.size == values["dblocks"] * values["blocksize"]
    assert found.used == found.size - values["fdblocks"] * values["blocksize"]
    assert (found.uuid, found.label) == (blkid(disk)["UUID"], "data")
    assert {"crc", "ftype"} <= set(found.features)


@pytest.mark.parametrize(("bits", "size", "cluster"), [(12, 4, 1024), (16, 32, 1024), (32, 64, 512)])
def test_fat_boot_sector(tmp_path: Path, bits: int, size: int, cluster: int) -> None:
    disk = blank(tmp_path / "a.img", size * MIB)
    program("mkfs.vfat", "-F", str(bits), "-s", str(cluster // 512), "-i", "cafe0123", "-n", "EFI", disk)
    (tmp_path / "file").write_bytes(bytes(100_000))
    empty = parse_fat(reader(disk), size * MIB)
    program("mcopy", "-i", disk, tmp_path / "file", "::file")
    found = parse_fat(reader(disk), size * MIB)
    assert (found.bits, found.size, found.serial, found.cluster_size) == (bits, size * MIB, "CAFE-0123", cluster)
    assert found.used - empty.used == 98 * 1024


@pytest.mark.parametrize("page", [4096, 65536])
def test_swap_header(tmp_path: Path, page: int) -> None:
    disk = blank(tmp_path / "a.img", 16 * MIB)
    identity = "11111111-2222-4333-8444-555555555555"
    program("mkswap", "-q", "-U", identity, "-L", "swäp", "-p", str(page), disk)
    found = parse_swap(reader(disk), 16 * MIB)
    assert (found.size, found.page_size, found.uuid, found.label) == (16 * MIB, page, identity, "swäp")
    assert not found.hibernated
