"""Booting by BIOS: GRUB's boot sector must lead to a whole core image, and the core to GRUB's folder.

A restore writes both back as they were, at the same places, so as a rule the chain only has to be checked. Where a
partition has moved, the sector numbers are moved along. Where the chain is broken, it is laid anew from the images
that the installed system keeps in its own `/boot/grub/i386-pc`, as `grub-bios-setup --no-rs-codes` would, so no
program of the restored system has to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from remetal.adapt import grub_images as images
from remetal.adapt.change import Adaptation, Change
from remetal.adapt.firmware import find_boot_device
from remetal.adapt.grub_cfg import find_device_uuids
from remetal.adapt.grub_images import SECTOR, Core, CoreImageError, Run
from remetal.adapt.identity import is_same_uuid
from remetal.adapt.remedy import plan_grub_install
from remetal.adapt.restored import Restored
from remetal.adapt.rooted import read_inside
from remetal.adapt.roots import System, open_root
from remetal.errors import RemetalError
from remetal.events import Report, Step, Warn
from remetal.layout.model import (
    BIOS_BOOT,
    Device,
    FileSystem,
    GptTable,
    Layout,
    Luks,
    MbrTable,
    MdArray,
    Raw,
    SpaceId,
    Swap,
    VolumeGroup,
    boot_area,
)
from remetal.system.blockdev import DiskIO, flush_cache, is_block_device, open_disk

_BOOT_CODE = 440
_FOLDERS = ("/boot/grub/i386-pc", "/boot/grub2/i386-pc")


@dataclass(frozen=True, slots=True)
class Chain:
    """GRUB's way on one disk: the boot sector's place, the core's first sector, the runs of the rest, the core.

    Sectors of 512 bytes from the disk's start.
    """

    at: int
    core_sector: int
    runs: tuple[Run, ...]
    core: Core


def adapt_grub_bios(
    restored: Restored, systems: Sequence[System], *, firmware: str | None, report: Report
) -> Adaptation:
    """Check GRUB's chain on every restored disk that has a GRUB boot sector, and repair it where it is broken.

    Where `firmware` is `bios` and no disk has any boot code, GRUB is laid from what an installed system keeps. Raises
    RemetalError if a disk cannot be read or written; what cannot be repaired is a note.
    """
    done = Adaptation()
    result = restored.result
    names = dict.fromkeys(
        find_boot_device(result, disk.name)
        for disk in result.disks
        if disk.logical_sector == SECTOR and disk.name not in restored.kept
    )
    devices = [result.devices[name] for name in names if name in restored.devices]
    places = {device.name: _probe_boot_places(device, result, restored.devices[device.name]) for device in devices}
    for device in devices:
        for at in places[device.name]:
            report(Step(f"Checking GRUB for BIOS on {device.name}"))
            done += _adapt_chain(restored, device, systems, at, report)
    if firmware == "bios" and not any(places.values()):
        for system in systems:
            done += _adapt_blank(restored, system, devices, report)
    return done


def probe_chain(disk: DiskIO, at: int, layout: Layout, name: str) -> Chain:
    """Follow GRUB's chain from the boot sector at sector `at` of the disk that the layout calls `name`.

    Raises CoreImageError with the reason if it is broken: no core image where the boot sector points, sectors that
    belong to nothing, a core that does not decompress or that searches for what was not restored.
    """
    core_sector = images.find_core_sector(disk.read(at * SECTOR, SECTOR))
    if core_sector is None:
        raise CoreImageError("there is no GRUB boot sector")
    owned = _owned_sectors(layout, name)
    _need_owned([Run(core_sector, 1, 0)], owned)
    first = disk.read(core_sector * SECTOR, SECTOR)
    runs = images.parse_runs(first)
    _need_owned(runs, owned)
    rest = [disk.read(run.start * SECTOR, run.count * SECTOR) for run in runs]
    core = images.parse_core(b"".join([first, *rest]))
    check_core(core, layout, name)
    return Chain(at, core_sector, runs, core)


def check_core(core: Core, layout: Layout, name: str) -> None:
    """Check that what the core looks for is on the restored disks. Raises CoreImageError if it cannot be.

    A UUID may lie inside a volume that was carried whole (LVM, RAID, btrfs): then it is believed.
    """
    known = {each.uuid.lower() for each in layout.volumes() if isinstance(each, (FileSystem, Swap))}
    opaque = any(isinstance(each, Raw) and each.type for each in layout.volumes())
    missing = [uuid for uuid in core.uuids if uuid not in known]
    if missing and not opaque:
        raise CoreImageError(f"it searches for the file system {missing[0]}, which was not restored")
    lost = not core.uuids and not opaque and _missing_containers(core.prefix, layout)
    if lost:
        raise CoreImageError(f"it looks for its files on {core.prefix}, which is not among what was restored")
    if core.prefix.startswith("(,") and core.partition is not None:
        try:
            layout.place(f"{name}:{core.partition}")
        except KeyError as error:
            raise CoreImageError(f"it looks for its files on partition {core.partition}, which is not there") from error


def _missing_containers(prefix: str, layout: Layout) -> list[str]:
    """Return the UUIDs of arrays, groups, volumes and containers in a core's prefix that the layout does not have."""
    known: list[str] = []
    for layer in layout.layers:
        if isinstance(layer, (MdArray, Luks, VolumeGroup)):
            known.append(layer.uuid)
        if isinstance(layer, VolumeGroup):
            known += [volume.uuid for volume in layer.volumes]
    named = [uuid for uuid, _ in find_device_uuids(prefix)]
    return [uuid for uuid in named if not any(is_same_uuid(uuid, each) for each in known)]


