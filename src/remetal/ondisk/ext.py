"""The superblock of ext2, ext3 and ext4. Source: Linux Documentation/filesystems/ext4/super.rst."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remetal.ondisk.regions import BadStructureError, Read

_PLACE, _SIZE = 1024, 1024
_MAGIC = 0xEF53
_64BIT = 0x80
_JOURNAL_DEVICE = 0x8
_HAS_JOURNAL = 0x4
_NO_INODES = 0x1
_HUGE_FILE = 0x40000
_ROOT, _FIRST_INODE = 2, 11
_MOST_INODES = 512 << 20  # bytes
_PIECE = 2048  # inodes that are read at once
_LEAST_GROUP = 256
_INODE_SIZES = {1 << bit for bit in range(7, 17)}

_COMPATIBLE = {
    0x1: "dir_prealloc",
    0x2: "imagic_inodes",
    0x4: "has_journal",
    0x8: "ext_attr",
    0x10: "resize_inode",
    0x20: "dir_index",
    0x200: "sparse_super2",
    0x400: "fast_commit",
    0x800: "stable_inodes",
    0x1000: "orphan_file",
}
_INCOMPATIBLE = {
    0x1: "compression",
    0x2: "filetype",
    0x4: "needs_recovery",
    0x8: "journal_dev",
    0x10: "meta_bg",
    0x40: "extent",
    0x80: "64bit",
    0x100: "mmp",
    0x200: "flex_bg",
    0x400: "ea_inode",
    0x1000: "dirdata",
    0x2000: "metadata_csum_seed",
    0x4000: "large_dir",
    0x8000: "inline_data",
    0x10000: "encrypt",
    0x20000: "casefold",
}
_READ_ONLY = {
    0x1: "sparse_super",
    0x2: "large_file",
    0x8: "huge_file",
    0x10: "uninit_bg",
    0x20: "dir_nlink",
    0x40: "extra_isize",
    0x100: "quota",
    0x200: "bigalloc",
    0x400: "metadata_csum",
    0x1000: "read-only",
    0x2000: "project",
    0x8000: "verity",
    0x10000: "orphan_present",
}


_MOUNT_OPTIONS = {
    0x1: "debug",
    0x2: "bsdgroups",
    0x4: "user_xattr",
    0x8: "acl",
    0x10: "uid16",
    0x20: "journal_data",
    0x40: "journal_data_ordered",
    0x60: "journal_data_writeback",
    0x100: "nobarrier",
    0x200: "block_validity",
    0x400: "discard",
    0x800: "nodelalloc",
}
_JOURNAL_MODE = 0x60
_HASHES = ("legacy", "half_md4", "tea")
_ERRORS = {1: "continue", 2: "remount-ro", 3: "panic"}


@dataclass(frozen=True, slots=True)
class ExtSuperblock:
    """Sizes in bytes; `features` as e2fsprogs names them; unknown ones as `FEATURE_I17`-like names."""

    size: int
    used: int
    block_size: int
    uuid: str
    label: str
    features: tuple[str, ...]
    settings: ExtSettings


@dataclass(frozen=True, slots=True)
class ExtSettings:
    """What else mke2fs(8) and tune2fs(8) set. Sizes in bytes, `check_interval` in seconds.

    `clean` is False after a crash: then counts are older than the journal. `journal` is 0 where there is none, or where
    its size is not noted; `external_journal` tells that it lies on another device.
    """

    clean: bool
    inodes: int
    inodes_used: int
    inode_size: int
    reserved: int
    reserved_user: int
    reserved_group: int
    journal: int
    external_journal: bool
    flex_groups: int
    errors: str
    max_mounts: int
    check_interval: int
    mount_options: tuple[str, ...]
    mount_text: str
    hash_algorithm: str
    hash_seed: str = ""
    """As a UUID; empty where there is none."""


def parse_ext(read: Read, size: int) -> ExtSuperblock:
    """Parse the superblock in a volume of `size` bytes. Raises BadStructureError if there is no sound one."""
    if size < _PLACE + _SIZE:
        raise BadStructureError("the volume is too small for an ext file system")
    data = read(_PLACE, _SIZE)
    (magic,) = struct.unpack_from("<H", data, 0x38)
    (log_block,) = struct.unpack_from("<I", data, 0x18)
    if magic != _MAGIC or log_block > 6:
        raise BadStructureError("the superblock of the ext file system is damaged")
    (blocks_low,) = struct.unpack_from("<I", data, 0x4)
    (free_low,) = struct.unpack_from("<I", data, 0xC)
    compatible, incompatible, read_only = struct.unpack_from("<III", data, 0x5C)
    blocks_high, free_high = 0, 0
    if incompatible & _64BIT:
        (blocks_high,) = struct.unpack_from("<I", data, 0x150)
        (free_high,) = struct.unpack_from("<I", data, 0x158)
    if incompatible & _JOURNAL_DEVICE:
        raise BadStructureError("this is the external journal of another file system")
    blocks, free = blocks_high << 32 | blocks_low, free_high << 32 | free_low
    block_size = 1024 << log_block
    if blocks == 0 or free > blocks:
        raise BadStructureError("the superblock of the ext file system has impossible counts")
    return ExtSuperblock(
        size=blocks * block_size,
        used=(blocks - free) * block_size,
        block_size=block_size,
        uuid=str(uuid.UUID(bytes=data[0x68:0x78])),
        label=data[0x78:0x88].split(b"\0")[0].decode("utf-8", "replace"),
        features=(
            *_names(compatible, _COMPATIBLE, "C"),
            *_names(incompatible, _INCOMPATIBLE, "I"),
            *_names(read_only, _READ_ONLY, "R"),
        ),
        settings=_parse_settings(data, block_size, bool(incompatible & _64BIT), bool(compatible & _HAS_JOURNAL)),
    )


def _parse_settings(data: bytes, block_size: int, wide: bool, journalled: bool) -> ExtSettings:
    inodes, _, reserved_low, _, free_inodes = struct.unpack_from("<IIIII", data)
    max_mounts, _, state, errors = struct.unpack_from("<hHHH", data, 0x36)
    check_interval, _, revision, user, group = struct.unpack_from("<IIIHH", data, 0x44)
    (inode_size,) = struct.unpack_from("<H", data, 0x58) if revision else (128,)
    (journal_inode,) = struct.unpack_from("<I", data, 0xE0)
    hash_version, backup_type = data[0xFC], data[0xFD]
    (options,) = struct.unpack_from("<I", data, 0x100)
    journal_high, journal_low = struct.unpack_from("<II", data, 0x10C + 15 * 4)
    (reserved_high,) = struct.unpack_from("<I", data, 0x154) if wide else (0,)
    if free_inodes > inodes or inode_size not in _INODE_SIZES or inode_size > block_size:
        raise BadStructureError("the superblock of the ext file system has impossible counts")
    return ExtSettings(
        clean=bool(state & 1) and not state & 2 and "needs_recovery" not in _incompatible(data),
        inodes=inodes,
        inodes_used=inodes - free_inodes,
        inode_size=inode_size,
        reserved=(reserved_high << 32 | reserved_low) * block_size,
        reserved_user=user,
        reserved_group=group,
        journal=journal_high << 32 | journal_low if journalled and backup_type == 1 else 0,
        external_journal=journalled and journal_inode == 0,
        flex_groups=1 << min(data[0x174], 31),
        errors=_ERRORS.get(errors, "continue"),
        max_mounts=max_mounts,
        check_interval=check_interval,
        mount_options=tuple(_mount_options(options)),
        mount_text=data[0x200:0x240].split(b"\0")[0].decode("ascii", "replace"),
        hash_algorithm=_HASHES[hash_version % 3] if hash_version < 6 else "",
        hash_seed=str(uuid.UUID(bytes=data[0xEC:0xFC])) if any(data[0xEC:0xFC]) else "",
    )


def count_in_blocks(read: Read, size: int, block: int) -> int:
    """Return the bytes that all files and folders take up at most in blocks of `block` bytes; holes take up none.

    Reads every inode of a volume of `size` bytes. Returns 0, for unknown, where that would be too much to read, or
    where group descriptors or clusters are of another kind. Raises BadStructureError if there is no sound file system.
    """
    found = parse_ext(read, size)
    table_size = found.settings.inodes * found.settings.inode_size
    if table_size > _MOST_INODES or found.size > size or {"meta_bg", "bigalloc"} & set(found.features):
        return 0
    inode_size, total = found.settings.inode_size, 0
    for number, (place, count) in enumerate(_inode_tables(read, found, size)):
        if place + count * inode_size > size:
            raise BadStructureError("a group of the ext file system has its inodes elsewhere")
        for index in range(0, count, _PIECE):
            table = read(place + index * inode_size, min(_PIECE, count - index) * inode_size)
            total += _count_files(table, found, block, first=number == index == 0)
    return total


def _inode_tables(read: Read, found: ExtSuperblock, size: int) -> Iterator[tuple[int, int]]:
    """Yield the byte at which each group's inodes begin, and how many of them have been made use of."""
    data = read(_PLACE, _SIZE)
    (first, _, _, per_group, _, inodes_per_group) = struct.unpack_from("<6I", data, 0x14)
    (noted,) = struct.unpack_from("<H", data, 0xFE)
    length = max(noted, 64) if "64bit" in found.features else 32
    blocks = found.size // found.block_size
    if not _LEAST_GROUP <= per_group <= 8 * found.block_size or first >= blocks:
        raise BadStructureError("the superblock of the ext file system has impossible counts")
    groups = -(-(blocks - first) // per_group)
    start = (first + 1) * found.block_size
    if inodes_per_group * groups != found.settings.inodes or not inodes_per_group or start + groups * length > size:
        raise BadStructureError("the superblock of the ext file system has impossible counts")
    lazy = bool({"uninit_bg", "metadata_csum"} & set(found.features))
    for number in range(groups):
        descriptor = read(start + number * length, length).ljust(64, b"\0")
        low, flags, unused_low = (
            *struct.unpack_from("<I", descriptor, 8),
            *struct.unpack_from("<H8xH", descriptor, 0x12),
        )
        high, unused_high = *struct.unpack_from("<I", descriptor, 0x28), *struct.unpack_from("<H", descriptor, 0x32)
        unused = inodes_per_group if flags & _NO_INODES else unused_high << 16 | unused_low
        count = max(inodes_per_group - unused, 0) if lazy else inodes_per_group
        yield (high << 32 | low) * found.block_size, count


def _count_files(table: bytes, found: ExtSuperblock, block: int, *, first: bool) -> int:
    """Return the bytes that the files of one group take up in such blocks; the first group has reserved inodes."""
    rows = np.frombuffer(table, np.uint8).reshape(-1, found.settings.inode_size)

    def field(offset: int, kind: str) -> npt.NDArray[np.int64]:
        width = np.dtype(kind).itemsize
        return np.ascontiguousarray(rows[:, offset : offset + width]).view(kind).reshape(-1).astype(np.int64)

    sizes = field(4, "<u4") | (field(108, "<u4") & 0x7FFFFFFF) << 32
    sectors = field(28, "<u4") | field(116, "<u2") << 32
    huge = field(32, "<u4") & _HUGE_FILE != 0
    blocks = np.where(huge, sectors, -(-sectors * 512 // found.block_size))
    whole, before = -(-sizes // block), -(-sizes // found.block_size)
    # As many blocks as its length makes: a plain file. Others have holes, or blocks that map it or hold attributes.
    special = whole + np.maximum(blocks - before, 0) + whole // (block // 4 - 1) + 4
    needed = np.where(blocks == before, whole, np.minimum(blocks, special))
    needed = np.minimum(needed, found.size // found.block_size)
    in_use = (field(26, "<u2") > 0) & (field(0, "<u2") != 0)
    if first:
        in_use[: _FIRST_INODE - 1] = False
        in_use[_ROOT - 1 : _ROOT] = True
    return int(needed[in_use].sum()) * block


def _incompatible(data: bytes) -> list[str]:
    (bits,) = struct.unpack_from("<I", data, 0x60)
    return _names(bits, _INCOMPATIBLE, "I")


def _mount_options(bits: int) -> list[str]:
    """Return the options' names; how the journal is kept is a number of two bits, not a set."""
    mode = bits & _JOURNAL_MODE
    others = _names(bits & ~_JOURNAL_MODE, _MOUNT_OPTIONS, "M")
    return [*others, *([_MOUNT_OPTIONS[mode]] if mode else [])]


def _names(bits: int, names: dict[int, str], kind: str) -> list[str]:
    return [names.get(1 << bit, f"FEATURE_{kind}{bit}") for bit in range(32) if bits >> bit & 1]
