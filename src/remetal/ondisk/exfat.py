"""Size and use of exFAT. Source: Microsoft, "exFAT file system specification", 2019 (little-endian)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from remetal.ondisk.bitmaps import Ranges, UncleanError, count_bits, covers, find_ranges, merge, to_bytes
from remetal.ondisk.regions import BadStructureError, Read
from remetal.units import KIB, MIB

_MARK = b"EXFAT   "
_PARAMETERS = struct.Struct("<QIIIIIIHHBBB")
_PARAMETERS_AT = 72
_BOOT_SECTORS = 11
_CHANGING = (106, 107, 112)  # flags and the percentage in use: left out of the checksum
_SECOND_IS_ACTIVE, _DIRTY = 0x1, 0x2

_ENTRY = 32
_FIRST, _LAST = 2, 0xFFFFFFF6
_END = 0xFFFFFFFF
_END_OF_FOLDER, _BITMAP, _UPCASE, _LABEL = 0x00, 0x81, 0x82, 0x83
_MAX_FOLDER = 256 * MIB
_WINDOW = 64 * KIB


@dataclass(frozen=True, slots=True)
class ExfatVolume:
    """Sizes in bytes; `serial` as blkid writes the UUID: `ABCD-0123`. `features`: `texfat` with two tables."""

    size: int
    used: int
    cluster_size: int
    sector_size: int
    serial: str
    label: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Boot:
    """The boot sector: places and sizes in bytes; `table` is the table in use, `root` a cluster."""

    read: Read
    size: int
    table: int
    heap: int
    clusters: int
    cluster: int
    sector: int
    root: int
    serial: str
    tables: int
    clean: bool


@dataclass(frozen=True, slots=True)
class _Root:
    """What the root folder tells of the volume; each bitmap and the up-case table as (first cluster, bytes)."""

    bitmaps: tuple[tuple[int, int], ...]
    upcase: tuple[tuple[int, int], ...]
    label: str


def parse_exfat(read: Read, size: int) -> ExfatVolume:
    """Describe the file system on a volume of `size` bytes. Raises BadStructureError if there is no sound one."""
    boot = _parse_boot(read, size)
    root = _parse_root(boot)
    free = boot.clusters - count_bits(_find_used(boot, root))
    return ExfatVolume(
        size=boot.size,
        used=boot.size - free * boot.cluster,
        cluster_size=boot.cluster,
        sector_size=boot.sector,
        serial=boot.serial,
        label=root.label,
        features=("texfat",) if boot.tables == 2 else (),
    )


def read_used(read: Read, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and size in bytes of what is used on a volume of `size` bytes: all but free clusters, ascending.

    What a transaction-safe exFAT has marked in either of its two bitmaps is used. Raises UncleanError if the volume was
    not unmounted, BadStructureError if there is no sound exFAT.
    """
    boot = _parse_boot(read, size)
    if not boot.clean:
        raise UncleanError("was not unmounted cleanly", hint="Let fsck.exfat or Windows repair it, then back up again.")
    used = to_bytes(_find_used(boot, _parse_root(boot)), boot.heap, boot.cluster)
    return merge(chain([(0, boot.heap)], used))


def _parse_boot(read: Read, size: int) -> _Boot:
    if size < 512:
        raise BadStructureError("the volume is too small for exFAT")
    data = read(0, 512)
    (length, fat_at, fat_length, heap_at, clusters, root, serial, _, flags, sector_bits, cluster_bits, tables) = (
        _PARAMETERS.unpack_from(data, _PARAMETERS_AT)
    )
    if data[3:11] != _MARK or data[510:512] != b"\x55\xaa" or any(data[11:64]):
        raise BadStructureError("the boot sector of the exFAT file system is damaged")
    if not 9 <= sector_bits <= 12 or sector_bits + cluster_bits > 25 or tables not in {1, 2}:
        raise BadStructureError("the boot sector of the exFAT file system has impossible sizes")
    sector, cluster = 1 << sector_bits, 1 << sector_bits + cluster_bits
    table, table_size, heap = fat_at * sector, fat_length * sector, heap_at * sector
    if (
        length * sector > size
        or not 24 * sector <= table < table + tables * table_size <= heap
        or not 0 < clusters <= _LAST - 1
        or heap + clusters * cluster > length * sector
        or table_size < 4 * (clusters + _FIRST)
    ):
        raise BadStructureError("the boot sector of the exFAT file system describes another size")
    _check_boot(read(0, (_BOOT_SECTORS + 1) * sector), sector)
    second = bool(flags & _SECOND_IS_ACTIVE) and tables == 2
    return _Boot(
        read=read,
        size=length * sector,
        table=table + second * table_size,
        heap=heap,
        clusters=clusters,
        cluster=cluster,
        sector=sector,
        root=root,
        serial=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}",
        tables=tables,
        clean=not flags & _DIRTY,
    )