def plan_move(chain: Sequence[int], source: Layout, result: Layout, name: str) -> list[int]:
    """Return where sectors of a captured disk stand now, since the partitions that hold them may have moved.

    Raises CoreImageError for a sector that no partition or boot area of the source holds.
    """
    spaces = {label: (start, size) for label, start, size in _owned_sectors(source, name)}
    now = {label: start for label, start, _ in _owned_sectors(result, name)}
    moved = []
    for sector in chain:
        label = next((each for each, (start, size) in spaces.items() if start <= sector < start + size), None)
        if label is None or label not in now:
            raise CoreImageError(f"sector {sector} belongs to no restored partition")
        moved.append(sector - spaces[label][0] + now[label])
    return moved


def _adapt_chain(restored: Restored, device: Device, systems: Sequence[System], at: int, report: Report) -> Adaptation:
    where = f"sector {at} of {device.name}"
    path, result = restored.devices[device.name], restored.result
    with open_disk(path) as disk:
        try:
            probe_chain(disk, at, result, device.name)
        except CoreImageError as error:
            reason = str(error)
        else:
            return Adaptation()
        moved = _plan_moved(disk, at, restored, device.name)
    if moved is not None:
        written = _write_pieces(path, moved)
        _prove(path, at, result, device.name)
        return Adaptation((Change(where, "GRUB's sector numbers follow the partition that moved"),), (), written)
    laid = _plan_anew(restored, device, at, systems)
    if laid is not None:
        written = _write_pieces(path, laid)
        _prove(path, at, result, device.name)
        return Adaptation((Change(where, f"GRUB for BIOS was laid anew ({reason})"),), (), written)
    note = f"GRUB for BIOS on {device.name} could not be verified: {reason}; it was left as it was captured"
    how = _remedy(restored, device.name, systems)
    report(Warn(note, f"If {device.name} does not boot: {how}"))
    return Adaptation(notes=(f"{note}. If {device.name} does not boot: {how}",))


