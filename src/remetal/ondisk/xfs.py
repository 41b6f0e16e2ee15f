"""The primary superblock of XFS. Source: "XFS Algorithms & Data Structures", section Superblocks (big-endian)."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

from remetal.ondisk.regions import BadStructureError, Read

_SIZE = 512
_NAMES = {0x1: "ftype", 0x2: "sparse", 0x4: "meta_uuid", 0x8: "bigtime", 0x10: "needsrepair", 0x20: "nrext64"}
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
    )


def _names(bits: int, names: dict[int, str], kind: str) -> list[str]:
    return [names.get(1 << bit, f"FEATURE_{kind}{bit}") for bit in range(32) if bits >> bit & 1]
