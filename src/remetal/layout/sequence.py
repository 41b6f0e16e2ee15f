"""In which order the steps of a restore come. Pure.

Disk files, then tables and containers from the disks upwards, then volumes, and boot code last. What lies in a thin
snapshot comes in a later wave than its origin, so that both share the blocks that are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from remetal.layout.fitting import Fit
from remetal.layout.layers.remaking import Remake
from remetal.layout.model import (
    BIOS_BOOT,
    EFI_SYSTEM,
    PREP_BOOT,
    Captured,
    Container,
    Device,
    FileSystem,
    GptTable,
    Layer,
    Layout,
    Luks,
    MbrTable,
    MdArray,
    Raw,
    SpaceId,
    Swap,
    Table,
    Volume,
    VolumeGroup,
    boot_area,
    is_extended,
    spaces_of,
    table_end,
)
from remetal.layout.steps import (
    ClearRange,
    ClearSignatures,
    CopyFiles,
    CreateFile,
    GrowFileSystem,
    GrowSpanning,
    ImageFacts,
    MakeSwap,
    OpenContainer,
    RemakeFileSystem,
    ShrinkFileSystem,
    ShrunkPart,
    Step,
    TakeSnapshot,
    WriteBootCode,
    WriteImage,
    WriteTable,
)
from remetal.units import MIB

_BOOT_CODE = 440
_TAIL = MIB
_EFI_TYPES = {EFI_SYSTEM, "ef"}
_BOOT_TYPES = {BIOS_BOOT, PREP_BOOT, "41"}


def plan_steps(
    source: Layout, result: Layout, fit: Fit, files: Mapping[str, int], images: Mapping[SpaceId, ImageFacts]
) -> Iterator[Step]:
    """Yield all steps in the order of their application: whatever makes a disk bootable comes last.

    `result` is the layout as it will stand; `files` are the sizes of the disk files among the targets, by disk;
    `images` has an entry for everything that `source` has captured.
    """
    for name, size in files.items():
        yield CreateFile(device=name, size=size)
    waves = _Waves(result)
    for wave in range(waves.count):
        layers = [layer for layer in result.layers if waves.of_layer(layer) == wave]
        for group, name in waves.snapshots(wave):
            yield TakeSnapshot(group=group, volume=name)
        for layer in layers:
            yield from _plan_structure(layer, images, result)
        for layer in layers:
            if isinstance(layer, (FileSystem, Swap, Raw)) and not _rank(layer, result):
                yield from _plan_content(layer, fit, images, source, result)
    for volume in sorted(result.volumes(), key=lambda each: _rank(each, result)):
        if _rank(volume, result):
            yield from _plan_content(volume, fit, images, source, result)
    for layer in result.layers:
        if isinstance(layer, (GptTable, MbrTable)):
            yield WriteBootCode(device=layer.on, code=_boot_code(layer))


class _Waves:
    """Which layers must wait for which: wave 0 waits for nothing, a thin snapshot waits for its origin's wave."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.known: dict[SpaceId, int] = {disk.name: 0 for disk in layout.disks}
        self.taken: list[tuple[int, VolumeGroup, str]] = []
        for layer in layout.layers:
            if isinstance(layer, (MdArray, VolumeGroup, Luks)):
                self._add(layer)

    @property
    def count(self) -> int:
        """How many waves there are."""
        return 1 + max(self.known.values(), default=0)

    def of_layer(self, layer: Layer) -> int:
        """Return the wave that a layer belongs to."""
        return max(self.known[self.layout.place(space)[0].name] for space in spaces_of(layer))

    def snapshots(self, wave: int) -> Iterator[tuple[VolumeGroup, str]]:
        """Yield the thin snapshots that begin a wave."""
        return ((group, name) for number, group, name in self.taken if number == wave)

    def _add(self, container: Container) -> None:
        wave = self.of_layer(container)
        if not isinstance(container, VolumeGroup):
            self.known[container.device] = wave
            return
        left = {each.name: each for each in container.volumes if each.captured}
        while left:
            ready = [each for each in left.values() if each.origin not in left]
            for each in ready or list(left.values()):
                origin = self.known.get(f"{container.name}/{each.origin}") if each.origin else None
                number = wave if origin is None else origin + 1
                self.known[f"{container.name}/{each.name}"] = number
                if origin is not None:
                    self.taken.append((number, container, each.name))
                del left[each.name]


def _plan_structure(layer: Layer, images: Mapping[SpaceId, ImageFacts], result: Layout) -> Iterator[Step]:
    """Yield what makes a table or a container."""
    match layer:
        case GptTable() | MbrTable():
            device = result.devices[layer.on]
            yield WriteTable(device=layer.on, size=device.size, sector=device.logical_sector, table=layer)
            yield from _plan_clearing(layer, device, result)
        case Luks():
            device, start, size = result.place(layer.on)
            yield ClearSignatures(
                volume=layer.on, device=device.name, start=start, size=size, type="crypto_LUKS", uuid=layer.uuid
            )
            yield _plan_image(Captured(volume=layer.header, size=layer.header_size), images, result)
            yield OpenContainer(container=layer)
        case MdArray() | VolumeGroup():
            yield OpenContainer(container=layer)
        case _:
            pass


