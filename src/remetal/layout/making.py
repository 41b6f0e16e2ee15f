"""How a file system was made: what its mkfs has to be told to make the like of it, and what its files take up.

It is captured with every layout, so that a file system can be made anew where its blocks do not fit. Sizes in bytes.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TypeAlias

import msgspec

from remetal.ondisk.btrfs import CHUNK_KINDS
from remetal.ondisk.ext import ExtSettings
from remetal.ondisk.fat_chains import count_chains, read_root_entries
from remetal.ondisk.regions import Read
from remetal.ondisk.xfs import XfsSettings

_MAX = 1 << 63
_MAX_TEXT = 64
_WORD = re.compile(r"[a-z0-9_-]{1,32}", re.IGNORECASE | re.ASCII)
"""What can stand between the commas of an option."""
_SEED = re.compile(r"(?:[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12})?")
_POWERS = frozenset(1 << bit for bit in range(64))


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ExtMaking(_Record, frozen=True, kw_only=True, tag_field="kind", tag="ext"):
    """ext2, ext3, ext4: as `remetal.ondisk.ext.ExtSettings`.

    `in_pages` are the bytes that all files take up in blocks of 4096 bytes, where they have smaller ones; 0 if unknown.
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
    in_pages: int = 0


class XfsMaking(_Record, frozen=True, kw_only=True, tag_field="kind", tag="xfs"):
    """XFS: as `remetal.ondisk.xfs.XfsSettings`; `shared` bytes more are needed when files share no blocks."""

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
    ignores_case: bool
    shared: int


class FatMaking(_Record, frozen=True, kw_only=True, tag_field="kind", tag="fat"):
    """FAT: the number of its files and folders with content, and of places in a root folder of fixed size (or 0)."""

    chains: int
    root_entries: int


class BtrfsMaking(_Record, frozen=True, kw_only=True, tag_field="kind", tag="btrfs"):
    """btrfs: the kinds of its chunks, as `remetal.ondisk.btrfs.Allocation` names them."""

    chunks: tuple[str, ...]


Making: TypeAlias = ExtMaking | XfsMaking | FatMaking | BtrfsMaking


def describe_ext(found: ExtSettings, in_pages: int = 0) -> ExtMaking:
    """Return how an ext file system was made; `in_pages` as `remetal.ondisk.ext.count_in_blocks` counts it."""
    return ExtMaking(**asdict(found), in_pages=in_pages)


def describe_xfs(found: XfsSettings, shared: int) -> XfsMaking:
    """Return how an XFS was made; `shared` as `remetal.ondisk.xfs.read_shared` counts it."""
    return XfsMaking(**asdict(found), shared=shared)


def describe_fat(read: Read, size: int) -> FatMaking:
    """Return how the FAT on a volume of `size` bytes was made. Raises BadStructureError if there is no sound one."""
    return FatMaking(chains=count_chains(read, size), root_entries=read_root_entries(read))


def is_possible_making(making: Making) -> bool:
    """Whether a record from a repository holds nothing that could lead a program or a computation astray."""
    values = [getattr(making, name) for name in making.__struct_fields__]
    numbers = [value for value in values if isinstance(value, int)]
    texts = [text for value in values for text in ([value] if isinstance(value, str) else [])]
    if not all(-_MAX < number < _MAX for number in numbers) or any(len(text) > _MAX_TEXT for text in texts):
        return False
    if any("\0" in text or not text.isascii() for text in texts):
        return False
    match making:
        case ExtMaking():
            sizes = {making.inode_size, making.flex_groups} <= _POWERS
            counts = 0 <= making.inodes_used <= making.inodes < 1 << 32 and making.inode_size >= 128
            spoken = (*making.mount_options, making.errors)
            words = all(_WORD.fullmatch(text) for text in (*spoken, making.hash_algorithm or "none"))
            words = words and _SEED.fullmatch(making.hash_seed) is not None and making.mount_text.isprintable()
            return sizes and counts and words and min(making.reserved, making.journal, making.in_pages) >= 0
        case XfsMaking():
            sizes = {making.sector_size, making.inode_size, making.directory_block} <= _POWERS
            counts = 0 <= making.inodes_used <= making.inodes and making.groups > 0 and making.group_size > 0
            return sizes and counts and 0 <= making.inode_percent <= 100 and min(making.log, making.shared) >= 0
        case BtrfsMaking():
            return set(making.chunks) <= CHUNK_KINDS
        case FatMaking():
            return min(numbers) >= 0
