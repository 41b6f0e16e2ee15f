"""Which bytes of a volume are in use.

Each file system's own tools tell what is free, on the authority of the library that the file system is kept with; where
no tool does, a reader of our own. Everything else is used. A file system that was not unmounted cleanly may hold
allocations that only its journal knows: then the map would lack blocks, so the whole volume counts as used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, groupby, takewhile
from pathlib import Path
from typing import TypeAlias

import numpy as np

from remetal.errors import RemetalError, UnavailableError
from remetal.events import Report, Warn, silent
from remetal.image.ranges import Extent, Extents
from remetal.ondisk import exfat, f2fs, fat, ntfs
from remetal.ondisk.bitmaps import UncleanError
from remetal.ondisk.btrfs import parse_btrfs, read_allocation, used_ranges
from remetal.ondisk.regions import BadStructureError, Read
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import open_device
from remetal.system.run import ProgramFailedError, run, run_lines

_EXT_FREE = "  Free blocks: "
_NUMBER = "([0-9]{1,18})"
_EXT_RANGE = re.compile(rf"{_NUMBER}(?:-{_NUMBER})?")
_XFS_RANGE = re.compile(rf" +{_NUMBER} +{_NUMBER} +{_NUMBER}")
_UNCLEAN = "was not unmounted cleanly"
_CLEAN_IT = "Mount and unmount it once, or run its fsck, for a smaller and faster backup."


class DoubtfulMapError(RemetalError):
    """A map of used blocks that cannot be right: it must not become a backup."""


Reader: TypeAlias = Callable[[Path, bool], Extents]
"""Reads a device's map; if it is frozen, everything is on the disk, though it was not unmounted."""


def _read_ext(device: Path, frozen: bool) -> Extents:
    lines = run_lines(["dumpe2fs", device])
    head = list(takewhile(lambda line: not line.startswith("Group "), lines))
    text = "\n".join(head)
    clean = re.search(r"^Filesystem state:\s+(.*)$", text, re.MULTILINE)
    if not frozen and (clean is None or clean[1].strip() != "clean" or "needs_recovery" in text):
        raise UncleanError(_UNCLEAN, hint=_CLEAN_IT)
    return parse_ext_map(chain(head, lines))


def _read_xfs(device: Path, frozen: bool) -> Extents:
    if not frozen:
        log = re.search(r"state: <(\w+)>", run(["xfs_logprint", "-t", device], allowed=(0, 1)).text)
        if log is None or log[1] != "CLEAN":
            raise UncleanError(_UNCLEAN, hint=_CLEAN_IT)
    fields = "print blocksize dblocks agblocks fdblocks"
    return parse_xfs_map(
        run_lines(["xfs_db", "-r", "-c", "sb 0", "-c", fields, "-c", "freesp -d", device], silent=True),
        counted=not frozen,  # until it is unmounted, only its log knows how many blocks are free
    )


def _reader(read_used: Callable[[Read, int], Iterator[tuple[int, int]]]) -> Reader:
    """Return a reader that needs no program."""

    def read(device: Path, frozen: bool) -> Extents:
        with open_disk(device) as disk:
            return Extents(Extent(start, size) for start, size in read_used(disk.read, disk.size()))

    return read


_READERS: dict[str, Reader] = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), _read_ext),
    "xfs": _read_xfs,
    "vfat": _reader(fat.read_used),
    "ntfs": _reader(ntfs.read_used),
    "exfat": _reader(exfat.read_used),
    "f2fs": _reader(f2fs.read_used),
}
"""How to learn the used blocks, by blkid's name for the file system. UncleanError for one that was not put to rest."""


def probe_used(span: Span, kind: str, *, frozen: bool = False, report: Report = silent) -> Extents:
    """Return the used extents of the file system on `span`, ascending and without overlaps, in bytes from its start.

    `kind` is blkid's name; for types without a reader the one extent is the whole span. So it is for a file system
    whose own count of used blocks cannot be believed, which is reported. If it is `frozen`, it would have to wait for
    all of it to be read: there, this raises RemetalError instead. Needs root. Raises RemetalError if the disk cannot be
    read, or a program is missing.
    """
    whole = Extents([Extent(0, span.size)])
    reader = _READERS.get(kind)
    if reader is None:
        return whole
    with open_device(span) as device:
        try:
            return Extents(clip(reader(device, frozen), span.size))
        except (UncleanError, ProgramFailedError, DoubtfulMapError, BadStructureError) as error:
            if frozen:
                raise
            report(_all_of_it(f"the {kind} on {span}", error))
    return whole


def _all_of_it(what: str, error: RemetalError) -> Warn:
    if isinstance(error, UncleanError):
        return Warn(f"{what} {error.message}: all of it is captured, free blocks too", hint=error.hint)
    return Warn(
        f"the used blocks of {what} cannot be told: all of it is captured, free blocks too",
        hint="Let its fsck look at it: if it is damaged, files may be lost already.",
    )