def _plan_clearing(table: Table, device: Device, result: Layout) -> Iterator[Step]:
    """Clear the places outside of volumes where other tables, arrays and volume groups keep their marks.

    A partition that nothing goes to may hold a member of an array that is no more, and would come up by itself.
    """
    for each in table.partitions:
        space = f"{table.on}:{each.number}"
        if result.layer_on(space) is None and not is_extended(table, each):
            yield ClearSignatures(volume=space, device=table.on, start=each.start, size=each.size, type="", uuid="")
    start, end = boot_area(table, device.logical_sector)
    if start < end and result.layer_on(f"{table.on}:boot") is None:
        yield ClearRange(device=table.on, start=start, size=end - start)
    tail = table_end(table, device) if isinstance(table, GptTable) else device.size
    last = max((each.end for each in table.partitions), default=end)
    start = max(last, end, tail - _TAIL)
    if start < tail:
        yield ClearRange(device=table.on, start=start, size=tail - start)


def _plan_content(
    volume: Volume, fit: Fit, images: Mapping[SpaceId, ImageFacts], source: Layout, result: Layout
) -> Iterator[Step]:
    """Yield what brings a volume onto its place: as blocks, or made anew where they do not fit."""
    if volume.on in fit.remade and isinstance(volume, FileSystem):
        yield from _plan_remake(volume, fit.remade[volume.on], images, result)
        return
    if volume.on in fit.shrunk and isinstance(volume, FileSystem):
        yield from _plan_shrinking(volume, images, source, result)
        return
    yield from _plan_volume(volume, images, result)
    if volume.on in fit.grown and isinstance(volume, FileSystem):
        yield _plan_growth(volume, source, result)


def _plan_volume(volume: Volume, images: Mapping[SpaceId, ImageFacts], result: Layout) -> Iterator[Step]:
    if isinstance(volume, Swap):
        device, start, _ = result.place(volume.on)
        yield MakeSwap(
            volume=volume.on,
            device=device.name,
            start=start,
            size=volume.size,
            page_size=volume.page_size,
            uuid=volume.uuid,
            label=volume.label,
        )
        return
    for space in spaces_of(volume):
        device, start, size = result.place(space)
        if isinstance(volume, FileSystem):
            yield ClearSignatures(
                volume=space, device=device.name, start=start, size=size, type=volume.type, uuid=volume.uuid
            )
        yield _plan_image(Captured(volume=space, size=volume.size), images, result)


def _plan_remake(
    volume: FileSystem, remake: Remake, images: Mapping[SpaceId, ImageFacts], result: Layout
) -> Iterator[Step]:
    device, start, size = result.place(volume.on)
    facts = images[volume.on]
    yield RemakeFileSystem(volume=volume, device=device.name, start=start, size=size, remake=remake)
    yield CopyFiles(
        volume=volume.on,
        image=facts.image or volume.on,
        device=device.name,
        start=start,
        size=size,
        type=volume.type,
        used=facts.used,
        digest=facts.digest,
    )


def _plan_shrinking(
    volume: FileSystem, images: Mapping[SpaceId, ImageFacts], source: Layout, result: Layout
) -> Iterator[Step]:
    former = source.layer_on(volume.on)
    assert isinstance(former, FileSystem)
    parts = []
    for before, part in zip(former.parts, volume.parts, strict=True):
        device, start, size = result.place(part.space)
        facts = images[part.space]
        yield ClearSignatures(
            volume=part.space, device=device.name, start=start, size=size, type=volume.type, uuid=volume.uuid
        )
        parts.append(
            ShrunkPart(
                volume=part.space,
                number=part.number,
                image=facts.image or part.space,
                device=device.name,
                start=start,
                before=before.size,
                size=part.size,
                used=min(facts.used, part.size),
                digest=facts.digest,
            )
        )
    yield ShrinkFileSystem(volume=volume, parts=tuple(parts))


def _plan_image(captured: Captured, images: Mapping[SpaceId, ImageFacts], result: Layout) -> WriteImage:
    device, start, room = result.place(captured.volume)
    facts = images[captured.volume]
    return WriteImage(
        volume=captured.volume,
        image=facts.image or captured.volume,
        device=device.name,
        start=start,
        size=min(facts.size, room),
        used=facts.used,
        digest=facts.digest,
    )


def _plan_growth(volume: FileSystem, source: Layout, result: Layout) -> Step:
    before = source.layer_on(volume.on)
    assert isinstance(before, FileSystem)
    if volume.parts:
        return GrowSpanning(volume=volume, before=before.size)
    device, start, space = result.place(volume.on)
    return GrowFileSystem(
        volume=volume.on,
        device=device.name,
        start=start,
        size=space,
        type=volume.type,
        before=before.size,
        after=volume.size,
    )


def _rank(volume: Volume, result: Layout) -> int:
    """Return how late a volume is written: what firmware and boot loaders look for comes last."""
    name = result.place(volume.on)[0].name
    part = volume.on.removeprefix(name)
    if part == ":boot":
        return 3
    table = result.layer_on(name)
    if not part or not isinstance(table, (GptTable, MbrTable)):
        return 0
    kind = next(each.type for each in table.partitions if f":{each.number}" == part)
    return 2 if kind in _BOOT_TYPES else 1 if kind in _EFI_TYPES else 0


def _boot_code(table: Table) -> bytes:
    return table.protective_mbr[:_BOOT_CODE] if isinstance(table, GptTable) else table.boot_code
