"""What we read of btrfs is what btrfs-progs reads; what we would copy is all that the file system needs."""

from __future__ import annotations

import hashlib
import os
import random
import re
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from lab.manifest import Manifest, compare_manifests, take_manifest
from remetal.errors import RemetalError
from remetal.ondisk.btrfs import SUPERBLOCKS, BtrfsSuperblock, Device, parse_btrfs, read_allocation, used_ranges
from remetal.ondisk.regions import BadStructureError
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
SIZE = 800 * MIB


def program(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def blank(folder: Path, count: int, size: int = SIZE) -> list[Path]:
    paths = [folder / f"disk{number}.img" for number in range(count)]
    for path in paths:
        with path.open("wb") as disk:
            disk.truncate(size)
    return paths


def device_of(path: Path, size: int | None = None) -> Device:
    end = path.stat().st_size if size is None else size

    def read(offset: int, count: int) -> bytes:
        assert 0 <= offset <= offset + count <= end
        with path.open("rb") as disk:
            return os.pread(disk.fileno(), count, offset)

    return read, end


def parse(path: Path) -> BtrfsSuperblock:
    return parse_btrfs(*device_of(path))


def extents_of(paths: Sequence[Path]) -> dict[int, list[tuple[int, int]]]:
    superblocks = {path: parse(path) for path in paths}
    newest = max(superblocks.values(), key=lambda each: each.generation)
    return read_allocation({found.devid: device_of(path) for path, found in superblocks.items()}, newest).extents


def dumped_extents(paths: Sequence[Path]) -> dict[int, list[tuple[int, int]]]:
    """What btrfs-progs finds in the device tree, which is another tree than ours."""
    extents: dict[int, list[tuple[int, int]]] = {parse(path).devid: [] for path in paths}
    text = program("btrfs", "inspect-internal", "dump-tree", "--noscan", "-t", "dev", *paths)
    pattern = r"key \((\d+) DEV_EXTENT (\d+)\) itemoff.*\n.*\n.*chunk_offset \d+ length (\d+)"
    for devid, start, size in re.findall(pattern, text):
        extents.setdefault(int(devid), []).append((int(start), int(size)))
    assert any(extents.values())
    return extents


@contextmanager
def attached(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Loop devices over the disk files, of which the kernel knows nothing more afterwards."""
    with ExitStack() as stack:
        devices = [
            stack.enter_context(attach_loop(Span(path, 0, path.stat().st_size), writable=True)) for path in paths
        ]
        try:
            yield devices
        finally:
            for device in devices:
                subprocess.run(["btrfs", "device", "scan", "--forget", device], check=False, capture_output=True)


@contextmanager
def opened(paths: Sequence[Path], *options: str) -> Iterator[Path]:
    """The file system on these disk files, mounted."""
    with attached(paths) as devices:
        named = [f"device={device}" for device in devices]
        with mounted(devices[0], kind="btrfs", options=[*named, *options]) as folder:
            yield folder


def age(folder: Path, seed: int, rounds: int = 4) -> None:
    """Create, overwrite, cut and delete files at random, with commits and snapshots between."""
    chance = random.Random(seed)
    program("btrfs", "subvolume", "create", folder / "volume")
    for number in range(rounds):
        for _ in range(25):
            path = folder / "volume" / f"file{chance.randrange(40)}"
            match chance.randrange(5):
                case 0:
                    path.unlink(missing_ok=True)
                case 1 if path.exists():
                    os.truncate(path, chance.randrange(path.stat().st_size + 1))
                case _:
                    path.write_bytes(chance.randbytes(chance.choice([100, 5000, 300_000, 2_000_000])))
        program("btrfs", "filesystem", "sync", folder)
        program("btrfs", "subvolume", "snapshot", "-r", folder / "volume", folder / f"snapshot{number}")
        if number % 2:
            program("btrfs", "subvolume", "delete", "-c", folder / f"snapshot{number - 1}")


@pytest.mark.parametrize("checksum", ["crc32c", "xxhash", "sha256", "blake2"])
@pytest.mark.parametrize("options", [("-O", "^no-holes", "-R", "quota"), ("--mixed", "-n", "4096"), ("-n", "65536")])
def test_superblock_as_printed(tmp_path: Path, checksum: str, options: tuple[str, ...]) -> None:
    (disk,) = blank(tmp_path, 1)
    program("mkfs.btrfs", "-q", "-L", "data of web1", "--csum", checksum, *options, disk)
    found, text = parse(disk), program("btrfs", "inspect-internal", "dump-super", disk)
    said = {key: value.strip() for key, value in re.findall(r"^([a-z_.]+)\t+(.*)$", text, re.MULTILINE)}
    assert found.fsid == said["fsid"]
    assert found.metadata_uuid == said["metadata_uuid"].split()[0]
    assert found.label == said["label"]
    assert (found.total_bytes, found.bytes_used) == (int(said["total_bytes"]), int(said["bytes_used"]))
    assert (found.sector_size, found.node_size) == (int(said["sectorsize"]), int(said["nodesize"]))
    assert (found.devices, found.generation) == (int(said["num_devices"]), int(said["generation"]))
    assert (found.devid, found.device_size) == (int(said["dev_item.devid"]), int(said["dev_item.total_bytes"]))
    assert found.device_uuid == said["dev_item.uuid"]
    assert f"({found.checksum})" in said["csum_type"]
    flags = re.findall(r"(?:incompat|compat_ro)_flags\t+0x[0-9a-f]+\n\t+\( ([^)]*)\)", text)
    assert sorted(found.features) == sorted(flag.strip() for each in flags for flag in each.split("|"))
    assert (found.has_log, found.problems) == (False, ())
    assert extents_of([disk]) == dumped_extents([disk])
    program("btrfs", "filesystem", "label", disk, "größe ☃")
    assert parse(disk).label == "größe ☃"


MADE = [
    (1, "single", "single"),
    (1, "dup", "single"),
    (1, "dup", "dup"),
    (2, "raid0", "raid0"),
    (2, "raid1", "single"),
    (2, "raid1", "raid5"),
    (3, "raid1c3", "raid0"),
    (3, "raid5", "raid5"),
    (3, "raid6", "raid6"),
    (4, "raid1c4", "raid10"),
    (4, "raid10", "raid10"),
    (4, "raid5", "raid6"),
    (4, "raid6", "raid5"),
    (4, "raid0", "single"),
]


def make(paths: Sequence[Path], metadata: str, data: str, *options: str) -> None:
    program("mkfs.btrfs", "-q", "-f", "-m", metadata, "-d", data, *options, *paths)


@pytest.mark.parametrize(("count", "metadata", "data"), MADE)
def test_device_extents_as_made(tmp_path: Path, count: int, metadata: str, data: str) -> None:
    paths = blank(tmp_path, count)
    make(paths, metadata, data)
    assert extents_of(paths) == dumped_extents(paths)


USED = {(1, "dup", "single"), (2, "raid1", "raid5"), (3, "raid1c3", "raid0"), (4, "raid10", "raid10")}


@pytest.mark.parametrize(
    ("count", "metadata", "data"),
    [pytest.param(*each, marks=[] if each in USED else [pytest.mark.matrix]) for each in MADE],
)
def test_device_extents_after_use(tmp_path: Path, count: int, metadata: str, data: str) -> None:
    paths = blank(tmp_path, count)
    make(paths, metadata, data)
    with opened(paths) as folder:
        age(folder, seed=count)
        program("btrfs", "balance", "start", "--full-balance", folder)
        age(folder / "volume", seed=count + 1, rounds=1)
    assert extents_of(paths) == dumped_extents(paths)


def test_device_extents_after_changes_of_devices(tmp_path: Path) -> None:
    paths = blank(tmp_path, 4)
    make(paths[:2], "raid1", "raid0")
    with attached(paths[2:]) as (third, fourth):
        with opened(paths[:2]) as folder:
            age(folder, seed=1, rounds=1)
            program("btrfs", "device", "add", "-f", third, fourth, folder)
            program("btrfs", "balance", "start", "-mconvert=raid1c3", "-dconvert=raid5", folder)
            program("btrfs", "device", "remove", "1", folder)
            program("btrfs", "filesystem", "resize", f"3:{SIZE - 21 * MIB}", folder)
        assert extents_of(paths[1:]) == dumped_extents(paths[1:])
        with pytest.raises(BadStructureError, match="no superblock"):
            parse(paths[0])
        assert [parse(path).devid for path in paths[1:]] == [2, 3, 4]
        assert parse(paths[2]).device_size == SIZE - 21 * MIB


REDUNDANT = [
    ("single", 2, 0),
    ("raid0", 2, 0),
    ("raid1", 2, 1),
    ("raid1c3", 3, 2),
    ("raid1c4", 4, 3),
    ("raid10", 4, 1),
    ("raid5", 4, 1),
    ("raid6", 4, 1),
]


def set_aside(paths: Sequence[Path], missing: Sequence[Path]) -> dict[int, list[tuple[int, int]]]:
    superblock = parse(paths[0])
    devices = {parse(path).devid: device_of(path) for path in paths if path not in missing}
    return read_allocation(devices, superblock).extents


@pytest.mark.parametrize(("profile", "count", "lost"), REDUNDANT)
def test_missing_devices(tmp_path: Path, profile: str, count: int, lost: int) -> None:
    paths = blank(tmp_path, count, TIB)
    # Small blocks and many chunks: the tree has several levels, and its blocks lie on all devices, in several rows.
    make(paths, profile, "single", "-n", "4096")
    with opened(paths) as folder:
        program("fallocate", "-l", f"{count * 600}G", folder / "file")
    assert parse(paths[0]).chunk_root_level > 0
    whole = dumped_extents(paths)
    assert sum(map(len, whole.values())) > count * 600
    for number in range(lost + 1):
        for missing in combinations(paths, number):
            assert set_aside(paths, missing) == whole
    assert not all(is_enough(paths, missing) for missing in combinations(paths, lost + 1))


def is_enough(paths: Sequence[Path], missing: Sequence[Path]) -> bool:
    try:
        set_aside(paths, missing)
    except BadStructureError:
        return False
    return True


def stripes_of_root(superblock: BtrfsSuperblock) -> dict[int, int]:
    """Where the root of a mirrored chunk tree lies, by devid."""
    (chunk,) = [
        each for each in superblock.system_chunks if each.start <= superblock.chunk_root < each.start + each.size
    ]
    return {each.devid: each.start + superblock.chunk_root - chunk.start for each in chunk.stripes}


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as disk:
        disk.seek(offset)
        disk.write(data)


# What a field of a block's header may be overwritten with: (its place there, its size).
HEADER_FIELDS = {
    "checksum": (0, 4),
    "fsid": (32, 16),
    "address": (48, 8),
    "generation": (80, 8),
    "owner": (88, 8),
    "count": (96, 4),
    "level": (100, 1),
}


@pytest.mark.parametrize("field", HEADER_FIELDS)
def test_a_damaged_block_is_read_from_its_other_copy(tmp_path: Path, field: str) -> None:
    paths = blank(tmp_path, 2)
    make(paths, "raid1", "single", "--csum", "sha256")
    whole, places = dumped_extents(paths), stripes_of_root(parse(paths[0]))
    at, size = HEADER_FIELDS[field]
    for number, path in enumerate(paths, 1):
        assert extents_of(paths) == whole
        with path.open("rb") as file:
            block = bytearray(os.pread(file.fileno(), 16384, places[number]))
        block[at : at + size] = b"\x5a" * size
        if field != "checksum":
            block[:32] = hashlib.sha256(block[32:]).digest()
        overwrite(path, places[number], bytes(block))
    with pytest.raises(BadStructureError, match="no sound copy"):
        extents_of(paths)


def test_an_unreadable_device_is_like_a_missing_one(tmp_path: Path) -> None:
    paths = blank(tmp_path, 2)
    make(paths, "raid1", "single")

    def fail(offset: int, size: int) -> bytes:
        raise RemetalError(f"reading {size} bytes at byte {offset} failed")

    superblock = parse(paths[0])
    assert read_allocation({1: (fail, SIZE), 2: device_of(paths[1])}, superblock).extents == dumped_extents(paths)
    with pytest.raises(BadStructureError, match="no sound copy"):
        read_allocation({1: (fail, SIZE), 2: (fail, SIZE)}, superblock)


def test_a_device_that_was_away_for_a_while_does_not_count(tmp_path: Path) -> None:
    paths = blank(tmp_path, 2)
    make(paths, "raid1", "single")
    stale = tmp_path / "stale.img"
    program("cp", "--sparse=always", paths[0], stale)
    with opened(paths) as folder:
        age(folder, seed=3, rounds=1)
        program("btrfs", "balance", "start", "--full-balance", folder)
    assert parse(stale).generation < parse(paths[1]).generation
    assert extents_of([stale, paths[1]]) == dumped_extents(paths) != dumped_extents([stale])


def test_copies_of_the_superblock(tmp_path: Path) -> None:
    (disk,) = blank(tmp_path, 1, 300 * GIB)
    make([disk], "dup", "single", "-n", "4096")
    with opened([disk]) as folder:
        for number in range(100):
            program("fallocate", "-l", "2G", folder / f"file{number}")
    whole, extents = parse(disk), extents_of([disk])
    assert whole.chunk_root_level > 0
    assert len(extents[1]) > 150
    assert extents == dumped_extents([disk])
    ranges = used_ranges(extents[1], whole.device_size)
    assert all(any(start <= place < start + size for start, size in ranges) for place in SUPERBLOCKS)
    with disk.open("rb") as file:
        older = os.pread(file.fileno(), 4096, SUPERBLOCKS[1])
    with opened([disk]) as folder:
        (folder / "more").write_bytes(b"x")
    overwrite(disk, SUPERBLOCKS[1], older)
    overwrite(disk, SUPERBLOCKS[0] + 300, b"damaged")
    found = parse(disk)
    assert found.generation > whole.generation
    assert found.problems == ("its first superblock is damaged; a copy of it was read",)
    overwrite(disk, SUPERBLOCKS[2], bytes(4096))
    assert parse(disk).generation == whole.generation
    overwrite(disk, SUPERBLOCKS[1] + 4000, b"damaged")
    with pytest.raises(BadStructureError, match="damaged"):
        parse(disk)


def forge(disk: Path, offset: int, data: bytes) -> None:
    """Change the superblock of a file system made with sha256, and give it its right checksum."""
    with disk.open("rb") as file:
        block = bytearray(os.pread(file.fileno(), 4096, SUPERBLOCKS[0]))
    block[offset : offset + len(data)] = data
    block[:32] = hashlib.sha256(block[32:]).digest()
    overwrite(disk, SUPERBLOCKS[0], bytes(block))


def add_bits(disk: Path, offset: int, bits: int) -> None:
    with disk.open("rb") as file:
        (value,) = struct.unpack("<Q", os.pread(file.fileno(), 8, SUPERBLOCKS[0] + offset))
    forge(disk, offset, struct.pack("<Q", value | bits))


FLAGS, INCOMPATIBLE, DEVID = 56, 188, 201


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda disk: program("btrfstune", "-S", "1", disk), "it is the seed of other file systems"),
        (lambda disk: add_bits(disk, FLAGS, 1 << 33), "it is an image of metadata only"),
        (lambda disk: add_bits(disk, FLAGS, 1 << 36), "its UUID or its format is being changed, and that did not end"),
        (lambda disk: add_bits(disk, INCOMPATIBLE, 1 << 12), "it is made for zoned disks"),
        (lambda disk: add_bits(disk, INCOMPATIBLE, 1 << 60), "it has features that remetal does not know"),
        (lambda disk: forge(disk, DEVID, bytes(8)), "it is about to replace another device, and that did not end"),
    ],
)
def test_what_cannot_be_carried_is_told(tmp_path: Path, change: Callable[[Path], object], problem: str) -> None:
    (disk,) = blank(tmp_path, 1)
    make([disk], "dup", "single", "--csum", "sha256")
    assert parse(disk).problems == ()
    change(disk)
    assert parse(disk).problems == (problem,)


def test_another_uuid(tmp_path: Path) -> None:
    (disk,) = blank(tmp_path, 1)
    make([disk], "dup", "single")
    before, extents = parse(disk), extents_of([disk])
    program("btrfstune", "-f", "-m", disk)
    found = parse(disk)
    assert found.fsid != before.fsid
    assert (found.metadata_uuid, before.metadata_uuid) == (before.fsid, before.fsid)
    assert "METADATA_UUID" in found.features
    assert extents_of([disk]) == extents == dumped_extents([disk])


def test_a_log_is_told(tmp_path: Path) -> None:
    (disk,) = blank(tmp_path, 1)
    make([disk], "dup", "single")
    crashed = tmp_path / "crashed.img"
    with opened([disk], "commit=300") as folder:
        (folder / "file").write_bytes(b"x" * 5000)
        program("btrfs", "filesystem", "sync", folder)
        with (folder / "file").open("ab") as file:
            file.write(b"y" * 5000)
            os.fsync(file.fileno())
        program("cp", "--sparse=always", disk, crashed)
    assert parse(crashed).has_log
    assert not parse(disk).has_log
    assert extents_of([crashed]) == dumped_extents([crashed])


def test_a_device_that_became_smaller_is_told(tmp_path: Path) -> None:
    (disk,) = blank(tmp_path, 1)
    make([disk], "dup", "single")
    os.truncate(disk, SIZE - 4096)
    assert parse(disk).problems == ("it reaches beyond the end of the device",)
    for size in (0, 64 * 1024, 64 * 1024 + 4095):
        with pytest.raises(BadStructureError, match="too small"):
            parse_btrfs(*device_of(disk, size))


def test_used_ranges() -> None:
    assert used_ranges([], 100 * MIB) == [(0, MIB), (64 * MIB, 4096)]
    assert used_ranges([], 64 * MIB) == [(0, MIB)]
    assert used_ranges([(MIB, 2 * MIB), (5 * MIB, MIB), (60 * MIB, 10 * MIB)], 65 * MIB) == [
        (0, 3 * MIB),
        (5 * MIB, MIB),
        (60 * MIB, 5 * MIB),
    ]
    assert used_ranges([(0, 4 * MIB), (256 * GIB + 4096, MIB)], 300 * GIB) == [
        (0, 4 * MIB),
        (64 * MIB, 4096),
        (256 * GIB, MIB + 4096),
    ]


def copy_used(source: Path, target: Path, extents: list[tuple[int, int]]) -> int:
    """Copy what is used onto a disk full of garbage, and return how much that was."""
    chance = random.Random(1)
    size = source.stat().st_size
    ranges = used_ranges(extents, parse(source).device_size)
    assert all(first + length < second for (first, length), (second, _) in pairwise(ranges))
    with source.open("rb") as old, target.open("wb") as new:
        garbage = chance.randbytes(MIB)
        for _ in range(size // MIB):
            new.write(garbage)
        for start, length in ranges:
            old.seek(start)
            new.seek(start)
            new.write(old.read(length))
    assert target.stat().st_size == size
    return sum(length for _, length in ranges)


def take_manifests(folder: Path) -> Manifest:
    """The manifest of the file system with all its subvolumes, each of which is a file system of its own to stat(2)."""
    listed = program("btrfs", "subvolume", "list", folder)
    volumes = ["", *re.findall(r" path (.*)$", listed, re.MULTILINE)]
    assert len(volumes) > 4
    return {
        path: entry for volume in volumes for path, entry in take_manifest(str(folder / volume), f"/{volume}").items()
    }


PROVEN = [
    pytest.param(1, "dup", "single", ()),
    pytest.param(2, "raid1", "raid0", ()),
    pytest.param(1, "single", "single", ("--mixed",), marks=pytest.mark.matrix),
    pytest.param(3, "raid1c3", "raid5", (), marks=pytest.mark.matrix),
    pytest.param(4, "raid10", "raid10", (), marks=pytest.mark.matrix),
]
PROVEN_SIZE = 256 * MIB


@pytest.mark.parametrize(("count", "metadata", "data", "options"), PROVEN)
def test_what_is_used_is_all_that_is_needed(
    tmp_path: Path, count: int, metadata: str, data: str, options: tuple[str, ...]
) -> None:
    paths = blank(tmp_path, count, PROVEN_SIZE)
    make(paths, metadata, data, *options)
    with opened(paths) as folder:
        age(folder, seed=count)
        program("btrfs", "balance", "start", "-dusage=60", "-musage=60", folder)
        age(folder / "volume", seed=9, rounds=1)
        before = take_manifests(folder)
    assert len(before) > 30
    extents = extents_of(paths)
    targets = [tmp_path / f"target{number}.img" for number in range(count)]
    copied = [copy_used(path, target, extents[parse(path).devid]) for path, target in zip(paths, targets, strict=True)]
    assert all(size < PROVEN_SIZE for size in copied)
    with attached(targets) as devices:
        program("btrfs", "device", "scan", *devices)
        program("btrfs", "check", "--check-data-csum", devices[0])
    with opened(targets) as folder:
        assert compare_manifests(before, take_manifests(folder)) == []
        assert "no errors found" in program("btrfs", "scrub", "start", "-B", folder)
