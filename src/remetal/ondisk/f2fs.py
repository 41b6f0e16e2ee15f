"""Size and use of f2fs.

The main area is made of segments of 512 blocks. The segment information table (SIT) has one entry for each, with a bit
for every block; each block of that table exists twice, and the checkpoint tells which of the two is valid. The newest
entries stand in the checkpoint itself. Sources: Linux Documentation/filesystems/f2fs.rst and include/linux/f2fs_fs.h
(little-endian).
"""

from __future__ import annotations

import heapq
import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remetal.ondisk.bitmaps import UncleanError, count_bits, find_ranges, merge, to_bytes
from remetal.ondisk.regions import BadStructureError, Read
from remetal.units import MIB

_MAGIC = 0xF2F52010
_SUPERBLOCK_AT, _SUPERBLOCK_SIZE = 1024, 3072
_HEAD = struct.Struct("<IHHIIIIIIIQ16I")
_UUID_AT, _LABEL_AT, _LABEL_SIZE = 108, 124, 1024
_PAYLOAD_AT, _FEATURES_AT, _SECOND_DEVICE_AT = 1664, 2180, 2201 + 68
_BLOCK = 4096
_SEGMENT = 512  # blocks
_NAMES = {
    0x1: "encrypt",
    0x2: "blkzoned",
    0x8: "extra_attr",
    0x10: "project_quota",
    0x20: "inode_checksum",
    0x40: "flexible_inline_xattr",
    0x80: "quota",
    0x100: "inode_crtime",
    0x200: "lost_found",
    0x400: "verity",
    0x800: "sb_checksum",
    0x1000: "casefold",
    0x2000: "compression",
    0x4000: "ro",
}
_ZONED, _CHECKSUM, _READ_ONLY = 0x2, 0x800, 0x4000
_KNOWN = sum(_NAMES) & ~_READ_ONLY

_CHECKPOINT = struct.Struct("<QQQ12x32x16x32x16xIII12xIII")
_WARM_NODES_AT, _WARM_NODES_OFFSET_AT = 36 + 4, 68 + 2
_BITMAPS_AT = 192
_NODE_VERSION_AT = _BLOCK - 12
"""Where a node holds the number of the checkpoint that it was written after, as far as it is compared."""

_UNMOUNTED, _ORPHANS, _COMPACT, _TRIMMED = 0x1, 0x2, 0x4, 0x100
_HARMLESS = _UNMOUNTED | _ORPHANS | _COMPACT | _TRIMMED | 0x20 | 0x40 | 0x80 | 0x200 | 0x400
_LARGE_NAT_BITMAP = 0x400
_SUMMARIES, _COLD_DATA = 6, 2
_JOURNAL_AT, _COMPACT_JOURNAL_AT = 3584, 507
_JOURNAL_ENTRIES = 6

_ENTRY = 74
_ENTRIES = _BLOCK // _ENTRY
_BLOCKS_AT_ONCE = MIB // _BLOCK

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class F2fsVolume:
    """Sizes in bytes; `features` as mkfs.f2fs(8) names them, unknown ones as `FEATURE_16`-like names.

    `sector_size` is that of the disk which it was made on. `clean` if it was unmounted.
    """

    size: int
    used: int
    block_size: int
    sector_size: int
    uuid: str
    label: str
    features: tuple[str, ...]
    clean: bool


@dataclass(frozen=True, slots=True)
class _Super:
    """The superblock; places and counts in blocks, but for `main_segments`."""

    blocks: int
    sector: int
    checkpoints: int
    sit: int
    sit_blocks: int
    main: int
    main_segments: int
    payload: int
    features: int
    uuid: str
    label: str


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """The valid checkpoint: where its pack begins (a block), and what it says of the main area and the SIT.

    `next_node` is the block, counted from the start of the main area, that the next node of a file will be written to;
    `continued` if one was written there already: synced files that only the next mount will find.
    """

    start: int
    valid: int
    flags: int
    pack: int
    summaries: int
    next_node: int
    continued: bool
    version: Bytes
    """A bit for every block of the SIT: whether its second copy is the valid one."""


def parse_f2fs(read: Read, size: int) -> F2fsVolume:
    """Describe the file system on a volume of `size` bytes.

    Raises BadStructureError if there is no sound one, or if part of it lies on another device.
    """
    found = _parse_super(read, size)
    checkpoint = _parse_checkpoint(read, found)
    return F2fsVolume(
        size=found.blocks * _BLOCK,
        used=(found.main + checkpoint.valid) * _BLOCK,
        block_size=_BLOCK,
        sector_size=found.sector,
        uuid=found.uuid,
        label=found.label,
        features=tuple(_NAMES.get(1 << bit, f"FEATURE_{bit}") for bit in range(32) if found.features >> bit & 1),
        clean=_is_clean(checkpoint),
    )


