"""How a layout's layers lie on targets of other sizes. Pure: numbers in, numbers out.

From the disks upwards, every space is given its new size, and what stands on it decides what it makes of that.

The rule for what a larger target gives: in a partition table, the last partition with something that can grow takes it,
if nothing but swap follows, which then moves to the end; in a volume group, the largest volume that can grow; the rest
is handed through. `--grow` names the volumes that may grow instead, `--keep-sizes` none.

The rule for what a smaller target lacks: first, partitions give what their contents do not reach; then, those whose
file systems can be made anew by copying files, or can shrink, give what that does not need, and swap up to half of
itself; in both cases the one that can give most first. What lies behind moves forward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec.structs

from remetal.errors import RefusedError
from remetal.layout.layers import SPANNING, container_kind, md_sizes, plan_growth
from remetal.layout.layers.remaking import Remake
from remetal.layout.model import (
    Container,
    Device,
    Disk,
    FileSystem,
    GptTable,
    Layer,
    Layout,
    Luks,
    MbrTable,
    MdArray,
    Partition,
    Raw,
    SpaceId,
    Swap,
    Table,
    VolumeGroup,
    boot_area,
    device_names,
    is_extended,
    provided,
    spaces_of,
    table_end,
)
from remetal.layout.record import ImpossibleLayoutError, check_table
from remetal.layout.remake import plan_remake
from remetal.ondisk.regions import BadStructureError
from remetal.units import MIB, align_down, align_up, format_bytes

GROWTH_STEP = MIB
"""Partitions grow, shrink and move by multiples of this, so that alignments stay as they were."""

_LEAST_SWAP_PAGES = 10


@dataclass(frozen=True, slots=True)
class Fit:
    """The layers as they will lie on the targets: `grown`, `remade`, `shrunk` and `moved` are volumes.

    Those that are `remade` do not fit as blocks, and get a new file system and their files; those that are `shrunk` do
    neither, and are made smaller while they are restored. `blocked` is, by device,
    what follows the last volume that could grow there, and so keeps it as it is.
    """

    layers: tuple[Layer, ...]
    grown: tuple[SpaceId, ...]
    remade: Mapping[SpaceId, Remake]
    shrunk: tuple[SpaceId, ...]
    moved: tuple[SpaceId, ...]
    blocked: Mapping[SpaceId, SpaceId]


def plan_fit(
    layout: Layout,
    targets: Mapping[str, Disk],
    *,
    keep_sizes: bool,
    grow: Collection[SpaceId] = (),
    repacked: Collection[str] = (),
    pinned: Mapping[SpaceId, Table] | None = None,
    sizes: Mapping[SpaceId, int] | None = None,
) -> Fit:
    """Return the layers as they will lie on `targets`, which are by source disk.

    `grow` are the volumes that may grow; none named means all. `repacked` are volume groups that have fewer physical
    volumes than their metadata say; `pinned` are tables that stay as they are, by source disk; `sizes` says for
    what size of a space its content was made, where that is not its size. Raises RefusedError, with the numbers, if
    something does not fit.
    """
    fitter = _Fitter(layout, targets, keep_sizes, frozenset(grow), frozenset(repacked), pinned or {}, sizes or {})
    return fitter.fit()


class _Fitter:
    """Knows the new size of every space that it has come to so far."""

    def __init__(
        self,
        layout: Layout,
        targets: Mapping[str, Disk],
        keep_sizes: bool,
        grow: frozenset[SpaceId],
        repacked: frozenset[str],
        pinned: Mapping[SpaceId, Table],
        sizes: Mapping[SpaceId, int],
    ) -> None:
        self.layout = layout
        self.keep_sizes = keep_sizes
        self.wanted = grow
        self.repacked = repacked
        self.pinned = pinned
        self.sizes = sizes
        self.devices: dict[SpaceId, Device] = {
            name: Device(name=name, size=disk.size, logical_sector=disk.logical_sector)
            for name, disk in targets.items()
        }
        self.rooms: dict[SpaceId, int] = {name: disk.size for name, disk in targets.items()}
        self.grown: list[SpaceId] = []
        self.remade: dict[SpaceId, Remake] = {}
        self.shrunk: list[SpaceId] = []
        self.moved: list[SpaceId] = []
        self.blocked: dict[SpaceId, SpaceId] = {}
        self.growing: dict[tuple[SpaceId, int], bool] = {}
        self.needs: dict[tuple[SpaceId, bool], int] = {}
        self.headroom: dict[SpaceId, bool] = {}

    def fit(self) -> Fit:
        layers = tuple(self._fit_layer(layer) for layer in self.layout.layers)
        return Fit(layers, tuple(self.grown), self.remade, tuple(self.shrunk), tuple(self.moved), self.blocked)

    def _gain(self, space: SpaceId) -> int:
        return self.rooms.get(space, self._size(space)) - self._size(space)

    def _size(self, space: SpaceId) -> int:
        return self.sizes.get(space, self.layout.place(space)[2])

    def _sector(self, space: SpaceId) -> int:
        """Return the sector size of the device that a space will lie on."""
        return self.devices[self.layout.place(space)[0].name].logical_sector

    def _fit_layer(self, layer: Layer) -> Layer:
        match layer:
            case GptTable() | MbrTable():
                return self._fit_table(layer)
            case MdArray() | VolumeGroup() | Luks():
                return self._fit_container(layer)
            case FileSystem():
                return self._fit_file_system(layer)
            case Swap():
                size = min(layer.size, max(self.rooms[layer.on], _least_swap(layer)))
                self._check_room(layer.on, size)
                return msgspec.structs.replace(layer, size=align_down(size, layer.page_size))
            case Raw():
                self._check_room(layer.on, layer.size)
                if layer.sector:
                    self._check_sectors(f"the {layer.type}", layer.on, (layer.sector,))
                return layer

    def _check_room(self, space: SpaceId, needed: int) -> None:
        """Raise RefusedError if something that goes there as it is does not fit."""
        there = self.rooms[space]
        if needed > there:
            raise _too_small(space, needed, there)

    def _fit_file_system(self, volume: FileSystem) -> FileSystem:
        if volume.parts:
            for part in volume.parts:
                self._check_sectors(f"the {volume.type}", part.space, (volume.needed_sector,))
            if any(part.size > self.rooms[part.space] for part in volume.parts):
                return self._shrink(volume)
        elif volume.size > self.rooms[volume.on] or not self._suits(volume.on, (volume.needed_sector,)):
            return self._remake(volume)
        if self.keep_sizes or not self._may_grow(volume):
            return volume
        gains = {space: self._gain(space) for space in volume.spaces}
        if max(gains.values()) < GROWTH_STEP:
            return volume
        grown = plan_growth(volume, {space: self.rooms[space] for space in volume.spaces})
        if grown.size > volume.size:
            self.grown.append(volume.on)
        return grown

    def _remake(self, volume: FileSystem) -> FileSystem:
        """Plan a new file system for files that do not fit as blocks."""
        room, sector = self.rooms[volume.on], self._sector(volume.on)
        remake = plan_remake(volume, volume.making, room, sector)
        if isinstance(remake, str):
            raise RefusedError(
                f"{volume.on} ({volume.type}, {format_bytes(volume.size)}) does not fit as it is where it would go, "
                f"which has {format_bytes(room)} and sectors of {sector} bytes, and it cannot be made anew: {remake}",
                hint="Choose a larger target, or one with other sectors.",
            )
        self.remade[volume.on] = remake
        return msgspec.structs.replace(
            volume,
            size=remake.size,
            used=min(volume.used, remake.size),
            block_size=remake.block_size,
            features=remake.features,
            sector=0,
            making=None,
        )

    def _shrink(self, volume: FileSystem) -> FileSystem:
        """Plan smaller devices for a file system that can give up some of what it has."""
        shrunk = SPANNING[volume.type].plan_shrinking(volume, self.rooms)
        if isinstance(shrunk, str):
            lacking = next(part for part in volume.parts if part.size > self.rooms[part.space])
            raise RefusedError(
                f"{lacking.space} ({volume.type}, {format_bytes(lacking.size)}) does not fit as it is where it would "
                f"go, which has {format_bytes(self.rooms[lacking.space])}, and it cannot shrink: {shrunk}",
                hint="Choose larger targets.",
            )
        self.shrunk.append(volume.on)
        return msgspec.structs.replace(shrunk, used=min(shrunk.used, shrunk.size))

    def _may_grow(self, volume: FileSystem) -> bool:
        return not self.wanted or volume.on in self.wanted

    def _fit_container(self, container: Container) -> Container:
        gains = {space: self._gain_inside(container, space) for space in spaces_of(container)}
        if self.keep_sizes and not _takes_all(container):
            gains = {space: min(gain, 0) for space, gain in gains.items()}
        repacked = isinstance(container, VolumeGroup) and container.name in self.repacked
        if not any(gains.values()) and not repacked:
            fitted = container
        else:
            kind = container_kind(container)
            wish = next((name for name in kind.extensible_devices(container) if self._can_grow(name, GROWTH_STEP)), "")
            try:
                needs = {name: self._needs_files(name) for name in device_names(container)}
                fitted = kind.plan_container(container, gains, wish, needs)
            except BadStructureError as error:
                raise RefusedError(error.message, hint="Choose larger targets.") from error
        for device in provided(fitted, self.devices):
            self.devices[device.name] = device
            self.rooms[device.name] = device.size
        return fitted

    def _gain_inside(self, container: Container, space: SpaceId) -> int:
        """Return by how many bytes the room that a container has in a space changes."""
        before, after = self._size(space), self.rooms[space]
        match container:
            case MdArray():
                offsets = [each.data_offset for each in container.members if each.space == space]
                self._check_sectors(f"the array {container.device}", space, (*offsets, container.chunk))
                return md_sizes.data_gain(container.metadata, before, after)
            case Luks():
                self._check_sectors("the LUKS container", space, (container.header_size,))
                if container.fixed:
                    self._check_room(space, container.header_size + container.size)
                header, step = container.header_size, container.sector_size
                return align_down(after - header, step) - align_down(before - header, step)
            case VolumeGroup():
                starts = [each.data_start for each in container.members if each.space == space]
                self._check_sectors(f"the volume group {container.name}", space, (*starts, container.extent_size))
                return after - before

    def _check_sectors(self, what: str, space: SpaceId, places: Sequence[int]) -> None:
        """Raise RefusedError if what stands on a space would begin, or be divided, inside the sectors of its target."""
        if not self._suits(space, places):
            raise RefusedError(
                f"{what} on {space} cannot lie on a disk with sectors of {self._sector(space)} bytes: "
                "it has smaller parts",
                hint="Choose a target with smaller sectors, or leave it out (--only).",
            )

    def _suits(self, space: SpaceId, places: Sequence[int]) -> bool:
        """Whether these places of what stands on a space are those of whole sectors, or sectors are as they were."""
        before, sector = self.layout.place(space)[0].logical_sector, self._sector(space)
        return sector <= before or not any(place % sector for place in places)

    def _can_grow(self, space: SpaceId, room: int) -> bool:
        """Whether anything on a space of the source would take `room` bytes more."""
        if (space, room) not in self.growing:
            self.growing[space, room] = self._find_growth(space, room)
        return self.growing[space, room]

    def _find_growth(self, space: SpaceId, room: int) -> bool:
        layer = self.layout.layer_on(space)
        match layer:
            case FileSystem():
                rooms = {each: self._size(each) + room for each in layer.spaces}
                return self._may_grow(layer) and plan_growth(layer, rooms).size > layer.size
            case MdArray() | VolumeGroup() | Luks():
                others = not isinstance(layer, MdArray) or all(self._has_headroom(each) for each in layer.spaces)
                devices = container_kind(layer).extensible_devices(layer)
                return others and any(self._can_grow(name, room) for name in devices)
            case GptTable() | MbrTable():
                return any(self._can_grow(f"{layer.on}:{each.number}", room) for each in layer.partitions)
            case _:
                return False

    def _has_headroom(self, space: SpaceId) -> bool:
        """Whether all disks under a space get larger."""
        device = self.layout.place(space)[0].name
        if device not in self.headroom:
            disks = self.layout.disks_under(device)
            self.headroom[device] = all(self._gain(disk) >= GROWTH_STEP for disk in disks)
        return self.headroom[device]

    def _fit_table(self, table: Table) -> Table:
        device = self.devices[table.on]
        end = table_end(table, device)
        fitted = self.pinned.get(table.on) or _aligned(table, device.logical_sector)
        reach = max((each.end for each in fitted.partitions), default=0)
        if table.on in self.pinned:
            pass
        elif fitted.partitions and reach > end:
            fitted = self._shrink_table(fitted, reach - end)
        elif not self.keep_sizes and self._gain(table.on) >= GROWTH_STEP:
            fitted = self._grow_table(fitted, end)
        try:
            check_table(fitted, device)
        except ImpossibleLayoutError as error:
            raise RefusedError(
                f"the partitions of {table.on}, or the records between them, are too small or too close to one another "
                f"for a disk with sectors of {device.logical_sector} bytes",
                hint="Choose a target with sectors like those of the source, or a larger one.",
            ) from error
        for each in fitted.partitions:
            self.rooms[f"{table.on}:{each.number}"] = each.size
        start, stop = boot_area(fitted, device.logical_sector)
        self.rooms[f"{table.on}:boot"] = stop - start
        return fitted

    def _shrink_table(self, table: Table, short: int) -> Table:
        """Take `short` bytes away from the partitions that can spare them, and close the gaps."""
        plain = [each for each in table.partitions if not is_extended(table, each)]
        given = {each.number: 0 for each in plain}
        left = align_up(short, GROWTH_STEP)
        for needs in (self._needs_blocks, self._needs_files):
            spare = {
                each.number: align_down(each.size - needs(f"{table.on}:{each.number}"), GROWTH_STEP) for each in plain
            }
            for number in sorted(spare, key=lambda number: (-spare[number], number)):
                more = min(max(spare[number] - given[number], 0), left)
                given[number] += more
                left -= more
        if left > 0:
            there = self.devices[table.on].size
            last = max(table.partitions, key=lambda each: each.end)
            lack = short - sum(given.values())
            raise _too_small(f"partition {last.number} of {table.on}", there + lack, there)
        return msgspec.structs.replace(table, partitions=_closed_up(table, given))

    def _needs_blocks(self, space: SpaceId) -> int:
        """Return how many bytes what stands on a space of the source takes up as it is."""
        return self._needs(space, remade=False)

    def _needs_files(self, space: SpaceId) -> int:
        """Return how many bytes it needs at least, if file systems are made anew."""
        return self._needs(space, remade=True)

    def _needs_remade(self, volume: FileSystem) -> int:
        remake = plan_remake(volume, volume.making, volume.size, self._target_sector(volume.on))
        return volume.size if isinstance(remake, str) else min(volume.size, remake.needed)

    def _target_sector(self, space: SpaceId) -> int:
        """Return the sector size of the disks that a space will lie on, before its own device is known."""
        return max(self.devices[disk].logical_sector for disk in self.layout.disks_under(space))

    def _needs(self, space: SpaceId, *, remade: bool) -> int:
        if (space, remade) not in self.needs:
            self.needs[space, remade] = self._count_needs(space, remade=remade)
        return self.needs[space, remade]

    def _count_needs(self, space: SpaceId, *, remade: bool) -> int:
        layer = self.layout.layer_on(space)
        size = self._size(space)
        match layer:
            case None:
                return min(size, GROWTH_STEP)
            case FileSystem(parts=parts) if parts:
                part = next(part for part in parts if part.space == space)
                return SPANNING[layer.type].least_size(layer, part) if remade else part.size
            case FileSystem():
                return self._needs_remade(layer) if remade else layer.size
            case Swap():
                return _least_swap(layer) if remade else layer.size
            case MdArray() | VolumeGroup() | Luks():
                inner = {name: self._needs(name, remade=remade) for name in device_names(layer)}
                return min(size, container_kind(layer).least_space(layer, space, size, inner))
            case GptTable() | MbrTable():
                spare = sum(
                    align_down(each.size - self._needs(f"{space}:{each.number}", remade=remade), GROWTH_STEP)
                    for each in layer.partitions
                    if not is_extended(layer, each)
                )
                reach = max((each.end for each in layer.partitions), default=0)
                return min(size, align_up(reach - spare + GROWTH_STEP, GROWTH_STEP))
            case _:
                return layer.size

    def _grow_table(self, table: Table, end: int) -> Table:
        plain = sorted((each for each in table.partitions if not is_extended(table, each)), key=lambda each: each.start)
        room = align_down(end - max((each.end for each in _taking_space(table)), default=end), GROWTH_STEP)
        index = self._find_growing(table, plain, room)
        if room <= 0 or index is None:
            return table
        behind = plain[index + 1 :]
        spaces = [f"{table.on}:{each.number}" for each in behind]
        obstacles = [space for space in spaces if not self._is_swap(space)]
        if obstacles:
            self.blocked[table.on] = obstacles[-1]
            return table
        self.moved += spaces
        return msgspec.structs.replace(table, partitions=_shift(table, plain[index], room, end))

    def _is_swap(self, space: SpaceId) -> bool:
        """Whether there is nothing but swap on a space, be it in an array or a container."""
        layer = self.layout.layer_on(space)
        match layer:
            case MdArray() | VolumeGroup() | Luks():
                return all(map(self._is_swap, device_names(layer)))
            case _:
                return isinstance(layer, Swap)

    def _find_growing(self, table: Table, plain: Sequence[Partition], room: int) -> int | None:
        """Return the index of the last partition with something that can grow."""
        for index in range(len(plain) - 1, -1, -1):
            if self._can_grow(f"{table.on}:{plain[index].number}", room):
                return index
        return None


def _least_swap(swap: Swap) -> int:
    """Return the bytes that a swap space is left with at least: half, or what mkswap(8) takes."""
    return min(swap.size, max(align_up(swap.size // 2, swap.page_size), _LEAST_SWAP_PAGES * swap.page_size))


def _too_small(what: str, needed: int, there: int) -> RefusedError:
    return RefusedError(
        f"the target is too small: {what} needs {exact_bytes(needed)}, the target has {exact_bytes(there)}, short by "
        f"{exact_bytes(needed - there)}",
        hint="Choose a larger target.",
    )


def exact_bytes(count: int) -> str:
    """Return a byte count for people, and exactly."""
    return f"{format_bytes(count)} ({count} bytes)" if count >= 1024 else format_bytes(count)


def _takes_all(container: Container) -> bool:
    """Whether a container takes up its spaces whole, however large they are, so that it cannot keep its size."""
    return isinstance(container, Luks) or (isinstance(container, MdArray) and container.level in md_sizes.STRIPED)


def _aligned(table: Table, sector: int) -> Table:
    """Return the table with every partition on whole sectors of `sector` bytes, moved by as little as that takes."""
    if isinstance(table, GptTable) and table.first_usable % sector:
        table = msgspec.structs.replace(table, first_usable=0)
    if all(each.start % sector == each.size % sector == each.record % sector == 0 for each in table.partitions):
        return table
    moved = []
    for each in table.partitions:
        start = align_up(each.start, sector)
        size = max(align_down(each.end, sector) - start, sector)
        moved.append(msgspec.structs.replace(each, start=start, size=size, record=align_up(each.record, sector)))
    return msgspec.structs.replace(table, partitions=tuple(moved))


def _closed_up(table: Table, given: Mapping[int, int]) -> tuple[Partition, ...]:
    """Return the partitions without what each has given, by number; what lies behind moves forward."""

    def before(place: int) -> int:
        return sum(given.get(each.number, 0) for each in table.partitions if each.start < place)

    return tuple(
        msgspec.structs.replace(
            each,
            start=each.start - before(each.start),
            size=each.size - (before(each.end) - before(each.start)),
            record=each.record - before(each.record) if each.record else 0,
        )
        for each in table.partitions
    )


def _taking_space(table: Table) -> Iterator[Partition]:
    """Yield the partitions whose ends count: an extended one only if it is empty, else those inside count."""
    logical = any(each.number > 4 for each in table.partitions) and isinstance(table, MbrTable)
    return (each for each in table.partitions if not (is_extended(table, each) and logical))


def _shift(table: Table, growing: Partition, room: int, limit: int) -> tuple[Partition, ...]:
    """Let one partition grow by `room` bytes, and move what lies behind it.

    The extended partition moves or grows with the logical ones in it, up to `limit`, the end of the disk.
    """
    shifted = []
    for each in table.partitions:
        behind = room if each.start > growing.start else 0
        start, size = each.start + behind, each.size
        if each is growing:
            size += room
        elif is_extended(table, each) and each.end > growing.start:
            size = min(each.end + room, limit) - start
        record = each.record + room if each.record > growing.start else each.record
        shifted.append(msgspec.structs.replace(each, start=start, size=size, record=record))
    return tuple(shifted)
