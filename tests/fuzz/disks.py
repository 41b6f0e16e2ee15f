"""Targets: everything that is read from disks.

A disk is written as its size (u64, sectors of 512 bytes) and pieces: u32 sector, u16 length, bytes. All else is zeros.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from remetal.ondisk import exfat, fat, fat_chains, foreign, ntfs, xfs
from remetal.ondisk import f2fs as flash
from remetal.ondisk.btrfs import parse_btrfs, read_allocation
from remetal.ondisk.ext import count_in_blocks, parse_ext
from remetal.ondisk.gpt import encode_gpt, parse_gpt
from remetal.ondisk.luks import parse_luks
from remetal.ondisk.lvm import parse_label, parse_volume_group, read_metadata
from remetal.ondisk.lvm_config import format_config, parse_config
from remetal.ondisk.mbr import encode_mbr, parse_mbr
from remetal.ondisk.md import parse_md
from remetal.ondisk.regions import BadStructureError, Piece, Read
from remetal.ondisk.swap import parse_swap
from remetal.units import MIB
from tests.fuzz.target import Target, right
from tests.sample_layout import METADATA

_SECTOR = 512
_LARGEST = 1 << 41
_AT_ONCE = 64 * MIB
_KEPT = 24 << 10
"""Bytes of a seed: the first that are not zero are the ones that parsers look at."""

Reads = Callable[[Read, int], Any]


def read_disk(data: bytes) -> tuple[Read, int]:
    """Return a disk as the parsers take it."""
    size = int.from_bytes(data[:8], "little") * _SECTOR % _LARGEST
    pieces: list[Piece] = []
    position = 8
    while position + 6 <= len(data):
        start = int.from_bytes(data[position : position + 4], "little") * _SECTOR
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        pieces.append(Piece(start, data[position + 6 : position + 6 + length]))
        position += 6 + length

    def read(offset: int, count: int) -> bytes:
        assert 0 <= offset <= offset + count <= size, f"{count} bytes at {offset} of a disk of {size}"
        assert count <= _AT_ONCE, f"{count} bytes at once"
        found = bytearray(count)
        for piece in pieces:
            first, last = max(piece.offset, offset), min(piece.offset + len(piece.data), offset + count)
            if first < last:
                found[first - offset : last - offset] = piece.data[first - piece.offset : last - piece.offset]
        return bytes(found)

    return read, size


def write_disk(file: Path) -> bytes:
    """Return a disk file as `read_disk` takes it, as much of it as a seed keeps."""
    size = file.stat().st_size
    seed = bytearray((size // _SECTOR).to_bytes(8, "little"))
    with file.open("rb") as disk:
        place = 0
        while place < size and len(seed) < _KEPT:
            try:
                place = os.lseek(disk.fileno(), place, os.SEEK_DATA) // 4096 * 4096
            except OSError:
                break
            block = os.pread(disk.fileno(), 4096, place)
            kept = block.rstrip(b"\0")
            if kept:
                seed += (place // _SECTOR).to_bytes(4, "little") + len(kept).to_bytes(2, "little") + kept
            place += 4096
    return bytes(seed)


def pieces_of(size: int, pieces: Iterable[Piece]) -> bytes:
    """Return a disk of pieces as `read_disk` takes it."""
    seed = bytearray((size // _SECTOR).to_bytes(8, "little"))
    for piece in pieces:
        data = piece.data.rstrip(b"\0")
        seed += (piece.offset // _SECTOR).to_bytes(4, "little") + len(data).to_bytes(2, "little") + data
    return bytes(seed)


@cache
def made(size: int, *argv: str) -> tuple[bytes, ...]:
    """Return the disk that a program makes; nothing where the program is not there."""
    if shutil.which(argv[0]) is None:
        return ()
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(size)
        subprocess.run([*argv, file.name], check=True, capture_output=True, input=b"secret")
        return (write_disk(Path(file.name)),)


def partitioned(table: str) -> Callable[[], tuple[bytes, ...]]:
    """Return what makes a disk with a partition table of this kind."""

    def make() -> tuple[bytes, ...]:
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(64 * MIB)
            text = f"label: {table}\n,8M\n,8M\n" + (",16M,E\n,4M\n" if table == "dos" else ",8M,U\n")
            subprocess.run(["sfdisk", "-q", file.name], check=True, capture_output=True, input=text.encode())
            return (write_disk(Path(file.name)),)

    return make


def disk_target(
    name: str, *reads: Reads, seeds: Callable[[], Iterable[bytes]], believed: dict[str, Any] | None = None
) -> Target:
    """Return a target of readers that take a disk; each is tried, whether or not the one before has failed."""

    def run(data: bytes) -> None:
        read, size = read_disk(data)
        for each in reads:
            try:
                each(read, size)
            except BadStructureError:
                continue

    return Target(name, run, (), seeds, believed or {})


def table_there_and_back(parse: Callable[..., Any], encode: Callable[..., tuple[Piece, ...]]) -> Reads:
    """Return a reader that writes what it has read, and reads that again."""

    def read_twice(read: Read, size: int) -> None:
        sector = 4096 if size % (1 << 20) == 4096 else _SECTOR
        found = parse(read, size, sector)
        if found is None:
            return
        seed = pieces_of(size, encode(found, size, sector))
        again = parse(*read_disk(seed), sector)
        assert facts(again) == facts(found)

    return read_twice


_HOW = {"problems", "protective_mbr"}
"""What a table does not say itself: what was overlooked, and the sector before it, which is made to fit the disk."""


def facts(table: Any) -> dict[str, Any]:
    """Return what a table says."""
    return {key: value for key, value in asdict(table).items() if key not in _HOW}


def read_btrfs(read: Read, size: int) -> None:
    found = parse_btrfs(read, size)
    read_allocation({1: (read, size)}, found)


def config_there_and_back(data: bytes) -> None:
    found = parse_config(data.decode("utf-8", "replace"))
    assert parse_config(format_config(found)) == found


def member_seeds() -> Iterable[bytes]:
    """Return the recorded members of arrays; whoever mutates them needs none of what describes them."""
    from tests.property.test_ondisk_md_property import PLACES, sound

    disks = [sound(version) for version in PLACES]
    return [pieces_of(each.size, [Piece(at, bytes(block)) for at, block in each.blocks.items()]) for each in disks]


def labelled() -> Iterable[bytes]:
    """Return a physical volume with a group's description."""
    from tests.property.test_ondisk_lvm_property import BASE

    blocks = [Piece(place, BASE[place : place + 4096]) for place in range(0, len(BASE), 4096)]
    return [pieces_of(len(BASE), [each for each in blocks if any(each.data)])]


