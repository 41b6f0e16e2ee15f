"""f2fs without its kernel: images that its own tools make and fill, and what they may not contradict."""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from remetal.events import Event, Warn
from remetal.image.extents import probe_used
from remetal.image.ranges import Extent
from remetal.layout.layers import f2fs as layer
from remetal.layout.layers.contract import Content
from remetal.ondisk.bitmaps import UncleanError
from remetal.ondisk.f2fs import parse_f2fs, read_used
from remetal.ondisk.regions import BadStructureError, Read
from remetal.system.blockdev import Span
from tests.unit.test_extents import probe_partclone, sectors_of

MIB = 1 << 20
SIZE = 64 * MIB
LARGER = 128 * MIB  # partclone takes none below 100 MiB
BLOCK = 4096
FEATURES = ("encrypt", "extra_attr", "project_quota", "inode_checksum", "flexible_inline_xattr", "inode_crtime")
MORE_FEATURES = ("quota", "lost_found", "verity", "sb_checksum", "casefold", "compression")


def program(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def make(path: Path, *options: str, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    program("mkfs.f2fs", "-q", "-l", "wörter ☃", *options, path)
    return path


def reader(data: bytes) -> Read:
    def read(offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= len(data)
        return data[offset : offset + size]

    return read


def checksum(data: bytes | bytearray) -> bytes:
    return struct.pack("<I", zlib.crc32(data, 0xF2F52010 ^ 0xFFFFFFFF) ^ 0xFFFFFFFF)


def checkpoints(data: bytes | bytearray) -> list[int]:
    """Return where the blocks of the valid checkpoint are that frame it: its first and its last."""
    (start,) = struct.unpack_from("<I", data, 1024 + 76)
    packs = [(start + index * 512) * BLOCK for index in range(2)]
    newest = max(packs, key=lambda place: int(struct.unpack_from("<Q", data, place)[0]))
    return [newest, newest + (int(struct.unpack_from("<I", data, newest + 136)[0]) - 1) * BLOCK]


def change(data: bytearray, offset: int, number: int, mask: int = 0) -> None:
    """Set a number of the checkpoint, of which the bits of `mask` stay."""
    for place in checkpoints(data):
        before = struct.unpack_from("<I", data, place + offset)[0] & mask
        struct.pack_into("<I", data, place + offset, before | number)
        data[place + 4092 : place + 4096] = checksum(data[place : place + 4092])


def number_of(told: str, name: str) -> int:
    """Return a number that dump.f2fs prints."""
    found = re.search(rf"{name}\s+\[0x\s*([0-9a-f]+)", told)
    assert found is not None
    return int(found[1], 16)


def test_a_filled_image(tmp_path: Path) -> None:
    """Held against what dump.f2fs says, and against partclone."""
    disk = make(tmp_path / "disk.img", size=LARGER)
    files = tmp_path / "files"
    files.mkdir()
    for number in range(300):
        (files / f"{number}").write_bytes(b"x" * number * 500)
    program("sload.f2fs", "-f", files, disk)
    data = disk.read_bytes()
    found = parse_f2fs(reader(data), LARGER)
    told = program("dump.f2fs", "-d", "1", disk)
    valid, main = number_of(told, "valid_block_count"), number_of(told, "main_blkaddr")
    assert found.used == (valid + main) * BLOCK
    assert (found.size, found.label, found.clean, found.features) == (LARGER, "wörter ☃", True, ())
    used = probe_used(Span(disk, 0, LARGER), "f2fs")
    assert found.used <= sum(each.size for each in used) <= found.used + BLOCK
    theirs = probe_partclone("partclone.f2fs", Span(disk, 0, LARGER), tmp_path)
    assert theirs <= sectors_of(used)


@pytest.mark.parametrize("feature", [*FEATURES, *MORE_FEATURES])
def test_features_have_the_names_that_mkfs_gives_them(tmp_path: Path, feature: str) -> None:
    needed = (
        [] if feature in {"extra_attr", "encrypt", "quota", "lost_found", "verity", "sb_checksum"} else ["extra_attr"]
    )
    more = ["-C", "utf8"] if feature == "casefold" else []
    option = [] if feature == "casefold" else [feature]
    chosen = ["-O", ",".join([*needed, *option])] if needed or option else []
    data = make(tmp_path / "disk.img", *chosen, *more).read_bytes()
    assert {*needed, feature} == set(parse_f2fs(reader(data), SIZE).features) - ({"quota"} - {feature})
    assert list(read_used(reader(data), SIZE))


@pytest.mark.parametrize(
    ("offset", "number", "mask"),
    [(132, 0, ~1), (132, 8, -1), (132, 0x10, -1), (132, 0x1000, -1), (132, 0x800, -1), (132, 0x4000, -1)],
    ids=["not unmounted", "error", "to be checked", "switched off", "quota to be checked", "being resized"],
)
def test_one_that_was_not_put_to_rest_is_captured_whole(tmp_path: Path, offset: int, number: int, mask: int) -> None:
    disk = make(tmp_path / "disk.img")
    data = bytearray(disk.read_bytes())
    change(data, offset, number, mask)
    disk.write_bytes(data)
    assert not parse_f2fs(reader(bytes(data)), SIZE).clean
    with pytest.raises(UncleanError):
        read_used(reader(bytes(data)), SIZE)
    told: list[Event] = []
    assert probe_used(Span(disk, 0, SIZE), "f2fs", report=told.append) == [Extent(0, SIZE)]
    assert [isinstance(each, Warn) and "not unmounted cleanly" in each.text for each in told] == [True]


def test_files_that_were_synced_after_it_was_unmounted_are_not_left_out(tmp_path: Path) -> None:
    """Mounting does not change the checkpoint; a node that was written since names it."""
    disk = make(tmp_path / "disk.img")
    data = bytearray(disk.read_bytes())
    place = checkpoints(data)[0]
    (segment,) = struct.unpack_from("<I", data, place + 40)
    (offset,) = struct.unpack_from("<H", data, place + 70)
    (main,) = struct.unpack_from("<I", data, 1024 + 92)
    node = (main + segment * 512 + offset) * BLOCK
    data[node + 4084 : node + 4088] = data[place : place + 4]
    assert not parse_f2fs(reader(bytes(data)), SIZE).clean
    with pytest.raises(UncleanError):
        read_used(reader(bytes(data)), SIZE)


def test_counts_that_contradict_one_another_are_not_believed(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img")
    data = bytearray(disk.read_bytes())
    change(data, 16, 5)
    with pytest.raises(BadStructureError, match="its checkpoint counts 5"):
        read_used(reader(bytes(data)), SIZE)
    disk.write_bytes(data)
    told: list[Event] = []
    assert probe_used(Span(disk, 0, SIZE), "f2fs", report=told.append) == [Extent(0, SIZE)]
    assert len(told) == 1


@pytest.mark.parametrize(
    ("offset", "patch", "why"),
    [
        (2201 + 68, b"/dev/sdb", "another device"),
        (2180, struct.pack("<I", 2), "zones"),
        (16, struct.pack("<I", 14), "kind"),
        (84, struct.pack("<I", 77), "sizes"),
        (36, struct.pack("<Q", SIZE // BLOCK + 1), "sizes"),
    ],
    ids=["devices", "zones", "blocks of 16 KiB", "places", "size"],
)
def test_what_cannot_be_handled_is_refused(tmp_path: Path, offset: int, patch: bytes, why: str) -> None:
    data = bytearray(make(tmp_path / "disk.img").read_bytes())
    data[1024 + offset : 1024 + offset + len(patch)] = patch
    with pytest.raises(BadStructureError, match=why):
        parse_f2fs(reader(bytes(data)), SIZE)


def test_unknown_features_lead_to_the_whole_volume(tmp_path: Path) -> None:
    data = bytearray(make(tmp_path / "disk.img").read_bytes())
    struct.pack_into("<I", data, 1024 + 2180, 1 << 16)
    assert parse_f2fs(reader(bytes(data)), SIZE).features == ("FEATURE_16",)
    with pytest.raises(BadStructureError, match="features"):
        read_used(reader(bytes(data)), SIZE)
    volume = layer.probe_volume(Content("disk", Span(tmp_path / "disk.img", 0, SIZE), reader(bytes(data)), "f2fs"))
    assert layer.plan_growth(volume, 2 * SIZE) == SIZE, "nor is it grown by a program that may not know them either"


def test_a_superblock_without_its_checksum_is_refused(tmp_path: Path) -> None:
    data = bytearray(make(tmp_path / "disk.img", "-O", "sb_checksum").read_bytes())
    data[1024 + 130] ^= 1
    with pytest.raises(BadStructureError, match="checksum"):
        parse_f2fs(reader(bytes(data)), SIZE)


def test_sectors_of_another_size_keep_it_from_growing(tmp_path: Path) -> None:
    data = bytearray(make(tmp_path / "disk.img").read_bytes())
    struct.pack_into("<II", data, 1024 + 8, 12, 0)
    found = parse_f2fs(reader(bytes(data)), SIZE)
    assert found.sector_size == 4096
    volume = layer.probe_volume(Content("disk", Span(tmp_path / "disk.img", 0, SIZE), reader(bytes(data)), "f2fs"))
    assert layer.plan_growth(volume, 2 * SIZE) == SIZE
