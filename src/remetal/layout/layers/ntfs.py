"""NTFS: Windows systems and disks."""

from __future__ import annotations

from remetal.layout.layers.contract import Content
from remetal.layout.model import FileSystem
from remetal.ondisk.ntfs import parse_ntfs
from remetal.system.blockdev import Span, open_disk, probe_written
from remetal.system.loop import attach_loop
from remetal.system.run import run
from remetal.units import align_down

TYPES: tuple[str, ...] = ("ntfs",)
PROGRAMS: tuple[str, ...] = ("ntfsresize",)


def probe_volume(content: Content) -> FileSystem:
    """Describe the file system from its boot sector, its file table and its bitmap."""
    found = parse_ntfs(content.read, content.span.size)
    return FileSystem(
        on=content.space,
        type="ntfs",
        size=found.size,
        used=found.used,
        block_size=found.cluster_size,
        uuid=found.serial,
        label=found.label,
        features=found.features,
        sector=found.sector_size,
    )


def plan_growth(volume: FileSystem, space: int) -> int:
    """Return the size it can grow to: whole clusters, and the backup boot sector behind them."""
    return max(volume.size, align_down(space - volume.sector, volume.block_size) + volume.sector)


def apply_growth(span: Span, size: int) -> int:
    """Let the file system grow to `size` bytes; Windows will check it (chkdsk) when it starts.

    ntfsresize(8) refuses a volume that is hibernated, or that Windows wants to check already.
    """
    with open_disk(span.path) as disk:
        found = parse_ntfs(disk.reader(span.start), span.size)
    if found.size >= size:
        return 0
    # It puts the backup boot sector at the end of the size that it is given, and Windows looks for it at the end of the
    # partition; so it is given all of the partition, unless it is to stay smaller.
    room = span.size if span.size - size < found.cluster_size else size
    with attach_loop(span, writable=True) as device:
        before = probe_written(device)
        run(["ntfsresize", "--force", "--no-progress-bar", "--size", str(room), device])
        return probe_written(device) - before
