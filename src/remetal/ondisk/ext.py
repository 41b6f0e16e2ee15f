"""The superblock of ext2, ext3 and ext4. Source: Linux Documentation/filesystems/ext4/super.rst."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

from remetal.ondisk.regions import BadStructureError, Read

_PLACE, _SIZE = 1024, 1024
_MAGIC = 0xEF53
_64BIT = 0x80
_JOURNAL_DEVICE = 0x8
_HAS_JOURNAL = 0x4
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