def _remedy(restored: Restored, name: SpaceId, systems: Sequence[System]) -> str:
    """Return how GRUB is installed anew on a device."""
    path = restored.devices[name]
    disk = str(path) if name in {each.name for each in restored.result.disks} and is_block_device(path) else "DISK"
    for system in systems:
        space = system.mounts.get("/boot", system.root)
        if restored.result.disks_under(name) & restored.result.disks_under(space):
            return f"run from the recovery shell: {plan_grub_install(system, restored, disk)}"
    return f"run grub-install {disk} in the restored system from the recovery shell"


def _adapt_blank(restored: Restored, system: System, devices: Sequence[Device], report: Report) -> Adaptation:
    """Lay GRUB on the disks of a system's /boot, if they have no boot code and the system keeps GRUB's images."""
    result = restored.result
    under = result.disks_under(system.mounts.get("/boot", system.root))
    chosen = [device for device in devices if result.disks_under(device.name) & under]
    changes: list[Change] = []
    written = 0
    for device in chosen:
        path = restored.devices[device.name]
        with open_disk(path) as disk:
            if any(disk.read(0, _BOOT_CODE)):
                return Adaptation(tuple(changes), (), written)
        laid = _plan_anew(restored, device, 0, [system])
        if laid is not None:
            written += _write_pieces(path, laid)
            _prove(path, 0, result, device.name)
            where = f"sector 0 of {device.name}"
            changes.append(Change(where, "GRUB for BIOS was laid, since the disk had no boot code"))
    if chosen and not changes:
        names = ", ".join(device.name for device in chosen)
        note = f"this machine boots by BIOS, but {system.name} on {names} has no boot loader for it"
        report(Warn(note, "Switch the firmware to UEFI, or install grub-pc in the restored system."))
        return Adaptation(notes=(note,))
    return Adaptation(tuple(changes), (), written)


def _plan_moved(device: DiskIO, at: int, restored: Restored, name: SpaceId) -> list[tuple[int, bytes]] | None:
    """Return the sectors to write so that a chain follows its partition, or None if that is not what broke it.

    What lies in an array or another container is not written from below.
    """
    source, result = restored.source, restored.result
    boot = device.read(at * SECTOR, SECTOR)
    old_core = images.find_core_sector(boot)
    assert old_core is not None
    try:
        (core_sector,) = plan_move([old_core], source, result, name)
        _need_plain((at, core_sector), result, name)
        first = device.read(core_sector * SECTOR, SECTOR)
        old_runs = images.parse_runs(first)
        runs = images.move_runs(old_runs, plan_move(list(images.sectors_of(old_runs)), source, result, name))
        _need_owned(runs, _owned_sectors(result, name))
        patched = images.patch_runs(first, runs)
        rest = [device.read(run.start * SECTOR, run.count * SECTOR) for run in runs]
        check_core(images.parse_core(b"".join([patched, *rest])), result, name)
    except (CoreImageError, RemetalError):
        return None
    return [(core_sector, patched), (at, images.patch_core_sector(boot, core_sector))]


def _plan_anew(
    restored: Restored, device: Device, at: int, systems: Sequence[System]
) -> list[tuple[int, bytes]] | None:
    """Return the sectors to write to lay GRUB anew from an installed system's images, or None if it cannot be."""
    area = _embedding_area(restored.result, device)
    if at != 0 or area is None:
        return None
    for boot_image, core_image in _installed_images(restored, systems):
        try:
            core = images.plan_core(core_image, area[0])
            check_core(images.parse_core(core_image), restored.result, device.name)
            with open_disk(restored.devices[device.name]) as disk:
                boot = images.plan_boot_sector(boot_image, disk.read(0, SECTOR), area[0])
                standing = disk.read(area[0] * SECTOR, min(len(core), area[1] * SECTOR))
        except CoreImageError:
            continue
        is_free = images.is_core_start(standing) or not any(standing)
        if is_free and len(core) <= area[1] * SECTOR:
            return [(area[0], core), (0, boot)]
    return None


