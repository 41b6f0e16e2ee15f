"""Making FAT and exFAT anew. Sources: mkfs.vfat(8), mkfs.exfat(8), tune.exfat(8), the two specifications."""

from __future__ import annotations

from remetal.layout.layers.remaking import UNKNOWN, Plan, Remake, find_obstacle, fits, larger_blocks, least_size
from remetal.layout.making import FatMaking, Making
from remetal.layout.model import FileSystem
from remetal.units import MIB

_BITS = {"fat12": 12, "fat16": 16, "fat32": 32}
_LEAST_CLUSTERS = {12: 1, 16: 4085, 32: 65525}
_LABEL = 11
_RESERVED = 64  # sectors, with what is lost to alignment
_SHORT_NAMES = "the short names (FILE~1.TXT) of its files may be numbered anew"


def plan_vfat(volume: FileSystem, making: Making | None, space: int, sector: int) -> Plan:
    """Decide how to make a FAT anew on `space` bytes of a device with sectors of `sector` bytes.

    Its clusters become as large as a sector at least; then a file may need one cluster more than before.
    """
    if not isinstance(making, FatMaking):
        return UNKNOWN
    if find_obstacle(volume, _LABEL):
        return find_obstacle(volume, _LABEL)
    cluster = max(volume.block_size, sector)
    data = volume.used
    if cluster > volume.block_size:
        data = min(data + making.chains * cluster, data // volume.block_size * cluster)
    bits = next((bits for name, bits in _BITS.items() if name in volume.features), 32)
    needed = least_size(data, lambda size: _overhead(size, bits, cluster, sector, making), sector)
    clusters = (space - _overhead(space, bits, cluster, sector, making)) // cluster
    losses = [_SHORT_NAMES, *([larger_blocks(cluster, volume.block_size)] if cluster > volume.block_size else [])]
    if bits == 32 and clusters < _LEAST_CLUSTERS[32]:
        losses.append("a FAT32 of so few clusters is read by Linux, GRUB and UEFI, but not by Windows")
    if bits == 16 and clusters < _LEAST_CLUSTERS[16]:
        bits = 12
    return fits(
        Remake(
            needed=needed,
            size=max(space - space // 64 - MIB, cluster),
            block_size=cluster,
            features=(f"fat{bits}",),
            commands=(_command(volume, making, bits, cluster, sector),),
            checks=(("fsck.vfat", "-a"),),
            losses=tuple(losses),
        ),
        space,
    )


def _overhead(size: int, bits: int, cluster: int, sector: int, making: FatMaking) -> int:
    table = size // cluster * bits // 8 + 2 * sector
    return _RESERVED * sector + 2 * table + making.root_entries * 32 + 2 * cluster


def _command(volume: FileSystem, making: FatMaking, bits: int, cluster: int, sector: int) -> tuple[str, ...]:
    words = ["mkfs.vfat", "-F", str(bits), "-S", str(sector), "-s", str(cluster // sector)]
    if bits != 32 and making.root_entries:
        words += ["-r", str(making.root_entries)]
    if volume.uuid:
        words += ["-i", volume.uuid.replace("-", "")]
    return (*words, "-n", volume.label) if volume.label else tuple(words)


def plan_exfat(volume: FileSystem, making: Making | None, space: int, sector: int) -> Plan:
    """Decide how to make an exFAT anew on `space` bytes of a device with sectors of `sector` bytes.

    Its clusters become as large as a sector at least; then every cluster may need one of the new size.
    """
    if "texfat" in volume.features:
        return "it is of a kind (TexFAT) that Linux does not make"
    if find_obstacle(volume, 3 * _LABEL):
        return find_obstacle(volume, 3 * _LABEL)
    cluster = max(volume.block_size, sector)
    data = volume.used // volume.block_size * cluster
    needed = data + data // cluster * 8 + 4 * MIB
    label = ("-L", volume.label) if volume.label else ()
    make = ("mkfs.exfat", "-c", str(cluster), *label)
    serial = ("tune.exfat", "-I", f"0x{volume.uuid.replace('-', '')}")
    return fits(
        Remake(
            needed=needed,
            size=max(space - space // 64 - 4 * MIB, cluster),
            block_size=cluster,
            commands=(make, serial) if volume.uuid else (make,),
            checks=(("fsck.exfat", "-y"),),
            losses=(larger_blocks(cluster, volume.block_size),) if cluster > volume.block_size else (),
        ),
        space,
    )
