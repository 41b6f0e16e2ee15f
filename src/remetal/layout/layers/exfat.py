"""exFAT: memory cards, USB disks. It cannot grow: no tool lets it."""

from __future__ import annotations

from remetal.layout.layers.contract import Content
from remetal.layout.model import FileSystem
from remetal.ondisk.exfat import parse_exfat

TYPES: tuple[str, ...] = ("exfat",)


def probe_volume(content: Content) -> FileSystem:
    """Describe the file system from its boot sector, its root folder and its bitmap."""
    found = parse_exfat(content.read, content.span.size)
    return FileSystem(
        on=content.space,
        type="exfat",
        size=found.size,
        used=found.used,
        block_size=found.cluster_size,
        uuid=found.serial,
        label=found.label,
        features=found.features,
        sector=found.sector_size,
    )
