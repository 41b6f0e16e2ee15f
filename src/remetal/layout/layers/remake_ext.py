"""Making ext2, ext3 and ext4 anew. Sources: mke2fs(8), tune2fs(8), Documentation/filesystems/ext4 of Linux."""

from __future__ import annotations

from collections.abc import Iterator

from remetal.layout.layers.remaking import (
    NEVER,
    NEW_INODES,
    UNKNOWN,
    Plan,
    Remake,
    find_obstacle,
    fits,
    folder_growth,
    larger_blocks,
    least_size,
)
from remetal.layout.making import ExtMaking, Making
from remetal.layout.model import FileSystem
from remetal.units import MIB, align_down, align_up

_STATES = {"needs_recovery", "orphan_present"}
"""What says how the file system is, not how it was made."""

_REFUSED = {
    "encrypt": "its encrypted folders can only be copied with their keys",
    "verity": "files under verity cannot be copied as such",
    "casefold": "folders that ignore case cannot be copied as such",
    "imagic_inodes": "it is of an AFS server",
    "bigalloc": "its blocks come in clusters (bigalloc), so that nobody knows how much its files take up when copied",
    "compression": "no kernel reads compressed files on ext2",
    "dirdata": "it is of a Lustre server",
    "journal_dev": "it is a journal",
    "read-only": "it is marked read-only for good",
}
_USUAL_OPTIONS = ("user_xattr", "acl")
"""What mke2fs.conf(5) sets on most systems."""

_LABEL, _LEAST_BLOCK = 16, 1024
_LOST_AND_FOUND = 64 * 1024
_LEAST_JOURNAL = 1024  # blocks
_KERNEL_RESERVE = 4096  # blocks, EXT4_DEF_RESERVED_CLUSTERS in fs/ext4
_MAP_ENTRY, _BLOCK_NUMBER = 12, 4


