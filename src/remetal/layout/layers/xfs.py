"""XFS."""

from __future__ import annotations

from remetal.layout.layers.contract import Content
from remetal.layout.making import describe_xfs
from remetal.layout.model import FileSystem
from remetal.ondisk.xfs import parse_xfs, read_shared
from remetal.system.blockdev import Span, open_disk, probe_written
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import align_down

TYPES: tuple[str, ...] = ("xfs",)
PROGRAMS: tuple[str, ...] = ("xfs_growfs",)

_SMALLEST_GROUP = 64
"""Blocks; the kernel adds no smaller allocation group (fs/xfs/libxfs/xfs_ag.h)."""


def probe_volume(content: Content) -> FileSystem:
    """Describe the file system from its superblock."""
    found = parse_xfs(content.read, content.span.size)
    return FileSystem(
        on=content.space,
        type="xfs",
        size=found.size,
        used=found.used,
        block_size=found.block_size,
        uuid=found.uuid,
        label=found.label,
        features=found.features,
        sector=found.settings.sector_size,
        making=describe_xfs(found.settings, read_shared(content.read, content.span.size)),
    )


def plan_growth(volume: FileSystem, space: int) -> int:
    """Return the size it can grow to."""
    size = align_down(space, volume.block_size)
    return size if size - volume.size > _SMALLEST_GROUP * volume.block_size else volume.size


def apply_growth(span: Span, size: int) -> int:
    """Mount the file system, which replays its log, and let it grow to `size` bytes: XFS grows only mounted."""
    with open_disk(span.path) as disk:
        found = parse_xfs(lambda offset, count: disk.read(span.start + offset, count), span.size)
    if size - found.size <= _SMALLEST_GROUP * found.block_size:
        return 0
    with attach_loop(span, writable=True) as device:
        before = probe_written(device)
        with mounted(device, kind="xfs", options=("nouuid",)) as folder:
            run(["xfs_growfs", "-D", str(size // found.block_size), folder])
        return probe_written(device) - before
