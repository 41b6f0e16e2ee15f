"""In which order the steps of a restore come. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from remetal.layout.fitting import Fit
from remetal.layout.model import (
    BIOS_BOOT,
    EFI_SYSTEM,
    PREP_BOOT,
    Disk,
    FileSystem,
    GptTable,
    Layout,
    MbrTable,
    SpaceId,
    Swap,
    Table,
    Volume,
    boot_area,
    table_end,
)
from remetal.layout.steps import (
    ClearRange,
    ClearSignatures,
    CreateFile,
    GrowFileSystem,
    ImageFacts,
    MakeSwap,
    Step,
    WriteBootCode,
    WriteImage,
    WriteTable,
)
from remetal.units import MIB

_BOOT_CODE = 440
_TAIL = MIB
_EFI_TYPES = {EFI_SYSTEM, "ef"}
_BOOT_TYPES = {BIOS_BOOT, PREP_BOOT, "41"}


@dataclass(frozen=True, slots=True)
class Seat:
    """One disk as it will be: under its source's name, on its target; `file_size` if a disk file stands for it."""

    disk: Disk
    file_size: int | None
    fit: Fit

    @property
    def table(self) -> Table | None:
        """The partition table that the disk will have."""
        return next((layer for layer in self.fit.layers if isinstance(layer, (GptTable, MbrTable))), None)


def plan_steps(layout: Layout, seats: Sequence[Seat], images: Mapping[SpaceId, ImageFacts]) -> Iterator[Step]:
    """Yield all steps in the order of their application: whatever makes a disk bootable comes last.

    `layout` is the source's; `images` has an entry for each of its captured volumes.
    """
    result = Layout(
        disks=tuple(seat.disk for seat in seats), layers=tuple(layer for seat in seats for layer in seat.fit.layers)
    )
    for seat in seats:
        if seat.file_size is not None:
            yield CreateFile(disk=seat.disk.name, size=seat.file_size)
    for seat in seats:
        table, name = seat.table, seat.disk.name
        if table is not None:
            yield WriteTable(disk=name, size=seat.disk.size, sector=seat.disk.logical_sector, table=table)
            yield from _plan_clearing(seat, table)
    grown = {space for seat in seats for space in seat.fit.grown}
    before = {volume.on: volume.size for volume in layout.volumes()}
    for volume in sorted(result.volumes(), key=lambda volume: _rank(volume, result)):
        yield from _plan_volume(volume, images, result)
        if volume.on in grown:
            yield from _plan_growth(volume, before[volume.on], result)
    for seat in seats:
        if seat.table is not None:
            yield WriteBootCode(disk=seat.disk.name, code=_boot_code(seat.table))


def _plan_clearing(seat: Seat, table: Table) -> Iterator[Step]:
    """Clear the places outside of volumes where other tables, arrays and volume groups keep their marks."""
    start, end = boot_area(table, seat.disk.logical_sector)
    if start < end and not any(layer.on == f"{seat.disk.name}:boot" for layer in seat.fit.layers):
        yield ClearRange(disk=seat.disk.name, start=start, size=end - start)
    tail = table_end(table, seat.disk) if isinstance(table, GptTable) else seat.disk.size
    last = max((each.start + each.size for each in table.partitions), default=end)
    start = max(last, end, tail - _TAIL)
    if start < tail:
        yield ClearRange(disk=seat.disk.name, start=start, size=tail - start)


def _plan_volume(volume: Volume, images: Mapping[SpaceId, ImageFacts], result: Layout) -> Iterator[Step]:
    disk, start, space = result.place(volume.on)
    if isinstance(volume, Swap):
        yield MakeSwap(
            volume=volume.on,
            disk=disk.name,
            start=start,
            size=volume.size,
            page_size=volume.page_size,
            uuid=volume.uuid,
            label=volume.label,
        )
        return
    facts = images[volume.on]
    if isinstance(volume, FileSystem):
        yield ClearSignatures(
            volume=volume.on, disk=disk.name, start=start, size=space, type=volume.type, uuid=volume.uuid
        )
    yield WriteImage(
        volume=volume.on, disk=disk.name, start=start, size=facts.size, used=facts.used, digest=facts.digest
    )


def _plan_growth(volume: Volume, before: int, result: Layout) -> Iterator[Step]:
    disk, start, space = result.place(volume.on)
    if isinstance(volume, FileSystem):
        yield GrowFileSystem(
            volume=volume.on,
            disk=disk.name,
            start=start,
            size=space,
            type=volume.type,
            before=before,
            after=volume.size,
        )


def _rank(volume: Volume, result: Layout) -> int:
    """Return how late a volume is written: what firmware and boot loaders look for comes last."""
    disk = result.place(volume.on)[0].name
    part = volume.on.removeprefix(disk)
    if part == ":boot":
        return 3
    table = result.layer_on(disk)
    if not part or not isinstance(table, (GptTable, MbrTable)):
        return 0
    kind = next(each.type for each in table.partitions if f":{each.number}" == part)
    return 2 if kind in _BOOT_TYPES else 1 if kind in _EFI_TYPES else 0


def _boot_code(table: Table) -> bytes:
    return table.protective_mbr[:_BOOT_CODE] if isinstance(table, GptTable) else table.boot_code