def _check_boot(data: bytes, sector: int) -> None:
    """Raise BadStructureError unless the checksum over the boot region is that in its last sector."""
    found = 0
    for index, byte in enumerate(data[: _BOOT_SECTORS * sector]):
        if index not in _CHANGING:
            found = ((found >> 1 | found << 31) + byte) & 0xFFFFFFFF
    if data[_BOOT_SECTORS * sector :] != struct.pack("<I", found) * (sector // 4):
        raise BadStructureError("the boot region of the exFAT file system does not have its checksum")


def _parse_root(boot: _Boot) -> _Root:
    bitmaps: list[tuple[int, int]] = []
    upcase: list[tuple[int, int]] = []
    label = ""
    for cluster in _follow(boot, boot.root, min(_MAX_FOLDER // boot.cluster, boot.clusters)):
        folder = boot.read(_place(boot, cluster), boot.cluster)
        types = folder[::_ENTRY]
        end = types.find(_END_OF_FOLDER)
        for kind in (_BITMAP, _UPCASE, _LABEL):
            index = types.find(kind)
            while index >= 0 and (end < 0 or index < end):
                entry = folder[index * _ENTRY : (index + 1) * _ENTRY]
                if kind == _LABEL:
                    label = entry[2 : 2 + 2 * min(entry[1], 11)].decode("utf-16-le", "replace").split("\0")[0]
                else:
                    places = bitmaps if kind == _BITMAP else upcase
                    places.append(struct.unpack_from("<IQ", entry, 20))
                index = types.find(kind, index + 1)
        if end >= 0 or len(bitmaps) + len(upcase) > 3:
            break
    if len(bitmaps) != boot.tables or len(upcase) != 1:
        raise BadStructureError("the root folder of the exFAT file system does not tell where its bitmap is")
    return _Root(tuple(bitmaps), tuple(upcase), label)


def _find_used(boot: _Boot, root: _Root) -> Ranges:
    """Return the clusters in use, counted from 0. Raises BadStructureError if those that must be are not."""
    maps = [find_ranges(_read_chain(boot, *each), boot.clusters, "little") for each in root.bitmaps]
    used = maps[0] if len(maps) == 1 else _unite(maps)
    certain = [(boot.root, 1), *root.bitmaps, *root.upcase]
    for first, size in certain:
        for cluster in _follow(boot, first, -(-size // boot.cluster)):
            if not covers(used, cluster - _FIRST, 1):
                raise BadStructureError("the bitmap of the exFAT file system calls a cluster free that is in use")
    return used


def _unite(maps: list[Ranges]) -> Ranges:
    """Return what at least one of the maps has."""
    rows = np.concatenate(maps)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    joined = chain.from_iterable((first, first + count) for first, count in merge(to_bytes(rows, 0, 1)))
    return np.fromiter(joined, np.int64).reshape(-1, 2)


def _read_chain(boot: _Boot, first: int, size: int) -> Iterator[bytes]:
    """Yield the bitmap's bytes, of which there are `size`, as far as it needs to be read."""
    size = left = min(size, -(-boot.clusters // 8))
    for start, count in _stretches(boot, first, -(-size // boot.cluster)):
        for part in range(0, count * boot.cluster, MIB):
            piece = boot.read(_place(boot, start) + part, min(MIB, count * boot.cluster - part, left))
            left -= len(piece)
            yield piece


def _stretches(boot: _Boot, first: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield runs (first cluster, number) of a chain of at least `count` clusters."""
    chain = list(_follow(boot, first, count))
    if len(chain) < count:
        raise BadStructureError("the bitmap of the exFAT file system ends too early")
    begin = 0
    for index, (one, other) in enumerate(pairwise(chain), start=1):
        if other != one + 1:
            yield chain[begin], index - begin
            begin = index
    yield chain[begin], count - begin


def _follow(boot: _Boot, first: int, limit: int) -> Iterator[int]:
    """Yield the first `limit` clusters of a chain, or fewer if it ends before."""
    cluster, window, window_at = first, b"", -1
    for _ in range(limit):
        if not _FIRST <= cluster < boot.clusters + _FIRST:
            raise BadStructureError("the table of the exFAT file system leads to a cluster that is not there")
        yield cluster
        place = 4 * cluster
        if not window_at <= place < window_at + len(window):
            window_at = place - place % _WINDOW
            window = boot.read(boot.table + window_at, min(_WINDOW, 4 * (boot.clusters + _FIRST) - window_at))
        (cluster,) = struct.unpack_from("<I", window, place - window_at)
        if cluster == _END:
            return


def _place(boot: _Boot, cluster: int) -> int:
    return boot.heap + (cluster - _FIRST) * boot.cluster
