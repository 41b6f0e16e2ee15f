"""Bringing a btrfs onto a smaller device: nothing is made anew, it moves itself.

The target is added to the file system in the image as a further device, and the image removed from it. Subvolumes,
snapshots, shared and compressed extents, the default subvolume and the identity are kept, which no copy of files
could do. Source: btrfs-device(8).
"""

from __future__ import annotations

from remetal.layout.layers.remaking import Plan, Remake, fits
from remetal.layout.making import BtrfsMaking, Making
from remetal.layout.model import FileSystem
from remetal.units import GIB, MIB, align_down

_SMALL = 50 * GIB
"""Up to this size of all devices together, chunks of metadata have at most 256 MiB (fs/btrfs/volumes.c)."""


def plan_remake(volume: FileSystem, making: Making | None, space: int, sector: int) -> Plan:
    """Decide whether the file system can move itself onto a device of `space` bytes; its sectors do not matter.

    Every chunk is relocated whole, so there must be room for all that is used, for as many chunks of metadata as there
    are, twice, and for one more chunk of each kind. A restore that was interrupted starts anew.
    """
    if len(volume.parts) > 1:
        return "it spans several devices, which only fit onto devices as large as they were"
    if "zoned" in volume.features:
        return "it lies on a zoned device"
    metadata = making.metadata if isinstance(making, BtrfsMaking) else volume.used
    chunks = _data_chunk(volume.size + space) + _metadata_chunk(volume.size + space)
    return fits(
        Remake(
            method="moved",
            needed=volume.used + 2 * metadata + chunks + 128 * MIB,
            size=align_down(space, volume.block_size),
            block_size=volume.block_size,
            features=volume.features,
        ),
        space,
    )


def _data_chunk(total: int) -> int:
    return min(GIB, total // 10)


def _metadata_chunk(total: int) -> int:
    return min(256 * MIB if total <= _SMALL else GIB, total // 10)
