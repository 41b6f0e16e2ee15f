"""Which bytes of a volume are in use.

Each file system's own tools tell what is free, on the authority of the library that the file system is kept with; where
no tool does, a reader of our own. Everything else is used. A file system that was not unmounted cleanly may hold
allocations that only its journal knows: then the map would lack blocks, so the whole volume counts as used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from remetal.errors import RemetalError
from remetal.events import Report, Warn, silent
from remetal.ondisk import exfat, f2fs, fat, ntfs
from remetal.ondisk.bitmaps import UncleanError
from remetal.ondisk.btrfs import parse_btrfs, read_allocation, used_ranges
from remetal.ondisk.regions import BadStructureError, Read
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import open_device
from remetal.system.run import ProgramFailedError, run

_UNCLEAN = "was not unmounted cleanly"
_CLEAN_IT = "Mount and unmount it once, or run its fsck, for a smaller and faster backup."


class DoubtfulMapError(RemetalError):
    """A map of used blocks that cannot be right: it must not become a backup."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`size` bytes from byte `start` of a volume."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """The first byte behind the extent."""
        return self.start + self.size


def _read_ext(device: Path) -> list[Extent]:
    text = run(["dumpe2fs", device]).text
    state = re.search(r"^Filesystem state:\s+(.*)$", text, re.MULTILINE)
    if state is None or state[1].strip() != "clean" or "needs_recovery" in text:
        raise UncleanError(_UNCLEAN, hint=_CLEAN_IT)
    return parse_ext_map(text)


def _read_xfs(device: Path) -> list[Extent]:
    state = re.search(r"state: <(\w+)>", run(["xfs_logprint", "-t", device], allowed=(0, 1)).text)
    if state is None or state[1] != "CLEAN":
        raise UncleanError(_UNCLEAN, hint=_CLEAN_IT)
    fields = "print blocksize dblocks agblocks fdblocks"
    done = run(["xfs_db", "-r", "-c", "sb 0", "-c", fields, "-c", "freesp -d", device])
    if done.stderr.strip():
        raise DoubtfulMapError(f"xfs_db complains: {done.stderr.decode(errors='replace').strip()[:200]}")
    return parse_xfs_map(done.text)


def _reader(read_used: Callable[[Read, int], list[tuple[int, int]]]) -> Callable[[Path], list[Extent]]:
    """Return a reader that needs no program."""

    def read(device: Path) -> list[Extent]:
        with open_disk(device) as disk:
            return [Extent(start, size) for start, size in read_used(disk.read, disk.size())]

    return read


_READERS: dict[str, Callable[[Path], list[Extent]]] = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), _read_ext),
    "xfs": _read_xfs,
    "vfat": _reader(fat.read_used),
    "ntfs": _reader(ntfs.read_used),
    "exfat": _reader(exfat.read_used),
    "f2fs": _reader(f2fs.read_used),
}
"""How to learn the used blocks, by blkid's name for the file system. UncleanError for one that was not put to rest."""


def probe_used(span: Span, kind: str, *, report: Report = silent) -> list[Extent]:
    """Return the used extents of the file system on `span`, ascending and without overlaps, in bytes from its start.

    `kind` is blkid's name; for types without a reader the one extent is the whole span. So it is for a file system
    whose own count of used blocks cannot be believed, which is reported. Needs root. Raises RemetalError if the
    disk cannot be read, or a program is missing.
    """
    whole = [Extent(0, span.size)]
    reader = _READERS.get(kind)
    if reader is None:
        return whole
    with open_device(span) as device:
        try:
            return list(clip(reader(device), span.size))
        except UncleanError as error:
            report(
                Warn(f"the {kind} on {span} {error.message}: all of it is captured, free blocks too", hint=error.hint)
            )
        except (ProgramFailedError, DoubtfulMapError, BadStructureError):
            report(
                Warn(
                    f"the used blocks of the {kind} on {span} cannot be told: all of it is captured, free blocks too",
                    hint="Let its fsck look at it: if it is damaged, files may be lost already.",
                )
            )
    return whole


def probe_used_spanning(parts: Mapping[int, Span], *, report: Report = silent) -> dict[int, list[Extent]]:
    """Return the used extents of a btrfs on each of its devices, which are by their id in it; as `probe_used`."""
    with ExitStack() as stack:
        readers = {}
        for number, span in parts.items():
            disk = stack.enter_context(open_disk(span.path))
            readers[number] = (disk.reader(span.start), span.size)
        try:
            superblocks = {number: parse_btrfs(*reader) for number, reader in readers.items()}
            newest = max(superblocks.values(), key=lambda each: each.generation)
            allocated = read_allocation(readers, newest).extents
        except BadStructureError as error:
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


def parse_ext_map(text: str) -> list[Extent]:
    """Return the used extents from what dumpe2fs(8) prints of an ext2, ext3 or ext4.

    With bigalloc a free range ends with its last cluster's first block; the rest of that cluster counts as used.
    Raises DoubtfulMapError if the groups have more free blocks than the superblock.
    """
    number = _numbers(text, r"^(Block count|Free blocks|Block size):\s+(\d+)$")
    if number.keys() != {"Block count", "Free blocks", "Block size"}:
        raise DoubtfulMapError("dumpe2fs does not tell the file system's size")
    free = []
    for line in re.findall(r"^  Free blocks: (.*)$", text, re.MULTILINE):
        for piece in filter(None, line.split(", ")):
            first, _, last = piece.partition("-")
            free.append((int(first), int(last or first) + 1 - int(first)))
    return _used_between(free, number["Block count"], number["Block size"], number["Free blocks"])


def parse_xfs_map(text: str) -> list[Extent]:
    """Return the used extents from what xfs_db(8) prints for `print blocksize …` and `freesp -d`.

    Blocks on an allocation group's free list are free as well. Raises DoubtfulMapError if the trees of free space hold
    more blocks than the superblock counts.
    """
    number = _numbers(text, r"^(blocksize|dblocks|agblocks|fdblocks) = (\d+)$")
    if number.keys() != {"blocksize", "dblocks", "agblocks", "fdblocks"}:
        raise DoubtfulMapError("xfs_db does not tell the file system's size")
    rows = re.findall(r"^ +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE)
    free = sorted((int(group) * number["agblocks"] + int(block), int(count)) for group, block, count in rows)
    return _used_between(free, number["dblocks"], number["blocksize"], number["fdblocks"])


def _numbers(text: str, pattern: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(pattern, text, re.MULTILINE)}


def _used_between(free: Iterable[tuple[int, int]], blocks: int, size: int, counted: int) -> list[Extent]:
    """Return what lies between the free ranges (first block, number) of a file system of `blocks` blocks.

    `size` is a block's in bytes, `counted` the number of free blocks that the superblock knows of.
    """
    extents: list[Extent] = []
    position = total_free = 0
    for first, count in free:
        if first < position or count <= 0 or first + count > blocks:
            raise DoubtfulMapError(
                f"free blocks {first} to {first + count - 1} overlap others or leave the file system"
            )
        if first > position:
            extents.append(Extent(position * size, (first - position) * size))
        position = first + count
        total_free += count
    if position < blocks:
        extents.append(Extent(position * size, (blocks - position) * size))
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
