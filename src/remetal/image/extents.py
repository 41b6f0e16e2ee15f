"""Which bytes of a volume are in use.

Each file system's own tools tell what is free, on the authority of the library that the file system is kept with;
everything else is used. A file system that was not unmounted cleanly may hold allocations that only its journal
knows: then the map would lack blocks, so the whole volume counts as used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from remetal.errors import RemetalError
from remetal.events import Report, Warn, silent
from remetal.ondisk.fat import read_used
from remetal.ondisk.regions import BadStructureError
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import open_device
from remetal.system.run import ProgramFailedError, run


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


def _read_ext(device: Path) -> list[Extent] | None:
    text = run(["dumpe2fs", device]).text
    state = re.search(r"^Filesystem state:\s+(.*)$", text, re.MULTILINE)
    clean = state is not None and state[1].strip() == "clean" and "needs_recovery" not in text
    return parse_ext_map(text) if clean else None


def _read_xfs(device: Path) -> list[Extent] | None:
    state = re.search(r"state: <(\w+)>", run(["xfs_logprint", "-t", device], allowed=(0, 1)).text)
    if state is None or state[1] != "CLEAN":
        return None
    fields = "print blocksize dblocks agblocks fdblocks"
    done = run(["xfs_db", "-r", "-c", "sb 0", "-c", fields, "-c", "freesp -d", device])
    if done.stderr.strip():
        raise DoubtfulMapError(f"xfs_db complains: {done.stderr.decode(errors='replace').strip()[:200]}")
    return parse_xfs_map(done.text)


def _read_fat(device: Path) -> list[Extent]:
    with open_disk(device) as disk:
        try:
            return [Extent(start, size) for start, size in read_used(disk.read, disk.size())]
        except BadStructureError as error:
            raise DoubtfulMapError(error.message) from error


_READERS: dict[str, Callable[[Path], list[Extent] | None]] = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), _read_ext),
    "xfs": _read_xfs,
    "vfat": _read_fat,
}
"""How to learn the used blocks, by blkid's name for the file system; None for one that is not clean."""


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
            extents = reader(device)
        except (ProgramFailedError, DoubtfulMapError):
            report(
                Warn(
                    f"the used blocks of the {kind} on {span} cannot be told: all of it is captured, free blocks too",
                    hint="Let its fsck look at it: if it is damaged, files may be lost already.",
                )
            )
            return whole
    if extents is None:
        report(
            Warn(
                f"the {kind} on {span} was not unmounted cleanly: all of it is captured, free blocks too",
                hint="Mount and unmount it once, or run its fsck, for a smaller and faster backup.",
            )
        )
        return whole
    return list(clip(extents, span.size))


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
