"""f2fs: flash storage, phones and small computers."""

from __future__ import annotations

from remetal.layout.layers.contract import Content
from remetal.layout.model import FileSystem
from remetal.ondisk.f2fs import parse_f2fs
from remetal.system.blockdev import Span, flush_cache, open_disk, probe_written
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import align_down

TYPES: tuple[str, ...] = ("f2fs",)
PROGRAMS: tuple[str, ...] = ("resize.f2fs",)

_NOT_GROWN = ("FEATURE_", "ro")
"""Features, by their beginnings, that resize.f2fs does not know, or cannot handle."""


def probe_volume(content: Content) -> FileSystem:
    """Describe the file system from its superblock and its checkpoint."""
    found = parse_f2fs(content.read, content.span.size)
    return FileSystem(
        on=content.space,
        type="f2fs",
        size=found.size,
        used=found.used,
        block_size=found.block_size,
        uuid=found.uuid,
        label=found.label,
        features=found.features,
        sector=found.sector_size if found.sector_size != 512 else 0,
    )


def plan_growth(volume: FileSystem, space: int) -> int:
    """Return the size it can grow to; resize.f2fs counts in sectors of 512 bytes, and so must the file system."""
    if volume.sector or any(feature.startswith(_NOT_GROWN) for feature in volume.features):
        return volume.size
    return max(volume.size, align_down(space, volume.block_size))


def apply_growth(span: Span, size: int) -> int:
    """Let the file system grow to `size` bytes; one that was not unmounted is mounted before, so that nothing is lost.

    resize.f2fs(8) moves what lies where the larger tables will be. Interrupted, it leaves a file system that has to be
    restored once more.
    """
    with open_disk(span.path) as disk:
        found = parse_f2fs(disk.reader(span.start), span.size)
    if found.size >= align_down(size, found.block_size):
        return 0
    with attach_loop(span, writable=True) as device:
        before = probe_written(device)
        if not found.clean:
            with mounted(device, kind="f2fs"):
                pass
            flush_cache(device)  # f2fs writes past it
        run(["resize.f2fs", "-t", str(size // 512), device])
        return probe_written(device) - before
