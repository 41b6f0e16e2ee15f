"""The primary superblock of XFS. Source: "XFS Algorithms & Data Structures", section Superblocks (big-endian)."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

from remetal.ondisk.regions import BadStructureError, Read

_SIZE = 512
_NAMES = {0x1: "ftype", 0x2: "sparse", 0x4: "meta_uuid", 0x8: "bigtime", 0x10: "needsrepair", 0x20: "nrext64"}
_SECTORS = {1 << bit for bit in range(9, 16)}
_INODES = {1 << bit for bit in range(8, 12)}
_MORE_BITS, _IGNORES_CASE, _FILE_TYPES = 0x8000, 0x4000, 0x200
_TREE_HEAD = 56
_COUNT = struct.Struct(">III")  # xfs_refcount_rec: first block, number of blocks, references
_NO_BLOCK = 0xFFFFFFFF
_MOST_LEAVES = 1 << 20
_MAX_REFERENCES = 1 << 31
_READ_ONLY_NAMES = {0x1: "finobt", 0x2: "rmapbt", 0x4: "reflink", 0x8: "inobtcount"}


@dataclass(frozen=True, slots=True)
class XfsSuperblock:
    """Sizes in bytes; `features` as mkfs.xfs(8) names them."""

    size: int
    used: int
    block_size: int
    uuid: str
    label: str
    features: tuple[str, ...]
    settings: XfsSettings


@dataclass(frozen=True, slots=True)
class XfsSettings:
    """What else mkfs.xfs(8) sets. Sizes in bytes.

    `inodes` have been allocated, `inodes_used` hold something; `inode_percent` of the space may hold inodes.
    `groups` is the number of allocation groups, each of `group_size`; the last may be smaller.
    """

    sector_size: int
    inode_size: int
    inodes: int
    inodes_used: int
    inode_percent: int
    directory_block: int
    log: int
    groups: int
    group_size: int
    file_types: bool
    """Whether folders tell their entries' types."""
    ignores_case: bool


def parse_xfs(read: Read, size: int) -> XfsSuperblock:
    """Parse the superblock in a volume of `size` bytes.

    Raises BadStructureError if there is no sound one, or if part of the file system lies on another device
    (external log, realtime).
    """
    if size < _SIZE:
        raise BadStructureError("the volume is too small for XFS")
    data = read(0, _SIZE)
    magic, block_size, blocks, realtime_blocks = struct.unpack_from(">4sIQQ", data)
    (log_start,) = struct.unpack_from(">Q", data, 48)
    (version,) = struct.unpack_from(">H", data, 100)
    (free,) = struct.unpack_from(">Q", data, 144)
    if magic != b"XFSB" or block_size not in {1 << bit for bit in range(9, 17)} or blocks == 0 or free > blocks:
        raise BadStructureError("the superblock of the XFS file system is damaged")
    if log_start == 0 or realtime_blocks != 0:
        raise BadStructureError("a part of this XFS file system lies on another device")
    features: tuple[str, ...] = ()
    if version & 0xF == 5:
        read_only, incompatible = struct.unpack_from(">II", data, 212)
        features = ("crc", *_names(read_only, _READ_ONLY_NAMES, "R"), *_names(incompatible, _NAMES, "I"))
    return XfsSuperblock(
        size=blocks * block_size,
        used=(blocks - free) * block_size,
        block_size=block_size,
        uuid=str(uuid.UUID(bytes=data[32:48])),
        label=data[108:120].split(b"\0")[0].decode("utf-8", "replace"),
        features=features,
        settings=_parse_settings(data, block_size, blocks, "ftype" in features),
    )


def _parse_settings(data: bytes, block_size: int, blocks: int, file_types: bool) -> XfsSettings:
    group_blocks, groups, _, log_blocks, version, sector_size, inode_size = struct.unpack_from(">IIIIHHH", data, 84)
    inodes, free_inodes = struct.unpack_from(">QQ", data, 128)
    (features2,) = struct.unpack_from(">I", data, 200)
    percent, log_directory = data[127], data[192]
    whole = group_blocks * groups
    good = 0 <= whole - blocks < group_blocks and log_blocks <= blocks and free_inodes <= inodes <= blocks * 64
    if not good or log_directory > 7 or sector_size not in _SECTORS or inode_size not in _INODES:
        raise BadStructureError("the superblock of the XFS file system has impossible counts")
    return XfsSettings(
        sector_size=sector_size,
        inode_size=inode_size,
        inodes=inodes,
        inodes_used=inodes - free_inodes,
        inode_percent=percent,
        directory_block=block_size << log_directory,
        log=log_blocks * block_size,
        groups=groups,
        group_size=group_blocks * block_size,
        file_types=file_types or bool(version & _MORE_BITS and features2 & _FILE_TYPES),
        ignores_case=bool(version & _IGNORES_CASE),
    )


def read_shared(read: Read, size: int) -> int:
    """Return how many bytes more the files of the XFS on a volume of `size` bytes take when no blocks are shared.

    Follows the tree of reference counts of each allocation group. Raises BadStructureError if one is damaged.
    """
    found = parse_xfs(read, size)
    settings = found.settings
    if "reflink" not in found.features:
        return 0
    if found.size > size:
        raise BadStructureError("the XFS file system is larger than its volume")
    return sum(_count_shared(read, found, number * settings.group_size) for number in range(settings.groups))


def _count_shared(read: Read, found: XfsSuperblock, start: int) -> int:
    """Return the bytes saved by sharing in the allocation group that begins at byte `start`."""
    block_size = found.block_size
    blocks = min(found.settings.group_size, found.size - start) // block_size
    if 2 * found.settings.sector_size > blocks * block_size:
        raise _bad_tree()
    header = read(start + found.settings.sector_size, 96)
    limit, block, level = struct.unpack_from(">III", header, 84)
    if header[:4] != b"XAGF" or not 0 < level <= 9 or limit > blocks:
        raise _bad_tree()
    saved = 0
    for _ in range(min(limit, _MOST_LEAVES) + level):
        if block >= blocks:
            raise _bad_tree()
        data = read(start + block * block_size, block_size)
        magic, height, count, _, right = struct.unpack_from(">4sHHII", data)
        if magic != b"R3FC" or height != level - 1:
            raise _bad_tree()
        if height:
            (block,) = struct.unpack_from(">I", data, _TREE_HEAD + (block_size - _TREE_HEAD) // 8 * 4)
            level -= 1
            continue
        if count > (block_size - _TREE_HEAD) // _COUNT.size:
            raise _bad_tree()
        for _, length, references in _COUNT.iter_unpack(data[_TREE_HEAD : _TREE_HEAD + count * _COUNT.size]):
            saved += (references - 1) * length if 1 < references <= _MAX_REFERENCES else 0
        if right == _NO_BLOCK:
            return saved * block_size
        block = right
    raise _bad_tree()


def _bad_tree() -> BadStructureError:
    return BadStructureError("the tree of shared blocks of the XFS file system is damaged")


def _names(bits: int, names: dict[int, str], kind: str) -> list[str]:
    return [names.get(1 << bit, f"FEATURE_{kind}{bit}") for bit in range(32) if bits >> bit & 1]
