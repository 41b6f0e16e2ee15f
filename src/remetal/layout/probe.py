"""Reading the layout of disks and disk files, without the kernel's help for partitions: they are spans."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import msgspec.structs

from remetal.errors import DamagedError, RefusedError
from remetal.events import Note, Report, Warn, silent
from remetal.layout.identity import probe_disk
from remetal.layout.layers import TABLES, VOLUMES, probe_volume
from remetal.layout.layers.contract import Content
from remetal.layout.model import (
    BIOS_BOOT,
    Disk,
    Layer,
    Layout,
    Partition,
    Raw,
    Table,
    Volume,
    boot_area,
    check_layout,
    is_container,
)
from remetal.layout.signatures import Signature, probe_signature
from remetal.layout.uses import is_same_disk
from remetal.ondisk.regions import BadStructureError, Read
from remetal.system.blockdev import DiskIO, Span, flush_cache, is_block_device, open_disk

_WHOLE_DISK = re.compile(r".*_raid_member")


def probe_layout(paths: Sequence[Path], *, names: Mapping[Path, str] | None = None, report: Report = silent) -> Layout:
    """Describe the disks at `paths`, in their order, and all layers on them.

    Disks are named after the kernel's or the file's name, or as `names` says. What remetal does not know is
    described as raw bytes, which are carried whole, and reported. Raises RefusedError if a disk cannot be
    opened or is empty.
    """
    disks: list[Disk] = []
    layers: list[Layer] = []
    for path, name in name_disks(paths, names or {}).items():
        flush_cache(path)
        disk = probe_disk(path, name)
        if disk.size == 0:
            raise RefusedError(f"{path} is empty: it has no sectors", hint="Name a whole disk or a disk file.")
        with open_disk(path) as io:
            disk, found = _probe_layers(io, disk, report)
        disks.append(disk)
        layers += found
    layout = Layout(disks=tuple(disks), layers=tuple(layers))
    check_layout(layout)
    return layout


def name_disks(paths: Sequence[Path], names: Mapping[Path, str]) -> dict[Path, str]:
    """Return a valid and unique name for every disk: kernel names, file names, or what `names` prescribes.

    Raises RefusedError if a disk is named twice.
    """
    for first, second in combinations(paths, 2):
        if is_same_disk(first, second):
            raise RefusedError(
                f"a disk is named twice: {first} and {second} are the same", hint="Name every disk once."
            )
    found: dict[Path, str] = {}
    for path in paths:
        known = (path.resolve() if is_block_device(path) else path).name
        plain = re.sub(r"[^A-Za-z0-9_.+@-]", "_", names.get(path, known))[:200].lstrip(".+@-") or "disk"
        name, count = plain, 1
        while name in found.values():
            count += 1
            name = f"{plain}-{count}"
        found[path] = name
    return found


def _probe_layers(io: DiskIO, disk: Disk, report: Report) -> tuple[Disk, list[Layer]]:
    """Return the disk, whose sector size may turn out otherwise in a disk file, and the layers on it."""
    whole = Span(io.path, 0, disk.size)
    signature = probe_signature(whole)
    if _WHOLE_DISK.fullmatch(signature.type):
        return disk, [_probe_raw(disk.name, disk.size, signature.type, report)]
    only_content = bool(signature.type) and not signature.table
    try:
        found = None if only_content else _probe_table(io, disk)
    except BadStructureError as error:
        report(
            Warn(
                f"{disk.name} is captured whole, with its free space: {error.message}",
                hint="Repair the partition table (gdisk, sfdisk) for a smaller backup.",
            )
        )
        return disk, [Raw(on=disk.name, size=disk.size, type=signature.table)]
    if found is not None and not found[1].partitions and _is_boot_sector(io.read(0, 512)):
        report(
            Warn(
                f"{disk.name} is captured whole: its first sector is that of a file system, which is damaged",
                hint="Check it with its own tools.",
            )
        )
        return disk, [Raw(on=disk.name, size=disk.size)]
    if found is not None:
        disk, table, problems = found
        if table.partitions or not signature.type:
            for problem in problems:
                report(Warn(f"{disk.name}: {problem}"))
            return disk, [table, *_probe_spaces(io, disk, table, report)]
    if not signature.type and not signature.ambiguous and _has_no_data(io):
        return disk, []
    return disk, [_probe_content(io, whole, disk.name, signature, report)]


def _is_boot_sector(sector: bytes) -> bool:
    """Whether a sector without partitions begins as those of FAT, NTFS and exFAT do: a jump over their parameters."""
    return sector[0] == 0xE9 or (sector[0] == 0xEB and sector[2] == 0x90)


def _probe_table(io: DiskIO, disk: Disk) -> tuple[Disk, Table, tuple[str, ...]] | None:
    """Return the disk's table; that of a disk file is looked for with sectors of 512 and of 4096 bytes.

    Raises BadStructureError if there is one that cannot be trusted.
    """
    sectors = [disk.logical_sector] if is_block_device(io.path) else [512, 4096]
    failure: BadStructureError | None = None
    for kind in TABLES:
        for sector in sectors:
            size = disk.size - disk.size % sector
            fitted = msgspec.structs.replace(disk, logical_sector=sector, size=size)
            try:
                found = kind.probe_table(io.read, size, sector, disk.name)
                if found is not None:
                    check_layout(Layout(disks=(fitted,), layers=(found[0],)))
                    return fitted, *found
            except BadStructureError as error:
                failure = failure or error
            except DamagedError as error:
                failure = failure or BadStructureError(f"its partition table is unusual: {error.message}")
        if failure is not None:
            raise failure
    return None


def _probe_spaces(io: DiskIO, disk: Disk, table: Table, report: Report) -> Iterator[Volume]:
    start, end = boot_area(table, disk.logical_sector)
    if any(io.read(start, end - start)):
        yield Raw(on=f"{disk.name}:boot", size=end - start)
    for partition in sorted(table.partitions, key=lambda each: each.start):
        if not is_container(table, partition):
            yield _probe_partition(io, disk, partition, report)


def _probe_partition(io: DiskIO, disk: Disk, partition: Partition, report: Report) -> Volume:
    space, span = f"{disk.name}:{partition.number}", Span(io.path, partition.start, partition.size)
    if partition.type == BIOS_BOOT:
        return Raw(on=space, size=span.size)
    return _probe_content(io, span, space, probe_signature(span), report)


def _probe_content(io: DiskIO, span: Span, space: str, signature: Signature, report: Report) -> Volume:
    """Describe what is on a space; whatever is unknown, damaged or ambiguous as raw bytes."""
    if signature.ambiguous:
        report(Warn(f"{space} carries the marks of several contents and is captured whole"))
        return Raw(on=space, size=span.size)
    if signature.type not in VOLUMES:
        return _probe_raw(space, span.size, signature.type, report)
    content = Content(space, span, _reader(io, span), signature.type, signature.label)
    try:
        volume = probe_volume(content)
        if volume.size > span.size:
            raise BadStructureError(f"its {signature.type} file system is larger than its space")
    except BadStructureError as error:
        report(
            Warn(
                f"{space} ({signature.type}) is captured whole, with its free space: {error.message}",
                hint="Check it with its own tools.",
            )
        )
        return Raw(on=space, size=span.size, type=signature.type)
    if signature.type == "swsuspend":
        report(
            Warn(
                f"{space} holds the memory of a hibernated system, which is not captured",
                hint="Start the system and shut it down for a clean backup.",
            )
        )
    return volume


def _probe_raw(space: str, size: int, kind: str, report: Report) -> Raw:
    report(Note(f"{space} holds {kind or 'unknown content'}, which is captured whole"))
    return Raw(on=space, size=size, type=re.sub(r"[^A-Za-z0-9_.+-]", "_", kind)[:64])


def _reader(io: DiskIO, span: Span) -> Read:
    def read(offset: int, size: int) -> bytes:
        return io.read(span.start + offset, size)

    return read


def _has_no_data(io: DiskIO) -> bool:
    """Whether a disk file is one single hole. Of a block device nobody knows without reading all of it."""
    if is_block_device(io.path):
        return False
    with suppress(OSError):
        os.lseek(io.fd, 0, os.SEEK_DATA)
        return False
    return True
