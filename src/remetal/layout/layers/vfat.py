"""FAT12, FAT16 and FAT32: the EFI system partition, and USB sticks."""

from __future__ import annotations

from remetal.layout.layers.contract import Content
from remetal.layout.making import describe_fat
from remetal.layout.model import FileSystem
from remetal.ondisk.fat import parse_fat

TYPES: tuple[str, ...] = ("vfat",)


def probe_volume(content: Content) -> FileSystem:
    """Describe the file system from its boot sector; the label is blkid's, which looks into the root folder."""
    found = parse_fat(content.read, content.span.size)
    return FileSystem(
        on=content.space,
        type="vfat",
        size=found.size,
        used=found.used,
        block_size=found.cluster_size,
        uuid=found.serial,
        label=content.label,
        features=(f"fat{found.bits}",),
        sector=found.sector_size,
        making=describe_fat(content.read, content.span.size),
    )
