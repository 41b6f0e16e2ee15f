"""Making f2fs anew. Source: mkfs.f2fs(8)."""

from __future__ import annotations

from math import isqrt

from remetal.layout.layers.remaking import NEW_INODES, Plan, Remake, find_obstacle, fits, least_size
from remetal.layout.making import Making
from remetal.layout.model import FileSystem
from remetal.units import MIB, align_down

_REFUSED = {
    "encrypt": "its encrypted folders can only be copied with their keys",
    "verity": "files under verity cannot be copied as such",
    "casefold": "folders that ignore case cannot be copied as such",
    "compression": "its files are compressed, so that nobody knows how much they take up when copied",
    "blkzoned": "it lies on a zoned device",
}
_BLOCK, _LABEL = 4096, 512


def plan_remake(volume: FileSystem, making: Making | None, space: int, sector: int) -> Plan:
    """Decide how to make the file system anew on `space` bytes.

    What mkfs.f2fs keeps for itself (tables, and room to clean up in) grows with the root of the size: it was measured
    from 64 MiB to 256 GiB, and the bound lies a tenth above that.
    """
    refusal = next((_REFUSED[name] for name in volume.features if name in _REFUSED), "") or find_obstacle(
        volume, _LABEL
    )
    if refusal:
        return refusal
    data = volume.used + volume.used // 64
    words = ["mkfs.f2fs", "-f", "-q", "-t", "0", "-w", str(max(sector, 512))]
    if volume.features:
        words += ["-O", ",".join(volume.features)]
    if volume.uuid:
        words += ["-U", volume.uuid]
    if volume.label:
        words += ["-l", volume.label]
    return fits(
        Remake(
            needed=least_size(data, _overhead, _BLOCK),
            size=max(align_down(space, _BLOCK) * 63 // 64 - 4 * MIB, _BLOCK),
            block_size=_BLOCK,
            features=volume.features,
            commands=(tuple(words),),
            checks=(("fsck.f2fs", "-a"),),
            losses=(NEW_INODES,),
        ),
        space,
    )


def _overhead(size: int) -> int:
    return 32 * MIB + 6 * MIB * isqrt(size // MIB + 1)
