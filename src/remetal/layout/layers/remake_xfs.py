"""Making XFS anew. Sources: mkfs.xfs(8), and what fs/xfs of Linux sets aside (libxfs/xfs_ag_resv.c, xfs_fsops.c)."""

from __future__ import annotations

from remetal.layout.layers.remaking import (
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
from remetal.layout.making import Making, XfsMaking
from remetal.layout.model import FileSystem
from remetal.units import GIB, MIB, TIB, align_down

_LEAST = 300 * MIB
"""mkfs.xfs makes nothing smaller since its version 6.0."""

_LABEL = 12
_LEAST_LOG = 64 * MIB
_RESERVE = 8192
"""Blocks that the kernel keeps for itself, or a twentieth of all if that is less."""

_GROUP_BLOCKS = 32
"""Headers, roots of trees, the free list and what the kernel sets aside, in each allocation group."""

_CHUNK = 64  # inodes that are allocated at once
_MODES = ("finobt", "rmapbt", "reflink", "bigtime", "inobtcount")
_BLOCK_HEAD, _RECORD, _REFERENCE, _EXTENT = 56, 24, 12, 16


def plan_remake(volume: FileSystem, making: Making | None, space: int, sector: int) -> Plan:
    """Decide how to make the file system anew on `space` bytes of a device with sectors of `sector` bytes.

    It keeps features, identity and settings; its blocks become as large as a sector at least. The bound on the space
    that is needed takes every file as fragmented block by block, every folder as half full, and files that share blocks
    as ones that do not.
    """
    if not isinstance(making, XfsMaking):
        return UNKNOWN
    if "needsrepair" in volume.features:
        return "it is marked as in need of repair; run xfs_repair on the source"
    if making.ignores_case:
        return "folders that ignore case cannot be copied as such"
    if find_obstacle(volume, _LABEL):
        return find_obstacle(volume, _LABEL)
    shape = _Shape(volume, making, sector)
    data = _count_data(volume, making, shape.block)
    needed = max(least_size(data, shape.overhead, shape.block), _LEAST)
    return fits(
        Remake(
            needed=needed,
            size=max(align_down(space, shape.block) * 63 // 64, shape.block),
            block_size=shape.block,
            features=tuple(name for name in volume.features if name != "meta_uuid"),
            commands=(_command(volume, making, shape, space),),
            losses=(NEW_INODES, *([larger_blocks(shape.block, volume.block_size)] * (shape.block > volume.block_size))),
        ),
        space,
    )


def _count_data(volume: FileSystem, making: XfsMaking, block: int) -> int:
    """Return the bytes that everything but the fixed structures may take up in blocks of this size."""
    # A file with many small holes may need a large block for each of its small ones.
    data = (max(volume.used - making.log, 0) + making.shared) * block // volume.block_size
    return data + folder_growth(data, making.inodes_used) + data // (block // _EXTENT // 2 - 4)


class _Shape:
    """The fixed structures of the file system to be made."""

    def __init__(self, volume: FileSystem, making: XfsMaking, sector: int) -> None:
        self.block = max(volume.block_size, sector)
        self.sector = max(making.sector_size, sector)
        self.captured = making
        self.features = set(volume.features)

    def groups(self, size: int) -> int:
        """Return the number of allocation groups: as before, but each with 1 GiB at least, and 1 TiB at most."""
        return max(min(self.captured.groups, size // GIB), 4, -(-size // (TIB - GIB)))

    def log(self, size: int) -> int:
        """Return the size of the log in bytes: as captured, but no large part of a small disk."""
        return align_down(max(_LEAST_LOG, min(self.captured.log, size // 16)), self.block)

    def overhead(self, size: int) -> int:
        """Return the most bytes that are not for files in a file system of `size` bytes."""
        groups = self.groups(size)
        blocks = -(-size // self.block // groups)
        room = self.block - _BLOCK_HEAD
        aside = _GROUP_BLOCKS
        if "rmapbt" in self.features:
            aside += max(blocks // 100, self._tree(blocks, room // _RECORD // 2))
        if "reflink" in self.features:
            aside += self._tree(blocks, room // _REFERENCE // 2)
        if "finobt" in self.features:
            chunks = blocks * self.block // (self.captured.inode_size * _CHUNK)
            aside += self._tree(chunks, room // _EXTENT // 2)
        # Each group may begin a chunk of inodes, and the space may end in pieces too small for one.
        aside += 4 * _CHUNK * self.captured.inode_size // self.block + 4
        reserve = min(size // self.block // 20, _RESERVE)
        return self.log(size) + (groups * aside + reserve) * self.block

    def inode_percent(self, size: int) -> int:
        """Return the share of the space that inodes may take: as captured, or more where all of them need it."""
        if self.captured.inode_percent == 0:
            return 0
        need = (self.captured.inodes_used + 8 * _CHUNK * self.groups(size)) * self.captured.inode_size
        return min(max(self.captured.inode_percent, need * 125 // size + 1), 100)

    @staticmethod
    def _tree(records: int, room: int) -> int:
        """Return the blocks of a tree whose nodes hold `room` records at least."""
        total = 0
        while records > 1:
            records = -(-records // room)
            total += records
        return total + 1


def _command(volume: FileSystem, making: XfsMaking, shape: _Shape, size: int) -> tuple[str, ...]:
    features = shape.features
    crc = "crc" in features
    modes = [f"crc={int(crc)}", *([f"{name}={int(name in features)}" for name in _MODES] if crc else ["finobt=0"])]
    inode = [f"size={making.inode_size}", f"maxpct={shape.inode_percent(size)}"]
    if crc:
        inode += [f"sparse={int('sparse' in features)}", f"nrext64={int('nrext64' in features)}"]
    names = [f"size={max(making.directory_block, shape.block)}", *([] if crc else [f"ftype={int(making.file_types)}"])]
    words = ["mkfs.xfs", "-f", "-q", "-K", "-b", f"size={shape.block}", "-s", f"size={shape.sector}"]
    words += ["-m", ",".join([*modes, *([f"uuid={volume.uuid}"] if volume.uuid else [])])]
    words += ["-d", f"agcount={shape.groups(size)}", "-i", ",".join(inode), "-n", ",".join(names)]
    words += ["-l", f"size={shape.log(size)}"]
    return (*words, "-L", volume.label) if volume.label else tuple(words)
