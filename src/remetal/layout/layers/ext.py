"""ext2, ext3 and ext4."""

from __future__ import annotations

from remetal.layout.layers.contract import Content
from remetal.layout.making import describe_ext
from remetal.layout.model import FileSystem
from remetal.ondisk.ext import count_in_blocks, parse_ext
from remetal.system.blockdev import Span, open_disk, probe_written
from remetal.system.loop import attach_loop
from remetal.system.run import run
from remetal.units import align_down

TYPES: tuple[str, ...] = ("ext2", "ext3", "ext4")
PROGRAMS: tuple[str, ...] = ("e2fsck", "resize2fs")
_LARGE_SECTOR = 4096


def probe_volume(content: Content) -> FileSystem:
    """Describe the file system from its superblock, and how large its files are on a disk of large sectors."""
    found = parse_ext(content.read, content.span.size)
    small = found.block_size < _LARGE_SECTOR
    in_pages = count_in_blocks(content.read, content.span.size, _LARGE_SECTOR) if small else 0
    return FileSystem(
        on=content.space,
        type=content.type,
        size=found.size,
        used=found.used,
        block_size=found.block_size,
        uuid=found.uuid,
        label=found.label,
        features=found.features,
        making=describe_ext(found.settings, in_pages),
    )


def plan_growth(volume: FileSystem, space: int) -> int:
    """Return the size it can grow to; without the feature 64bit, block numbers have 32 bits.

    A last group that would hold little more than its own tables is left away, as resize2fs(8) may do.
    """
    blocks = space // volume.block_size
    if "64bit" not in volume.features:
        blocks = min(blocks, (1 << 32) - 1)
    first = 1 if volume.block_size == 1024 else 0
    group = 8 * volume.block_size
    rest = (blocks - first) % group
    if blocks - first > group and rest < group // 8:
        blocks -= rest
    return max(volume.size, blocks * volume.block_size)


def apply_growth(span: Span, size: int) -> int:
    """Check the file system, as resize2fs(8) demands, and let it grow to `size` bytes."""
    with open_disk(span.path) as disk:
        found = parse_ext(lambda offset, count: disk.read(span.start + offset, count), span.size)
    if found.size >= align_down(size, found.block_size):
        return 0
    with attach_loop(span, writable=True) as device:
        before = probe_written(device)
        run(["e2fsck", "-f", "-p", device], allowed=(0, 1))
        run(["resize2fs", device, f"{size // 512}s"])
        return probe_written(device) - before
