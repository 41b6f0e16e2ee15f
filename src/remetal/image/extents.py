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
from remetal.system.run import run

_MAP_LINE = re.compile(r"(0x[0-9A-Fa-f]{1,16})\s+(0x[0-9A-Fa-f]{1,16})\s+([?*/+-])")
_EXT = frozenset({"ext2", "ext3", "ext4"})


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


def _xfs_is_clean(device: Path) -> bool:
    state = re.search(r"state: <(\w+)>", run(["xfs_logprint", "-t", device], allowed=(0, 1)).text)
    return state is not None and state[1] == "CLEAN"


@dataclass(frozen=True, slots=True)
class _Reader:
    """How to learn the used blocks of one family of file systems."""

    program: str
    is_clean: Callable[[Path], bool] | None = None


_READERS = {
    **dict.fromkeys(_EXT, _Reader("partclone.extfs", _ext_is_clean)),
    "xfs": _Reader("partclone.xfs", _xfs_is_clean),
    "vfat": _Reader("partclone.fat"),
}


def has_used_map(kind: str) -> bool:
    """Whether the used blocks of this type of file system (blkid's name) can be told from the free ones."""
    return kind in _READERS


def probe_used(span: Span, kind: str, *, report: Report = silent) -> list[Extent]:
    """Return the used extents of the file system on `span`, ascending and apart, in bytes from its start.

    `kind` is blkid's name; for types without a reader the one extent is the whole span. Needs root.
    Raises RemetalError if the file system's own structures cannot be read.
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
        with TemporaryDirectory(prefix="remetal-map-") as folder:
            mapfile = Path(folder) / "map"
            log = Path(folder) / "log"
            run([reader.program, "-D", "-s", device, "-o", mapfile, "--offset_domain=0", "-L", log])
            extents = parse_mapfile(mapfile.read_text(errors="replace"))
    return list(clip(extents, span.size))


def parse_mapfile(text: str) -> list[Extent]:
    """Parse a ddrescue map: return its finished (`+`) extents, ascending, touching ones joined.

    Raises RemetalError for anything that is not such a map: a map that cannot be trusted must not become a backup.
    """
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    extents: list[Extent] = []
    expected = 0
    for line in lines[1:]:
        match = _MAP_LINE.fullmatch(line.strip())
        if match is None or int(match[1], 16) < expected:
            raise RemetalError(f"partclone wrote a map of used blocks that makes no sense: '{line[:80]}'")
        start, size = int(match[1], 16), int(match[2], 16)
        expected = start + size
        if match[3] != "+" or size == 0:
            continue
        if extents and extents[-1].end == start:
            extents[-1] = Extent(extents[-1].start, extents[-1].size + size)
        else:
            extents.append(Extent(start, size))
    if not extents:
        raise RemetalError("partclone wrote a map without any used block")
    return extents


def clip(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """Yield the parts of the extents that lie below byte `size`."""
    for extent in extents:
        if extent.start < size:
            yield Extent(extent.start, min(extent.size, size - extent.start))


def total(extents: Iterable[Extent]) -> int:
    """Return the number of bytes in the extents."""
    return sum(extent.size for extent in extents)