def _installed_images(restored: Restored, systems: Sequence[System]) -> Iterator[tuple[bytes, bytes]]:
    """Yield boot.img and core.img of every installed system that keeps them."""
    for system in systems:
        with open_root(system, restored) as root:
            found = [
                (read_inside(root, f"{folder}/boot.img"), read_inside(root, f"{folder}/core.img", limit=8 << 20))
                for folder in _FOLDERS
            ]
        for boot_image, core_image in found:
            if boot_image and core_image:
                yield boot_image, core_image


def _embedding_area(layout: Layout, disk: Device) -> tuple[int, int] | None:
    """Return first sector and length of GRUB's own area: a BIOS boot partition, or the gap behind an MBR."""
    table = layout.layer_on(disk.name)
    if isinstance(table, GptTable):
        for each in table.partitions:
            if each.type.upper() == BIOS_BOOT:
                return each.start // SECTOR, each.size // SECTOR
    elif isinstance(table, MbrTable):
        start, end = boot_area(table, disk.logical_sector)
        return (start // SECTOR, (end - start) // SECTOR) if end > start else None
    return None


def _probe_boot_places(disk: Device, layout: Layout, path: Path) -> list[int]:
    """Return the sectors that hold a GRUB boot sector: of the disk's first and each partition's first."""
    table = layout.layer_on(disk.name)
    partitions = table.partitions if isinstance(table, (GptTable, MbrTable)) else ()
    sectors = [0, *(each.start // SECTOR for each in partitions)]
    with open_disk(path) as device:
        return [at for at in sectors if images.find_core_sector(device.read(at * SECTOR, SECTOR)) is not None]


def _owned_sectors(layout: Layout, name: str) -> list[tuple[str, int, int]]:
    """Return label, first sector and length of the disk's spaces in which a boot loader may lie."""
    table = layout.layer_on(name)
    if not isinstance(table, (GptTable, MbrTable)):
        return []
    start, end = boot_area(table, SECTOR)
    spaces = [
        (each.number, each.start, each.size) for each in table.partitions if layout.layer_on(f"{name}:{each.number}")
    ]
    owned = [("boot", start, end - start), *((str(number), at, size) for number, at, size in spaces)]
    return [(label, at // SECTOR, size // SECTOR) for label, at, size in owned]


def _need_owned(runs: Sequence[Run], owned: Sequence[tuple[str, int, int]]) -> None:
    for run in runs:
        if not any(start <= run.start and run.start + run.count <= start + size for _, start, size in owned):
            raise CoreImageError(f"it points to sector {run.start}, which belongs to no restored partition")


def _need_plain(sectors: Sequence[int], layout: Layout, name: SpaceId) -> None:
    """Raise CoreImageError if a sector lies in a container, whose other members would not hear of a write."""
    for label, start, count in _owned_sectors(layout, name):
        layer = layout.layer_on(f"{name}:{label}")
        inside = isinstance(layer, (MdArray, VolumeGroup, Luks)) or (isinstance(layer, FileSystem) and layer.parts)
        if inside and any(start <= sector < start + count for sector in sectors):
            raise CoreImageError(f"it lies in {name}:{label}, which is part of something larger")


def _write_pieces(path: Path, pieces: Sequence[tuple[int, bytes]]) -> int:
    """Write what differs, in this order and durable one by one, so that the boot sector never leads nowhere new."""
    written = 0
    for sector, data in pieces:
        with open_disk(path, writable=True) as device:
            if device.read(sector * SECTOR, len(data)) != data:
                device.write(data, sector * SECTOR)
                written += len(data)
    flush_cache(path)
    return written


def _prove(path: Path, at: int, layout: Layout, name: str) -> None:
    """Read the chain back. Raises RemetalError if it is not whole now."""
    with open_disk(path) as device:
        try:
            probe_chain(device, at, layout, name)
        except CoreImageError as error:
            raise RemetalError(
                f"GRUB for BIOS on {path} does not read back as it was written: {error}",
                hint="Look at `dmesg` and `smartctl` for the disk's own errors.",
            ) from error
