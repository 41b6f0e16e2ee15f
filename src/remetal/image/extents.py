"""Which bytes of a volume are in use.

The maps come from partclone's file system readers in ddrescue's format (GNU ddrescue manual, "Mapfile structure").
A file system that was not unmounted cleanly may hold allocations that only its journal knows: then the map
would lack blocks, so the whole volume counts as used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from remetal.errors import RemetalError
from remetal.events import Report, Warn, silent
from remetal.system.blockdev import Span
from remetal.system.loop import open_device
from remetal.system.run import ProgramFailedError, run

_MAP_LINE = re.compile(r"(0x[0-9A-Fa-f]{1,16})\s+(0x[0-9A-Fa-f]{1,16})\s+([?*/+-])")
_EXT = frozenset({"ext2", "ext3", "ext4"})


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


def _ext_is_clean(device: Path) -> bool:
    header = run(["dumpe2fs", "-h", device]).text
    state = re.search(r"^Filesystem state:\s+(.*)$", header, re.MULTILINE)
    return state is not None and state[1].strip() == "clean" and "needs_recovery" not in header


def _ext_least_used(device: Path) -> int:
    header = run(["dumpe2fs", "-h", device]).text
    count, free, block, first = (
        int(found[1]) if (found := re.search(rf"^{name}:\s+(\d+)$", header, re.MULTILINE)) else 0
        for name in ("Block count", "Free blocks", "Block size", "First block")
    )
    return (count - free - first) * block


def _xfs_least_used(device: Path) -> int:
    """Return the used bytes by the superblock, after a walk through the free space trees that checks their sums.

    The superblock counts the free lists and the trees' own blocks as free, partclone as used.
    """
    checked = run(["xfs_db", "-r", "-c", "freesp -s", "-c", "sb 0", "-c", "print blocksize dblocks fdblocks", device])
    if checked.stderr.strip():
        raise ProgramFailedError(["xfs_db"], 1, checked.stderr.decode(errors="replace"))
    number = {name: int(value) for name, value in re.findall(r"^(\w+) = (\d+)$", checked.text, re.MULTILINE)}
    return (number["dblocks"] - number["fdblocks"]) * number["blocksize"]


def _xfs_is_clean(device: Path) -> bool:
    state = re.search(r"state: <(\w+)>", run(["xfs_logprint", "-t", device], allowed=(0, 1)).text)
    return state is not None and state[1] == "CLEAN"


@dataclass(frozen=True, slots=True)
class _Reader:
    """How to learn the used blocks of one family of file systems."""

    program: str
    is_clean: Callable[[Path], bool] | None = None
    least_used: Callable[[Path], int] | None = None


_READERS = {
    **dict.fromkeys(_EXT, _Reader("partclone.extfs", _ext_is_clean, _ext_least_used)),
    "xfs": _Reader("partclone.xfs", _xfs_is_clean, _xfs_least_used),
    "vfat": _Reader("partclone.fat"),
}


def has_used_map(kind: str) -> bool:
    """Whether the used blocks of this type of file system (blkid's name) can be told from the free ones."""
    return kind in _READERS


def probe_used(span: Span, kind: str, *, report: Report = silent) -> list[Extent]:
    """Return the used extents of the file system on `span`, ascending and apart, in bytes from its start.

    `kind` is blkid's name; for types without a reader the one extent is the whole span. So it is for a file system
    whose own count of used blocks cannot be believed, which is reported. Needs root. Raises RemetalError if the
    disk cannot be read, or a program is missing.
    """
    whole = [Extent(0, span.size)]
    reader = _READERS.get(kind)
    if reader is None:
        return whole
    with open_device(span) as device:
        if reader.is_clean is not None and not reader.is_clean(device):
            report(
                Warn(
                    f"the {kind} on {span} was not unmounted cleanly: all of it is captured, free blocks too",
                    hint="Mount and unmount it once, or run its fsck, for a smaller and faster backup.",
                )
            )
            return whole
        try:
            return list(clip(_read_map(reader, device), span.size))
        except (ProgramFailedError, DoubtfulMapError):
            report(
                Warn(
                    f"the used blocks of the {kind} on {span} cannot be told: all of it is captured, free blocks too",
                    hint="Let its fsck look at it: if it is damaged, files may be lost already.",
                )
            )
            return whole


def _read_map(reader: _Reader, device: Path) -> list[Extent]:
    """Return the used extents of a clean file system. Raises ProgramFailedError, DoubtfulMapError if it is damaged."""
    with TemporaryDirectory(prefix="remetal-map-") as folder:
        mapfile = Path(folder) / "map"
        log = Path(folder) / "log"
        run([reader.program, "-D", "-s", device, "-o", mapfile, "--offset_domain=0", "-L", log])
        extents = parse_mapfile(mapfile.read_text(errors="replace"))
    if reader.least_used is not None and total(extents) < (least := reader.least_used(device)):
        raise DoubtfulMapError(
            f"its map of used blocks holds {total(extents)} bytes, its superblock counts at least {least}"
        )
    return extents


def parse_mapfile(text: str) -> list[Extent]:
    """Parse a ddrescue map: return its finished (`+`) extents, ascending, touching ones joined.

    Raises DoubtfulMapError for anything that is not such a map.
    """
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    extents: list[Extent] = []
    expected = 0
    for line in lines[1:]:
        match = _MAP_LINE.fullmatch(line.strip())
        if match is None or int(match[1], 16) < expected:
            raise DoubtfulMapError(f"partclone wrote a map of used blocks that makes no sense: '{line[:80]}'")
        start, size = int(match[1], 16), int(match[2], 16)
        expected = start + size
        if match[3] != "+" or size == 0:
            continue
        if extents and extents[-1].end == start:
            extents[-1] = Extent(extents[-1].start, extents[-1].size + size)
        else:
            extents.append(Extent(start, size))
    if not extents:
        raise DoubtfulMapError("partclone wrote a map without any used block")
    return extents


def clip(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """Yield the parts of the extents that lie below byte `size`."""
    for extent in extents:
        if extent.start < size:
            yield Extent(extent.start, min(extent.size, size - extent.start))


def total(extents: Iterable[Extent]) -> int:
    """Return the number of bytes in the extents."""
    return sum(extent.size for extent in extents)