def plan_remake(volume: FileSystem, making: Making | None, space: int, sector: int) -> Plan:
    """Decide how to make the file system anew on `space` bytes of a device with sectors of `sector` bytes.

    It keeps features, identity and settings; its blocks become as large as a sector at least. The bound on the space
    that is needed takes every file as fragmented block by block, every folder as half full.
    """
    if not isinstance(making, ExtMaking):
        return UNKNOWN
    refusal = _find_refusal(volume, making)
    if refusal:
        return refusal
    block = max(volume.block_size, sector)
    data = _count_data(volume, making, block)
    least = making.inodes_used + making.inodes_used // 16 + 64
    shape = _Shape(volume, making, block)
    # mke2fs makes no journal that would take more than half of what is free.
    needed = least_size(0, lambda size: shape.overhead(size, least) + max(data, shape.journal(size)), block)
    usual = making.inodes * space // volume.size
    inodes = usual if usual > least and data + shape.overhead(space, usual) <= space else least
    size = align_down(space, block)
    return fits(
        Remake(
            needed=needed,
            size=max(size - min(shape.group, size // 4), block),
            block_size=block,
            features=tuple(name for name in volume.features if name not in _STATES),
            commands=tuple(_commands(volume, making, shape, size, inodes)),
            checks=(("e2fsck", "-f", "-p"),),
            losses=(NEW_INODES, *_losses(making, block, volume.block_size)),
        ),
        space,
    )


def _find_refusal(volume: FileSystem, making: ExtMaking) -> str:
    for name in volume.features:
        if name in _REFUSED:
            return _REFUSED[name]
    if making.external_journal:
        return "its journal lies on another device"
    if not making.clean:
        return (
            "it was not unmounted cleanly, so that nobody knows how much its files take up: check it, back it up again"
        )
    if volume.block_size < _LEAST_BLOCK:
        return f"it has blocks of {volume.block_size} bytes"
    return find_obstacle(volume, _LABEL)


def _count_data(volume: FileSystem, making: ExtMaking, block: int) -> int:
    """Return the bytes that everything but the fixed structures may take up in blocks of this size."""
    data = max(volume.used - making.inodes * making.inode_size - making.journal, 0)
    if block > volume.block_size:
        # A file with many small holes may need a large block for each of its small ones.
        data = min(making.in_pages or NEVER, data // volume.block_size * block)
    grown = data + folder_growth(data, making.inodes_used) + _LOST_AND_FOUND
    if "inline_data" in volume.features:
        grown += making.inodes_used * block
    if "extent" in volume.features:
        return grown + data // (volume.block_size // _MAP_ENTRY - 2)
    return grown + data // (volume.block_size // _BLOCK_NUMBER - 1)


class _Shape:
    """The fixed structures of the file system to be made."""

    def __init__(self, volume: FileSystem, making: ExtMaking, block: int) -> None:
        self.block = block
        self.inode_size = making.inode_size
        self.features = set(volume.features)
        self.group = 8 * block * block
        self.captured_journal = making.journal

    def journal(self, size: int) -> int:
        """Return the size of the journal in bytes, a number of MiB: as captured, but no large part of a small disk."""
        if "has_journal" not in self.features:
            return 0
        least = align_up(_LEAST_JOURNAL * self.block, MIB)
        return max(align_down(min(self.captured_journal or least, size // 16), MIB), least)

    def overhead(self, size: int, inodes: int) -> int:
        """Return the most bytes that are not for files in a file system of `size` bytes."""
        groups = size // self.group + 1
        table = align_up(-(-inodes // groups) * self.inode_size + 8 * self.inode_size, self.block) + self.block
        journal = self.journal(size)
        descriptors, reserved = self._descriptors(size, groups)
        backups = self._backups(groups) * (1 + descriptors + reserved) * self.block
        fixed = groups * (table + 2 * self.block)
        kernel = min(size // 50, _KERNEL_RESERVE * self.block) if "extent" in self.features else 0
        # mke2fs leaves a last group away that would hold little more than its own tables.
        last = table + (64 + 2 + 1 + descriptors + reserved) * self.block
        return fixed + backups + journal + journal // 64 + kernel + last

    def _descriptors(self, size: int, groups: int) -> tuple[int, int]:
        """Return the blocks of group descriptors, and of those that are set aside for growing."""
        each = 64 if "64bit" in self.features else 32
        blocks = -(-groups * each // self.block)
        if "resize_inode" not in self.features:
            return blocks, 0
        later = min(size // self.block * 1024, (1 << 32) - 1) * self.block // self.group + 1
        return blocks, min(-(-later * each // self.block) + 1, self.block // 4)

    def _backups(self, groups: int) -> int:
        if "sparse_super2" in self.features:
            return 3
        if "sparse_super" not in self.features:
            return groups
        return 1 + len({power for base in (3, 5, 7) for power in _powers(base, groups)})


def _powers(base: int, limit: int) -> Iterator[int]:
    power = 1
    while power < limit:
        yield power
        power *= base


def _commands(volume: FileSystem, making: ExtMaking, shape: _Shape, size: int, inodes: int) -> list[tuple[str, ...]]:
    features = [name for name in volume.features if name not in _STATES]
    percent = min(making.reserved / volume.size * 100, 50)
    make = ["mke2fs", "-F", "-q", "-b", str(shape.block), "-I", str(making.inode_size), "-N", str(inodes)]
    make += ["-O", ",".join(["none", *features]), "-m", f"{percent:.4f}", "-e", making.errors]
    make += ["-E", f"nodiscard,hash_seed={making.hash_seed}" if making.hash_seed else "nodiscard"]
    if volume.uuid:
        make += ["-U", volume.uuid]
    if volume.label:
        make += ["-L", volume.label]
    if "flex_bg" in features and making.flex_groups > 1:
        make += ["-G", str(making.flex_groups)]
    journal = shape.journal(size)
    if journal:
        make += ["-J", f"size={journal // MIB}"]
    tune = ["tune2fs", "-c", str(making.max_mounts), "-i", f"{making.check_interval}s"]
    tune += ["-u", str(making.reserved_user), "-g", str(making.reserved_group)]
    unset = [f"^{name}" for name in _USUAL_OPTIONS if name not in making.mount_options]
    if unset or making.mount_options:
        tune += ["-o", ",".join([*unset, *making.mount_options])]
    extended = []
    if making.hash_algorithm:
        extended.append(f"hash_alg={making.hash_algorithm}")
    if making.mount_text and "," not in making.mount_text:
        extended.append(f"mount_opts={making.mount_text}")
    if extended:
        tune += ["-E", ",".join(extended)]
    return [tuple(make), tuple(tune)]


def _losses(making: ExtMaking, block: int, before: int) -> list[str]:
    losses = [larger_blocks(block, before)] if block > before else []
    if "," in making.mount_text:
        losses.append(f"the mount options in its superblock ({making.mount_text}) are not set")
    return losses
