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


@dataclass(frozen=True, slots=True)
class ExtSuperblock:
    """Sizes in bytes; `features` as e2fsprogs names them; unknown ones as `FEATURE_I17`-like names."""

    size: int
    used: int
    block_size: int
    uuid: str
    label: str
    features: tuple[str, ...]


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
    )


def _names(bits: int, names: dict[int, str], kind: str) -> list[str]:
    return [names.get(1 << bit, f"FEATURE_{kind}{bit}") for bit in range(32) if bits >> bit & 1]