def foreign_reader(kind: str) -> Reads:
    return lambda read, size: foreign.read_sector(kind, read) if size >= 1 << 16 else 0


_SUMS = {"remetal.ondisk.md._fold": right, "remetal.ondisk.md._checksum": right}
_LUKS = "cryptsetup luksFormat -q --type luks{} --pbkdf pbkdf2 --pbkdf-force-iterations 1000"
_ZLIB = SimpleNamespace(crc32=right)
_DIGEST = SimpleNamespace(update=lambda data: None, digest=lambda: b"")

TARGETS = [
    disk_target("gpt", table_there_and_back(parse_gpt, encode_gpt), seeds=partitioned("gpt")),
    disk_target(
        "gpt-believed",
        lambda read, size: parse_gpt(read, size, _SECTOR),
        seeds=partitioned("gpt"),
        believed={"remetal.ondisk.gpt.zlib": _ZLIB},
    ),
    disk_target("mbr", table_there_and_back(parse_mbr, encode_mbr), seeds=partitioned("dos")),
    disk_target("md", parse_md, seeds=member_seeds),
    disk_target(
        "md-believed",
        parse_md,
        seeds=member_seeds,
        believed=_SUMS,
    ),
    disk_target("lvm", parse_label, read_metadata, seeds=labelled),
    disk_target(
        "lvm-believed", parse_label, read_metadata, seeds=labelled, believed={"remetal.ondisk.lvm._crc": right}
    ),
    Target(
        "lvm-group",
        lambda data: (parse_volume_group(data.decode("utf-8", "replace")), None)[1],
        (BadStructureError,),
        lambda: [METADATA.encode()],
    ),
    Target("lvm-config", config_there_and_back, (BadStructureError,), lambda: [METADATA.encode()]),
    disk_target(
        "luks",
        parse_luks,
        seeds=lambda: [
            *made(32 * MIB, *_LUKS.format(1).split()),
            *made(32 * MIB, *_LUKS.format(2).split()),
        ],
        believed={"remetal.ondisk.luks.hashlib": SimpleNamespace(new=lambda name, data: _DIGEST)},
    ),
    disk_target(
        "btrfs",
        read_btrfs,
        seeds=lambda: made(128 * MIB, "mkfs.btrfs", "-q"),
        believed={"remetal.ondisk.btrfs._CHECKSUMS": {0: ("crc32c", lambda data: b"")}},
    ),
    disk_target(
        "ext",
        parse_ext,
        lambda read, size: count_in_blocks(read, size, 4096),
        seeds=lambda: [*made(8 * MIB, "mkfs.ext4", "-q", "-O", "^metadata_csum"), *made(2 * MIB, "mkfs.ext2", "-q")],
    ),
    disk_target("xfs", xfs.parse_xfs, xfs.read_shared, seeds=lambda: made(320 * MIB, "mkfs.xfs", "-q")),
    disk_target(
        "fat",
        fat.parse_fat,
        fat.read_used,
        fat_chains.count_chains,
        lambda read, size: fat_chains.read_root_entries(read) if size >= 512 else 0,
        seeds=lambda: [*made(4 * MIB, "mkfs.vfat"), *made(64 * MIB, "mkfs.vfat", "-F", "32")],
    ),
    disk_target(
        "exfat",
        exfat.parse_exfat,
        exfat.read_used,
        seeds=lambda: made(8 * MIB, "mkfs.exfat"),
        believed={"remetal.ondisk.exfat._check_boot": lambda data, sector: None},
    ),
    disk_target(
        "ntfs",
        ntfs.parse_ntfs,
        ntfs.read_used,
        ntfs.find_memory_files,
        seeds=lambda: made(8 * MIB, "mkfs.ntfs", "-q", "-F", "-f"),
    ),
    disk_target(
        "f2fs",
        flash.parse_f2fs,
        flash.read_used,
        seeds=lambda: made(64 * MIB, "mkfs.f2fs", "-q"),
        believed={"remetal.ondisk.f2fs._has_checksum": lambda data, place, size: True},
    ),
    disk_target("swap", parse_swap, seeds=lambda: made(MIB, "mkswap", "-q")),
    disk_target(
        "foreign",
        *(
            lambda read, size, kind=kind: foreign.read_sector(kind, read) if size >= 65536 else 0
            for kind in ("bcache", "BitLocker")
        ),
        seeds=lambda: [pieces_of(MIB, [Piece(0, bytes(range(256)) * 16)])],
    ),
]