def read_used(read: Read, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and size in bytes of what is used on a volume of `size` bytes: all but free blocks of the main area.

    One free block counts as used: the one where the kernel looks, at every mount, for nodes that were written after the
    checkpoint (fs/f2fs/recovery.c). Restored onto a later state of itself, the file system would else find some.
    Raises UncleanError if it was not unmounted cleanly, BadStructureError if there is no sound f2fs, it has features
    that are unknown here, or its counts contradict one another.
    """
    found = _parse_super(read, size)
    if found.features & ~_KNOWN:
        raise BadStructureError("the f2fs has features that remetal does not know")
    checkpoint = _parse_checkpoint(read, found)
    if not _is_clean(checkpoint):
        raise UncleanError(
            "was not unmounted cleanly",
            hint="Mount and unmount it once, or run its fsck, for a smaller and faster backup.",
        )
    blocks = found.main_segments * _SEGMENT
    used = find_ranges(_read_maps(read, found, checkpoint), blocks, "big")
    if count_bits(used) != checkpoint.valid:
        raise BadStructureError(
            f"{count_bits(used)} blocks of the f2fs are marked valid, its checkpoint counts {checkpoint.valid}"
        )
    main = found.main * _BLOCK
    next_node = (main + checkpoint.next_node * _BLOCK, _BLOCK)
    return merge(heapq.merge([(0, main)], to_bytes(used, main, _BLOCK), [next_node]))


def _is_clean(checkpoint: _Checkpoint) -> bool:
    """Whether it was unmounted, and nothing waits for a check: no error, no fsck asked for, no part switched off.

    Mounting does not take away that it was unmounted; so it must not have been written to afterwards either.
    """
    rests = bool(checkpoint.flags & _UNMOUNTED) and not checkpoint.flags & ~_HARMLESS
    return rests and not checkpoint.continued


def _parse_super(read: Read, size: int) -> _Super:
    if size < 2 * _BLOCK:
        raise BadStructureError("the volume is too small for f2fs")
    data = read(_SUPERBLOCK_AT, _SUPERBLOCK_SIZE)
    magic, _, _, sector_bits, _, block_bits, segment_bits, _, _, checksum_at, blocks, *rest = _HEAD.unpack_from(data)
    _, segments, pack_segments, sit_segments, nat_segments, ssa_segments, main_segments = rest[:7]
    first, checkpoints, sit, nat, ssa, main = rest[7:13]
    payload, features = _number(data, _PAYLOAD_AT), _number(data, _FEATURES_AT)
    if magic != _MAGIC or (block_bits, segment_bits) != (12, 9) or not 9 <= sector_bits <= 12:
        raise BadStructureError("the superblock of the f2fs is damaged, or of a kind that remetal does not know")
    if features & _CHECKSUM and not _has_checksum(data, checksum_at, _SUPERBLOCK_SIZE):
        raise BadStructureError("the superblock of the f2fs does not have its checksum")
    if features & _ZONED or data[_SECOND_DEVICE_AT]:
        raise BadStructureError("a part of this f2fs may lie on another device, or its disk has zones")
    areas = (first, pack_segments, sit_segments, nat_segments, ssa_segments, main_segments)
    places = [first + sum(areas[1:end]) * _SEGMENT for end in range(1, 7)]
    if (
        [checkpoints, sit, nat, ssa, main] != places[:5]
        or first < 2
        or pack_segments < 2
        or sit_segments % 2
        or not 0 < places[5] <= blocks <= size // _BLOCK
        or segments < sum(areas[1:])
        or main_segments == 0
        or sit_segments // 2 * _SEGMENT * _ENTRIES < main_segments
        or payload > _SEGMENT
    ):
        raise BadStructureError("the superblock of the f2fs has impossible sizes")
    return _Super(
        blocks=blocks,
        sector=1 << sector_bits,
        checkpoints=checkpoints,
        sit=sit,
        sit_blocks=sit_segments // 2 * _SEGMENT,
        main=main,
        main_segments=main_segments,
        payload=payload,
        features=features,
        uuid=str(uuid.UUID(bytes=data[_UUID_AT : _UUID_AT + 16])),
        label=data[_LABEL_AT : _LABEL_AT + _LABEL_SIZE].decode("utf-16-le", "replace").split("\0")[0],
    )


def _parse_checkpoint(read: Read, found: _Super) -> _Checkpoint:
    """Return the newer one of the two checkpoints that are whole."""
    packs = [_parse_pack(read, found, found.checkpoints + index * _SEGMENT) for index in range(2)]
    valid = [pack for pack in packs if pack is not None]
    if not valid:
        raise BadStructureError("the f2fs has no valid checkpoint")
    return max(valid, key=lambda pack: pack[0])[1]


def _parse_pack(read: Read, found: _Super, start: int) -> tuple[int, _Checkpoint] | None:
    """Return a checkpoint and its number, or None if its first and last block are not sound or not of one number."""
    head = read(start * _BLOCK, _BLOCK)
    number, _, valid, flags, pack, summaries, sit_bytes, nat_bytes, checksum_at = _CHECKPOINT.unpack_from(head)
    if not _has_checksum(head, checksum_at, _BLOCK) or not 2 < pack <= _SEGMENT:
        return None
    tail = read((start + pack - 1) * _BLOCK, _BLOCK)
    if not _has_checksum(tail, _number(tail, 164), _BLOCK) or tail[:8] != head[:8]:
        return None
    place = _BITMAPS_AT
    if flags & _LARGE_NAT_BITMAP:
        place += 4 + nat_bytes
    elif found.payload:
        place = _BLOCK
    area = head + read((start + 1) * _BLOCK, found.payload * _BLOCK) if found.payload else head
    version = area[place : place + sit_bytes]
    (offset,) = struct.unpack_from("<H", head, _WARM_NODES_OFFSET_AT)
    next_node = _number(head, _WARM_NODES_AT) * _SEGMENT + offset
    if 8 * sit_bytes != found.sit_blocks or len(version) < sit_bytes:
        return None
    if max(valid, next_node + 1) > found.main_segments * _SEGMENT:
        return None
    node = read((found.main + next_node) * _BLOCK, _BLOCK)
    continued = _number(node, _NODE_VERSION_AT) == number & 0xFFFFFFFF
    bits = np.unpackbits(np.frombuffer(version, np.uint8))
    return number, _Checkpoint(start, valid, flags, pack, summaries, next_node, continued, bits)


def _read_maps(read: Read, found: _Super, checkpoint: _Checkpoint) -> Iterator[bytes]:
    """Yield the bitmaps of the segments, in their order. Raises BadStructureError if one contradicts its count."""
    journal = _read_journal(read, found, checkpoint)
    needed = -(-found.main_segments // _ENTRIES)
    for first in range(0, needed, _BLOCKS_AT_ONCE):
        count = min(_BLOCKS_AT_ONCE, needed - first)
        copies = [
            np.frombuffer(read((found.sit + copy * found.sit_blocks + first) * _BLOCK, count * _BLOCK), np.uint8)
            for copy in range(2)
        ]
        chosen = np.where(
            checkpoint.version[first : first + count, np.newaxis] == 1,
            copies[1].reshape(-1, _BLOCK),
            copies[0].reshape(-1, _BLOCK),
        )
        entries = chosen[:, : _ENTRIES * _ENTRY].reshape(-1, _ENTRY)[: found.main_segments - first * _ENTRIES]
        for segment, entry in journal.items():
            if first * _ENTRIES <= segment < first * _ENTRIES + len(entries):
                entries[segment - first * _ENTRIES] = np.frombuffer(entry, np.uint8)
        maps = np.ascontiguousarray(entries[:, 2:66])
        counts = np.ascontiguousarray(entries[:, :2]).view("<u2")[:, 0] & 0x3FF
        if np.any(np.bitwise_count(maps).sum(axis=1) != counts):
            raise BadStructureError("a segment of the f2fs has another number of valid blocks than it says")
        yield maps.tobytes()


def _read_journal(read: Read, found: _Super, checkpoint: _Checkpoint) -> dict[int, bytes]:
    """Return the entries of the SIT that stand in the checkpoint's summary of the cold data, by segment."""
    if checkpoint.flags & _COMPACT:
        block, place = checkpoint.summaries, _COMPACT_JOURNAL_AT
    else:
        block, place = checkpoint.pack - 1 - _SUMMARIES + _COLD_DATA, _JOURNAL_AT
    if not 0 < block < checkpoint.pack - 1:
        raise BadStructureError("the checkpoint of the f2fs is too short")
    data = read((checkpoint.start + block) * _BLOCK, _BLOCK)
    (count,) = struct.unpack_from("<H", data, place)
    if count > _JOURNAL_ENTRIES:
        raise BadStructureError("the journal of the f2fs has too many entries")
    journal = {}
    for index in range(count):
        at = place + 2 + index * (4 + _ENTRY)
        segment = _number(data, at)
        if segment >= found.main_segments:
            raise BadStructureError("the journal of the f2fs names a segment that is not there")
        journal[segment] = data[at + 4 : at + 4 + _ENTRY]
    return journal


def _has_checksum(data: bytes, place: int, size: int) -> bool:
    """Whether the first `place` of `size` bytes have the checksum that stands behind them."""
    if not 0 < place <= size - 4:
        return False
    # f2fs seeds a CRC-32 with its magic and inverts neither seed nor result.
    return zlib.crc32(data[:place], _MAGIC ^ 0xFFFFFFFF) ^ 0xFFFFFFFF == _number(data, place)


def _number(data: bytes, place: int) -> int:
    return int(struct.unpack_from("<I", data, place)[0])
