"""Superblocks of btrfs, and which bytes of each of its devices are allocated.

A btrfs is spread over its devices in chunks; the chunk tree tells where each stripe of each chunk lies. The tree itself
is found by the few chunks that every superblock holds a copy of. Sources: Linux include/uapi/linux/btrfs_tree.h and
fs/btrfs/volumes.c; https://btrfs.readthedocs.io/en/latest/dev/On-disk-format.html (little-endian).
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeAlias

from remetal.errors import RemetalError
from remetal.ondisk.regions import BadStructureError, Read
from remetal.units import GIB, KIB, MIB

SUPERBLOCKS = (64 * KIB, 64 * MIB, 256 * GIB)
"""Where a device holds its superblock and the copies of it, as far as the device reaches."""

Device: TypeAlias = tuple[Read, int]
"""How to read a device, and its size in bytes."""

_SUPERBLOCK_SIZE = 4096
_RESERVED = MIB  # btrfs leaves it alone but for the superblock; boot loaders put code there
_MAGIC = b"_BHRfS_M"
_IDENTITY = struct.Struct("<32s16sQQ8sQ")
_SIZES_AT, _SIZES = 0x58, struct.Struct("<QQ8xQQ8xQII")
_TREE_AT, _TREE = 0xA0, struct.Struct("<IQ8xQQHxB")
_DEVICE_AT, _DEVICE = 0xC9, struct.Struct("<QQ50x16s16s")
_LABEL_AT, _LABEL_SIZE = 0x12B, 256
_METADATA_UUID_AT = 0x23B
_SYSTEM_CHUNKS_AT, _SYSTEM_CHUNKS_SIZE = 0x32B, 2048

_NODE = struct.Struct("<32s16sQQ16sQQIB")
_KEY = struct.Struct("<QBQ")
_POINTER = struct.Struct("<QBQQQ")
_ITEM = struct.Struct("<QBQII")
_CHUNK = struct.Struct("<QQQQIIIHH")
_STRIPE = struct.Struct("<QQ16s")
_CHUNK_TREE, _DEVICE_ITEM, _CHUNK_ITEM = 3, 216, 228
_MAX_LEVEL = 8
_MAX_NODES, _MAX_EXTENTS = 1 << 14, 1 << 21
"""Of a chunk tree: room for a file system of petabytes."""

_STRIPE_SIZE = 64 * KIB
_RAID0, _RAID1, _DUP, _RAID10, _RAID5, _RAID6, _RAID1C3, _RAID1C4 = (1 << bit for bit in range(3, 11))
_PROFILES = _RAID0 | _RAID1 | _DUP | _RAID10 | _RAID5 | _RAID6 | _RAID1C3 | _RAID1C4
_CONTENTS = {0x1: "data", 0x2: "system", 0x4: "metadata"}
_PROFILE_NAMES = {
    0: "single",
    _RAID0: "raid0",
    _RAID1: "raid1",
    _DUP: "dup",
    _RAID10: "raid10",
    _RAID5: "raid5",
    _RAID6: "raid6",
    _RAID1C3: "raid1c3",
    _RAID1C4: "raid1c4",
}
CHUNK_KINDS = frozenset(f"{content} {profile}" for content in _CONTENTS.values() for profile in _PROFILE_NAMES.values())
"""What a chunk holds, and its profile."""

_PARITIES = {_RAID0: 0, _RAID5: 1, _RAID6: 2}
_COPIES = {0: 1, _DUP: 2, _RAID1: 2, _RAID1C3: 3, _RAID1C4: 4}

_INCOMPATIBLE = {
    0x1: "MIXED_BACKREF",
    0x2: "DEFAULT_SUBVOL",
    0x4: "MIXED_GROUPS",
    0x8: "COMPRESS_LZO",
    0x10: "COMPRESS_ZSTD",
    0x20: "BIG_METADATA",
    0x40: "EXTENDED_IREF",
    0x80: "RAID56",
    0x100: "SKINNY_METADATA",
    0x200: "NO_HOLES",
    0x400: "METADATA_UUID",
    0x800: "RAID1C34",
    0x1000: "ZONED",
    0x2000: "EXTENT_TREE_V2",
    0x4000: "RAID_STRIPE_TREE",
    0x10000: "SIMPLE_QUOTA",
}
_READ_ONLY = {
    0x1: "FREE_SPACE_TREE",
    0x2: "FREE_SPACE_TREE_VALID",
    0x4: "VERITY",
    0x8: "BLOCK_GROUP_TREE",
}
_METADATA_UUID, _ZONED = 0x400, 0x1000
_SEED, _METADUMP, _CHANGING = 1 << 32, 0b11 << 33, 0b11 << 35 | 0b111 << 38


@dataclass(frozen=True, slots=True)
class Stripe:
    """A part of a chunk: it begins at byte `start` of the device numbered `devid`."""

    devid: int
    start: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """`size` bytes from byte `start` of the file system's own address space, and the stripes that hold them.

    `profile` is the bit of the RAID profile, 0 for single. Each stripe takes `stripe_size` bytes of its device.
    `content` has the bits for data, system and metadata.
    """

    start: int
    size: int
    profile: int
    stripe_size: int
    stripes: tuple[Stripe, ...]
    content: int

    @property
    def kind(self) -> str:
        """What it holds, and its profile: one of `CHUNK_KINDS`. Mixed content counts as data."""
        content = next((name for bit, name in _CONTENTS.items() if self.content & bit), "data")
        return f"{content} {_PROFILE_NAMES[self.profile]}"


@dataclass(frozen=True, slots=True)
class Allocation:
    """What is allocated on each device, by devid: start and size in bytes of every stripe, ascending.

    `kinds` are those of its chunks.
    """

    extents: dict[int, list[tuple[int, int]]]
    kinds: frozenset[str]


@dataclass(frozen=True, slots=True)
class BtrfsSuperblock:
    """What a device tells of its file system. Sizes in bytes; `features` as btrfs-progs prints them.

    `total_bytes` and `bytes_used` are of the whole file system, `device_size` is what it uses of this device, `devid`
    and `device_uuid` name this device among its `devices`. `metadata_uuid` differs from `fsid` where btrfstune gave the
    file system a new UUID without writing it into every block. `has_log`: it was not unmounted cleanly. `problems` are
    short phrases that tell why it cannot be carried by its allocated bytes and grown. The rest leads to the chunk tree.
    """

    fsid: str
    metadata_uuid: str
    label: str
    total_bytes: int
    bytes_used: int
    sector_size: int
    node_size: int
    devices: int
    devid: int
    device_uuid: str
    device_size: int
    generation: int
    checksum: str
    features: tuple[str, ...]
    has_log: bool
    chunk_root: int
    chunk_root_generation: int
    chunk_root_level: int
    system_chunks: tuple[Chunk, ...]
    problems: tuple[str, ...] = ()


def parse_btrfs(read: Read, size: int) -> BtrfsSuperblock:
    """Parse the superblock of a device of `size` bytes.

    If the first one is damaged, the newest of its copies counts and `problems` say so. Raises BadStructureError if
    there is no sound one.
    """
    reasons, copies = [], []
    for place in SUPERBLOCKS:
        if place + _SUPERBLOCK_SIZE > size:
            break
        try:
            copies.append(_parse_superblock(read(place, _SUPERBLOCK_SIZE), place))
        except BadStructureError as error:
            reasons.append(error.message)
        else:
            if place == SUPERBLOCKS[0]:
                break
    if not copies:
        raise BadStructureError(reasons[0] if reasons else "the device is too small for btrfs")
    found = max(copies, key=lambda copy: copy.generation)
    problems = list(found.problems)
    if reasons:
        problems.append("its first superblock is damaged; a copy of it was read")
    if found.device_size > size:
        problems.append("it reaches beyond the end of the device")
    return replace(found, problems=tuple(problems))


def read_allocation(devices: Mapping[int, Device], superblock: BtrfsSuperblock) -> Allocation:
    """Return what is allocated on each device, and for what.

    `devices` are those at hand, by devid; `superblock` is the one with the highest generation among theirs. Devices
    that are missing are listed as well. Every block of the chunk tree is verified, and read from another copy (or
    rebuilt from parity) where one is damaged or missing. Raises BadStructureError if no copy is sound, or if the
    stripes overlap or leave their device.
    """
    sizes: dict[int, int] = {}
    extents: list[tuple[int, int, int]] = []
    kinds: set[str] = set()
    for kind, place, data in _read_chunk_tree(devices, superblock):
        if kind == _DEVICE_ITEM and len(data) == _DEVICE.size:
            devid, sizes[devid], _, _ = _DEVICE.unpack(data)
        elif kind == _CHUNK_ITEM:
            chunk = _parse_chunk(data, place)
            if len(extents) > _MAX_EXTENTS:
                raise BadStructureError("the btrfs has more chunks than any can have")
            extents += ((stripe.devid, stripe.start, chunk.stripe_size) for stripe in chunk.stripes)
            kinds.add(chunk.kind)
    found: dict[int, list[tuple[int, int]]] = {devid: [] for devid in sorted(sizes)}
    for devid, start, size in sorted(extents):
        if start + size > sizes.get(devid, 0):
            raise BadStructureError(f"a chunk of the btrfs leaves device {devid}")
        if found[devid] and start < sum(found[devid][-1]):
            raise BadStructureError(f"chunks of the btrfs overlap on device {devid}")
        found[devid].append((start, size))
    return Allocation(found, frozenset(kinds))


def used_ranges(extents: Iterable[tuple[int, int]], device_size: int) -> list[tuple[int, int]]:
    """Return start and size in bytes of what has to be copied of a device: ascending, without overlaps or neighbours.

    That is its `extents`, the superblocks, and the reserved start. `device_size` is the superblock's.
    """
    wanted = [(0, _RESERVED), *((place, _SUPERBLOCK_SIZE) for place in SUPERBLOCKS), *extents]
    ranges: list[tuple[int, int]] = []
    for start, size in sorted(wanted):
        end = min(start + size, device_size)
        if ranges and start <= sum(ranges[-1]):
            first = ranges[-1][0]
            ranges[-1] = (first, max(end, sum(ranges[-1])) - first)
        elif start < end:
            ranges.append((start, end - start))
    return ranges


def _parse_superblock(data: bytes, place: int) -> BtrfsSuperblock:
    checksum, fsid, address, flags, magic, generation = _IDENTITY.unpack_from(data)
    chunk_root, log_root, total, used, devices, sector, node = _SIZES.unpack_from(data, _SIZES_AT)
    chunks_size, chunk_root_generation, read_only, incompatible, checksum_type, chunk_root_level = _TREE.unpack_from(
        data, _TREE_AT
    )
    if magic != _MAGIC:
        raise BadStructureError("there is no superblock of btrfs")
    if checksum_type not in _CHECKSUMS:
        raise BadStructureError("the superblock of the btrfs has a checksum of an unknown kind")
    name, compute = _CHECKSUMS[checksum_type]
    if address != place or not checksum.startswith(compute(data[32:])):
        raise BadStructureError("the superblock of the btrfs is damaged")
    devid, device_size, device_uuid, device_fsid = _DEVICE.unpack_from(data, _DEVICE_AT)
    metadata_uuid = fsid
    if incompatible & _METADATA_UUID:
        metadata_uuid = data[_METADATA_UUID_AT : _METADATA_UUID_AT + 16]
    powers = {1 << bit for bit in range(12, 17)}
    if sector not in powers or node not in powers or node < sector or chunk_root_level >= _MAX_LEVEL:
        raise BadStructureError("the superblock of the btrfs gives impossible sizes")
    if not devices or not 0 < device_size <= total or used > total or device_fsid != metadata_uuid:
        raise BadStructureError("the superblock of the btrfs contradicts itself")
    return BtrfsSuperblock(
        fsid=str(uuid.UUID(bytes=fsid)),
        metadata_uuid=str(uuid.UUID(bytes=metadata_uuid)),
        label=data[_LABEL_AT : _LABEL_AT + _LABEL_SIZE].split(b"\0")[0].decode("utf-8", "replace"),
        total_bytes=total,
        bytes_used=used,
        sector_size=sector,
        node_size=node,
        devices=devices,
        devid=devid,
        device_uuid=str(uuid.UUID(bytes=device_uuid)),
        device_size=device_size,
        generation=generation,
        checksum=name,
        features=(*_names(incompatible, _INCOMPATIBLE, "I"), *_names(read_only, _READ_ONLY, "R")),
        has_log=log_root != 0,
        chunk_root=chunk_root,
        chunk_root_generation=chunk_root_generation,
        chunk_root_level=chunk_root_level,
        system_chunks=tuple(_parse_system_chunks(data[_SYSTEM_CHUNKS_AT:][:_SYSTEM_CHUNKS_SIZE], chunks_size)),
        problems=tuple(_find_problems(flags, incompatible, devid)),
    )


def _names(bits: int, names: dict[int, str], kind: str) -> list[str]:
    return [names.get(1 << bit, f"FEATURE_{kind}{bit}") for bit in range(64) if bits >> bit & 1]


def _find_problems(flags: int, incompatible: int, devid: int) -> list[str]:
    problems = {
        "it is the seed of other file systems": flags & _SEED,
        "it is an image of metadata only": flags & _METADUMP,
        "its UUID or its format is being changed, and that did not end": flags & _CHANGING,
        "it is made for zoned disks": incompatible & _ZONED,
        "it has features that remetal does not know": incompatible & ~sum(_INCOMPATIBLE),
        "it is about to replace another device, and that did not end": devid == 0,
    }
    return [phrase for phrase, found in problems.items() if found]


def _parse_system_chunks(data: bytes, size: int) -> Iterator[Chunk]:
    if size > len(data):
        raise BadStructureError("the superblock of the btrfs gives impossible sizes")
    at = 0
    while at < size:
        if at + _KEY.size + _CHUNK.size > size:
            raise BadStructureError("the superblock of the btrfs holds a damaged list of chunks")
        _, kind, place = _KEY.unpack_from(data, at)
        at += _KEY.size
        end = at + _CHUNK.size + _STRIPE.size * _CHUNK.unpack_from(data, at)[7]
        if kind != _CHUNK_ITEM or end > size:
            raise BadStructureError("the superblock of the btrfs holds a damaged list of chunks")
        yield _parse_chunk(data[at:end], place)
        at = end


def _parse_chunk(data: bytes, place: int) -> Chunk:
    """Parse a chunk item; `place` is the chunk's logical address, which its key holds."""
    if len(data) < _CHUNK.size:
        raise BadStructureError("a chunk of the btrfs is damaged")
    size, _, stripe_size, kind, _, _, _, count, halves = _CHUNK.unpack_from(data)
    profile = kind & _PROFILES
    if profile in _COPIES:
        sound, columns = count == _COPIES[profile], 1
    elif profile == _RAID10:
        sound, columns = halves == 2 and count % 2 == 0, count // 2
    else:
        sound = profile in _PARITIES
        columns = count - _PARITIES.get(profile, 0)
    if not sound or columns <= 0 or stripe_size != _STRIPE_SIZE or not size or size % columns or place + size >> 64:
        raise BadStructureError("a chunk of the btrfs is damaged")
    if len(data) != _CHUNK.size + count * _STRIPE.size:
        raise BadStructureError("a chunk of the btrfs is damaged")
    stripes = (Stripe(devid, start) for devid, start, _ in _STRIPE.iter_unpack(data[_CHUNK.size :]))
    return Chunk(place, size, profile, size // columns, tuple(stripes), kind & sum(_CONTENTS))


def _read_chunk_tree(devices: Mapping[int, Device], superblock: BtrfsSuperblock) -> Iterator[tuple[int, int, bytes]]:
    """Yield the kind, the key's offset and the data of every item in the chunk tree."""
    waiting = [(superblock.chunk_root, superblock.chunk_root_generation, superblock.chunk_root_level)]
    seen: set[int] = set()
    while waiting:
        address, generation, level = waiting.pop()
        if address in seen or len(seen) >= _MAX_NODES:
            raise BadStructureError("the chunk tree of the btrfs has a loop or is larger than any can be")
        seen.add(address)
        node, count = _read_node(devices, superblock, address, generation, level)
        if level:
            for _, _, _, child, expected in _POINTER.iter_unpack(node[_NODE.size :][: count * _POINTER.size]):
                waiting.append((child, expected, level - 1))
            continue
        end = len(node)
        for _, kind, place, at, size in _ITEM.iter_unpack(node[_NODE.size :][: count * _ITEM.size]):
            start = _NODE.size + at  # the data stand behind one another from the end of the block on
            if start + size != end or start < _NODE.size + count * _ITEM.size:
                raise BadStructureError("the chunk tree of the btrfs is damaged")
            yield kind, place, node[start:end]
            end = start


def _read_node(
    devices: Mapping[int, Device], superblock: BtrfsSuperblock, address: int, generation: int, level: int
) -> tuple[bytes, int]:
    """Return a block of the chunk tree and the number of its items, from the first sound copy."""
    size = superblock.node_size
    entry = _POINTER.size if level else _ITEM.size
    identity = uuid.UUID(superblock.metadata_uuid).bytes
    compute = dict(_CHECKSUMS.values())[superblock.checksum]
    for node in _read_copies(devices, superblock.system_chunks, address, size):
        checksum, fsid, place, _, _, written, owner, count, depth = _NODE.unpack_from(node)
        expected = (identity, address, generation, _CHUNK_TREE, level)
        if (fsid, place, written, owner, depth) != expected or _NODE.size + count * entry > size:
            continue
        if checksum.startswith(compute(node[32:])):
            return node, count
    raise BadStructureError(
        f"no sound copy of a block of the chunk tree (at {address}) can be read from the devices of the btrfs at hand"
    )


def _read_copies(devices: Mapping[int, Device], chunks: Iterable[Chunk], address: int, size: int) -> Iterator[bytes]:
    """Yield every copy that can be read of `size` bytes from a logical address."""
    chunk = next((each for each in chunks if each.start <= address <= each.start + each.size - size), None)
    if chunk is None:
        return
    for copy in range(_count_copies(chunk)):
        pieces = []
        at, end = address - chunk.start, address - chunk.start + size
        while at < end:
            length = min(end - at, _STRIPE_SIZE - at % _STRIPE_SIZE)
            pieces.append(_read_piece(devices, chunk, at, length, copy))
            at += length
        whole = b"".join(piece for piece in pieces if piece is not None)
        if len(whole) == size:
            yield whole


def _count_copies(chunk: Chunk) -> int:
    """Return how many ways there are to read a byte of the chunk, rebuilding from parity being one."""
    return _COPIES.get(chunk.profile, 1 if chunk.profile == _RAID0 else 2)


def _read_piece(devices: Mapping[int, Device], chunk: Chunk, at: int, length: int, copy: int) -> bytes | None:
    """Read from byte `at` of a chunk what lies within one stripe; None if that copy cannot be read."""
    row, within = divmod(at, _STRIPE_SIZE)
    count = len(chunk.stripes)
    if chunk.profile in {_RAID5, _RAID6}:
        data = count - _PARITIES[chunk.profile]
        row, column = divmod(row, data)
        # Copy 1 is the sum of the row's other data and its first parity, which follows the data; each row is shifted.
        wanted = [column] if copy == 0 else [each for each in range(data + 1) if each != column]
        columns = [(row + each) % count for each in wanted]
    elif chunk.profile == _RAID10:
        row, pair = divmod(row, count // 2)
        columns = [2 * pair + copy]
    elif chunk.profile == _RAID0:
        row, column = divmod(row, count)
        columns = [column]
    else:
        columns = [copy]
    total = 0
    for column in columns:
        piece = _read_stripe(devices, chunk.stripes[column], row * _STRIPE_SIZE + within, length)
        if piece is None:
            return None
        total ^= int.from_bytes(piece, "little")
    return total.to_bytes(length, "little")


def _read_stripe(devices: Mapping[int, Device], stripe: Stripe, at: int, length: int) -> bytes | None:
    read, size = devices.get(stripe.devid, (None, 0))
    if read is None or stripe.start + at + length > size:
        return None
    try:
        return read(stripe.start + at, length)
    except RemetalError:  # a disk that cannot read it: another copy may do
        return None


def _make_crc_table() -> tuple[int, ...]:
    return tuple(
        reduce(lambda crc, _: crc >> 1 ^ (0x82F63B78 if crc & 1 else 0), range(8), byte) for byte in range(256)
    )


_CRC_TABLE = _make_crc_table()


def _crc32c(data: bytes) -> bytes:
    """Return CRC-32C (RFC 3720, B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


_PRIMES = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
)
_MASK = (1 << 64) - 1


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> 64 - bits) & _MASK


def _round(lane: int, value: int) -> int:
    return _rotate(lane + value * _PRIMES[1] & _MASK, 31) * _PRIMES[0] & _MASK


def _xxhash64(data: bytes) -> bytes:
    """Return xxHash64, seed 0, of data whose length is a multiple of 32 (Cyan4973/xxHash, doc/xxhash_spec.md)."""
    lanes = [(_PRIMES[0] + _PRIMES[1]) & _MASK, _PRIMES[1], 0, -_PRIMES[0] & _MASK]
    for values in struct.iter_unpack("<4Q", data):
        lanes = [_round(lane, value) for lane, value in zip(lanes, values, strict=True)]
    total = sum(_rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
    for lane in lanes:
        total = ((total ^ _round(0, lane)) * _PRIMES[0] + _PRIMES[3]) & _MASK
    total = (total + len(data)) & _MASK
    total = (total ^ total >> 33) * _PRIMES[1] & _MASK
    total = (total ^ total >> 29) * _PRIMES[2] & _MASK
    return (total ^ total >> 32).to_bytes(8, "little")


_CHECKSUMS: dict[int, tuple[str, Callable[[bytes], bytes]]] = {
    0: ("crc32c", _crc32c),
    1: ("xxhash64", _xxhash64),
    2: ("sha256", lambda data: hashlib.sha256(data).digest()),
    3: ("blake2", lambda data: hashlib.blake2b(data, digest_size=32).digest()),
}
"""By the superblock's number: the name, and the function."""