def probe_used_spanning(
    parts: Mapping[int, Span], *, frozen: bool = False, report: Report = silent
) -> dict[int, list[Extent]]:
    """Return the used extents of a btrfs on each of its devices, which are by their id in it; as `probe_used`."""
    with ExitStack() as stack:
        readers = {}
        for number, span in parts.items():
            disk = stack.enter_context(open_disk(span.path))
            readers[number] = (disk.reader(span.start), span.size)
        try:
            superblocks = {number: parse_btrfs(*reader) for number, reader in readers.items()}
            newest = max(superblocks.values(), key=lambda each: each.generation)
            if frozen and newest.devices != len(parts):
                first = next(iter(parts.values()))
                raise UnavailableError(
                    f"the btrfs on {first} has {newest.devices} devices now instead of {len(parts)}",
                    hint="Nothing is kept of this backup; run it again when no device is added to it or removed.",
                )
            allocated = read_allocation(readers, newest).extents
        except BadStructureError as error:
            if frozen:
                raise
            report(
                Warn(
                    f"the used blocks of the btrfs on {next(iter(parts.values()))} cannot be told, so all of it is "
                    f"captured: {error.message}",
                    hint="Let `btrfs check` look at it: if it is damaged, files may be lost already.",
                )
            )
            return {number: [Extent(0, span.size)] for number, span in parts.items()}
    return {
        number: [Extent(start, size) for start, size in used_ranges(allocated[number], superblocks[number].device_size)]
        for number in parts
    }


def parse_ext_map(lines: Iterable[str]) -> Extents:
    """Return the used extents from the lines that dumpe2fs(8) prints of an ext2, ext3 or ext4.

    With bigalloc a free range ends with its last cluster's first block; the rest of that cluster counts as used.
    Raises DoubtfulMapError if the groups have more free blocks than the superblock.
    """
    lines = iter(lines)
    number = _numbers(lines, re.compile(rf"(Block count|Free blocks|Block size):\s+{_NUMBER}"), 3)
    return _used_between(_parse_ext_free(lines), number["Block count"], number["Block size"], number["Free blocks"])


def _parse_ext_free(lines: Iterable[str]) -> Iterator[tuple[int, int]]:
    for line in lines:
        if line.startswith(_EXT_FREE):
            for piece in filter(None, line.removeprefix(_EXT_FREE).strip().split(", ")):
                found = _EXT_RANGE.fullmatch(piece)
                if found is None:
                    raise DoubtfulMapError(f"its program lists the free blocks {piece[:40]!a}")
                yield int(found[1]), int(found[2] or found[1]) + 1 - int(found[1])


def parse_xfs_map(lines: Iterable[str], *, counted: bool = True) -> Extents:
    """Return the used extents from the lines that xfs_db(8) prints for `print blocksize …` and `freesp -d`.

    Blocks on an allocation group's free list are free as well. Raises DoubtfulMapError if the trees of free space hold
    more blocks than the superblock counts, which is to be believed if `counted`.
    """
    lines = iter(lines)
    number = _numbers(lines, re.compile(rf"(blocksize|dblocks|agblocks|fdblocks) = {_NUMBER}"), 4)
    free = _parse_xfs_free(lines, number["agblocks"])
    most = number["fdblocks" if counted else "dblocks"]
    return _used_between(free, number["dblocks"], number["blocksize"], most)


def _parse_xfs_free(lines: Iterable[str], group_size: int) -> Iterator[tuple[int, int]]:
    """Yield the free ranges of one allocation group after the other; within a group they come in any order."""
    rows = (match for match in map(_XFS_RANGE.fullmatch, lines) if match)
    for group, ranges in groupby(rows, key=lambda row: int(row[1])):
        free = np.fromiter((number for row in ranges for number in (int(row[2]), int(row[3]))), np.int64).reshape(-1, 2)
        for block, count in free[np.argsort(free[:, 0], kind="stable")].tolist():
            yield group * group_size + block, count


def _numbers(lines: Iterable[str], pattern: re.Pattern[str], count: int) -> dict[str, int]:
    """Return the numbers that stand before everything else, and take no more lines than that needs."""
    found: dict[str, int] = {}
    for line in lines:
        if match := pattern.fullmatch(line.rstrip()):
            found[match[1]] = int(match[2])
            if len(found) == count:
                return found
    raise DoubtfulMapError("its program does not tell the file system's size")


def _used_between(free: Iterable[tuple[int, int]], blocks: int, size: int, counted: int) -> Extents:
    """Return what lies between the free ranges (first block, number) of a file system of `blocks` blocks.

    `size` is a block's in bytes, `counted` the number of free blocks that the superblock knows of.
    """
    if not 0 < blocks * size < 1 << 63:
        raise DoubtfulMapError(f"its program tells of {blocks} blocks of {size} bytes")
    extents = Extents()
    position = total_free = 0
    for first, count in free:
        if first < position or count <= 0 or first + count > blocks:
            raise DoubtfulMapError(
                f"free blocks {first} to {first + count - 1} overlap others or leave the file system"
            )
        if first > position:
            extents.append(position * size, (first - position) * size)
        position = first + count
        total_free += count
    if position < blocks:
        extents.append(position * size, (blocks - position) * size)
    if total_free > counted or not extents:
        raise DoubtfulMapError(f"{total_free} blocks are marked free, the superblock counts {counted}")
    return extents


def clip(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """Yield the parts of the extents that lie below byte `size`."""
    for extent in extents:
        if extent.start < size:
            yield Extent(extent.start, min(extent.size, size - extent.start))


def total(extents: Iterable[Extent]) -> int:
    """Return the number of bytes in the extents."""
    return sum(extent.size for extent in extents)
