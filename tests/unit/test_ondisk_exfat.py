"""exFAT: its bitmap, wherever it lies, as fsck.exfat and dump.exfat see it; and images that no tool here makes."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from remetal.events import Event, Warn
from remetal.image.extents import probe_used
from remetal.image.ranges import Extent
from remetal.ondisk.bitmaps import UncleanError
from remetal.ondisk.exfat import parse_exfat, read_used
from remetal.ondisk.regions import BadStructureError, Read
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted

MIB = 1 << 20
SIZE = 16 * MIB
FLAGS, TABLES = 106, 110


def program(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def make(path: Path, *options: str, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    program("mkfs.exfat", *options, path)
    return path


def reader(data: bytes) -> Read:
    def read(offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= len(data)
        return data[offset : offset + size]

    return read


def used_clusters(data: bytes) -> int:
    """Return how many clusters the map of an image holds."""
    found = parse_exfat(reader(data), len(data))
    heap = int(struct.unpack_from("<I", data, 88)[0])
    return (sum(size for _, size in read_used(reader(data), len(data))) - heap * 512) // found.cluster_size


def seal(data: bytearray) -> None:
    """Give the boot region the checksum that it should have."""
    total = 0
    for index, byte in enumerate(data[: 11 * 512]):
        if index not in {106, 107, 112}:
            total = ((total << 31 | total >> 1) + byte) & 0xFFFFFFFF
    data[11 * 512 : 12 * 512] = struct.pack("<I", total) * 128


@pytest.mark.parametrize("cluster", [512, 4096, 131072])
def test_counts_are_those_of_its_own_tools(tmp_path: Path, cluster: int) -> None:
    disk = make(tmp_path / "disk.img", "-c", str(cluster), "-L", "wörter ☃")
    with attach_loop(Span(disk, 0, SIZE), writable=True) as device, mounted(device, kind="exfat-fuse") as root:
        for number in range(30):
            (root / f"{number}").write_bytes(bytes(number * 1000))
        for number in range(0, 30, 3):
            (root / f"{number}").unlink()
    data = disk.read_bytes()
    found = parse_exfat(reader(data), SIZE)
    told = program("dump.exfat", disk)
    total, free = (int(re.search(rf"{name} Clusters:\s+(\d+)", told)[1]) for name in ("Total", "Free"))  # type: ignore[index]
    assert used_clusters(data) == total - free
    assert found.size - found.used == free * cluster
    assert (found.size, found.cluster_size, found.label, found.features) == (SIZE, cluster, "wörter ☃", ())
    assert found.serial == program("blkid", "-p", "-o", "value", "-s", "UUID", disk).strip()


def test_a_volume_that_was_not_unmounted_is_captured_whole(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img")
    data = bytearray(disk.read_bytes())
    data[FLAGS] |= 2
    disk.write_bytes(data)
    with pytest.raises(UncleanError):
        read_used(reader(bytes(data)), SIZE)
    told: list[Event] = []
    assert probe_used(Span(disk, 0, SIZE), "exfat", report=told.append) == [Extent(0, SIZE)]
    assert [isinstance(each, Warn) and "not unmounted cleanly" in each.text for each in told] == [True]


def test_a_bitmap_in_pieces_is_followed(tmp_path: Path) -> None:
    """Its second cluster is moved to a free one far away, as the table then says."""
    data = bytearray(make(tmp_path / "disk.img", "-c", "512").read_bytes())
    before = used_clusters(bytes(data))
    table, heap = (
        512 * number for number in (struct.unpack_from("<I", data, 80)[0], struct.unpack_from("<I", data, 88)[0])
    )
    free = 20_000
    chain = struct.unpack_from("<4I", data, table + 8)
    assert chain[:3] == (3, 4, 5)
    data[heap + (free - 2) * 512 : heap + (free - 1) * 512] = data[heap + 512 : heap + 1024]
    struct.pack_into("<I", data, table + 8, free)
    struct.pack_into("<I", data, table + 4 * free, 4)
    with pytest.raises(BadStructureError, match="in use"):
        parse_exfat(reader(bytes(data)), SIZE)
    data[heap + (free - 2) // 8 % 512 + (free - 2) // 8 // 512 * 512] |= 1 << (free - 2) % 8
    assert used_clusters(bytes(data)) == before + 1


def test_with_two_tables_both_bitmaps_count(tmp_path: Path) -> None:
    """A transaction-safe exFAT, made from a plain one: a second table behind the first, a second bitmap."""
    data = bytearray(make(tmp_path / "disk.img").read_bytes())
    fat_at, fat_length, heap_at = struct.unpack_from("<III", data, 80)
    table, length, heap = 512 * fat_at, 512 * fat_length, 512 * heap_at
    assert table + 2 * length <= heap
    data[TABLES] = 2
    root = heap + (struct.unpack_from("<I", data, 96)[0] - 2) * 4096
    bitmap = data[root : root + 96][32:64]
    assert bitmap[0] == 0x81
    first, second, other = struct.unpack_from("<I", bitmap, 20)[0], 1000, 2000
    place = heap + (first - 2) * 4096
    for cluster in (second, other):  # the first bitmap knows of the second one, the second one of a file as well
        data[place + (cluster - 2) // 8] |= 1 << (cluster - 2) % 8
    data[heap + (second - 2) * 4096 : heap + (second - 1) * 4096] = data[place : place + 4096]
    data[place + (other - 2) // 8] &= ~(1 << (other - 2) % 8)
    struct.pack_into("<I", data, table + 4 * second, 0xFFFFFFFF)
    struct.pack_into("<BBxx", bitmap, 0, 0x81, 1)
    struct.pack_into("<I", bitmap, 20, second)
    data[root + 96 : root + 128] = bitmap
    data[table + length : table + 2 * length] = data[table : table + length]
    seal(data)
    for active in (0, 1):
        data[FLAGS] = active
        found = parse_exfat(reader(bytes(data)), SIZE)
        assert found.features == ("texfat",)
        used = list(read_used(reader(bytes(data)), SIZE))
        assert (heap + (other - 2) * 4096, 4096) in used
        assert (heap + (second - 2) * 4096, 4096) in used


def test_a_boot_region_without_its_checksum_is_refused(tmp_path: Path) -> None:
    data = bytearray(make(tmp_path / "disk.img").read_bytes())
    data[200] ^= 1
    with pytest.raises(BadStructureError, match="checksum"):
        parse_exfat(reader(bytes(data)), SIZE)
    seal(data)
    assert parse_exfat(reader(bytes(data)), SIZE).size == SIZE
