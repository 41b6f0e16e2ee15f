"""How one disk's layers lie on a target of another size. Pure: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec.structs

from remetal.layout.layers import plan_growth
from remetal.layout.model import (
    Disk,
    FileSystem,
    GptTable,
    Layer,
    Layout,
    MbrTable,
    Partition,
    SpaceId,
    Swap,
    Table,
    is_container,
    table_end,
)
from remetal.units import MIB, align_down

GROWTH_STEP = MIB
"""Partitions grow, and move, by multiples of this, so that alignments stay as they were."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A disk's layers as they will lie on its target: `grown` and `moved` are volumes."""

    layers: tuple[Layer, ...]
    grown: tuple[SpaceId, ...] = ()
    moved: tuple[SpaceId, ...] = ()
    blocked_by: str = ""
    """What follows the last volume that could grow, and so keeps it as it is."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """What does not fit: up to which byte `what` reaches, and how many bytes there are for it."""

    what: str
    needed: int
    there: int


def find_shortage(layout: Layout, source: Disk, target: Disk) -> Shortage | None:
    """Return what of the source disk does not fit onto the target, or None if everything does."""
    table = layout.layer_on(source.name)
    if not isinstance(table, (GptTable, MbrTable)):
        return Shortage(source.name, source.size, target.size) if table and source.size > target.size else None
    there = table_end(table, target)
    last = max(table.partitions, key=_end, default=None)
    if last is not None and _end(last) > there:
        return Shortage(f"partition {last.number} of {source.name}", _end(last) + target.size - there, target.size)
    return None


def plan_fit(layout: Layout, source: Disk, target: Disk, *, keep_sizes: bool) -> Fit:
    """Return the layers of `source` as they will lie on `target`, which has no shortage.

    Places stay as they are. On a larger target, unless `keep_sizes`, the last volume that can grow takes the
    additional space, if nothing but swap follows it, which then moves to the end.
    """
    layers = _layers_of(layout, source.name)
    table = layout.layer_on(source.name)
    if keep_sizes or target.size - source.size < GROWTH_STEP:
        return Fit(layers)
    if isinstance(table, FileSystem):
        size = plan_growth(table, target.size)
        if size <= table.size:
            return Fit(layers)
        return Fit((msgspec.structs.replace(table, size=size),), grown=(table.on,))
    if not isinstance(table, (GptTable, MbrTable)):
        return Fit(layers)
    return _fit_table(layers, table, table_end(table, target))


def _fit_table(layers: tuple[Layer, ...], table: Table, end: int) -> Fit:
    volumes = {layer.on: layer for layer in layers}
    plain = sorted((each for each in table.partitions if not is_container(table, each)), key=lambda each: each.start)
    room = align_down(end - max((_end(each) for each in _taking_space(table)), default=end), GROWTH_STEP)
    index, size = _find_growing(table, plain, volumes, room)
    if room <= 0 or index is None:
        return Fit(layers)
    growing, behind = plain[index], plain[index + 1 :]
    obstacles = [each for each in behind if not isinstance(volumes.get(_space(table, each)), Swap)]
    if obstacles:
        return Fit(layers, blocked_by=_space(table, obstacles[-1]))
    grown = msgspec.structs.replace(table, partitions=_shift(table, growing, room, end))
    space = _space(table, growing)
    fitted = tuple(
        grown
        if layer is table
        else msgspec.structs.replace(layer, size=size)
        if isinstance(layer, FileSystem) and layer.on == space
        else layer
        for layer in layers
    )
    return Fit(fitted, grown=(space,), moved=tuple(_space(table, each) for each in behind))


def _find_growing(
    table: Table, plain: Sequence[Partition], volumes: dict[SpaceId, Layer], room: int
) -> tuple[int | None, int]:
    """Return the index of the last partition whose file system can grow, and the size that it will have."""
    for index in range(len(plain) - 1, -1, -1):
        volume = volumes.get(_space(table, plain[index]))
        if isinstance(volume, FileSystem):
            size = plan_growth(volume, plain[index].size + room)
            if size > volume.size:
                return index, size
    return None, 0


def _taking_space(table: Table) -> list[Partition]:
    """Return the partitions whose ends count: an extended one only if it is empty, else those inside count."""
    logical = any(each.number > 4 for each in table.partitions) and isinstance(table, MbrTable)
    return [each for each in table.partitions if not (is_container(table, each) and logical)]


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
        elif is_container(table, each) and _end(each) > growing.start:
            size = min(_end(each) + room, limit) - start
        record = each.record + room if each.record > growing.start else each.record
        shifted.append(msgspec.structs.replace(each, start=start, size=size, record=record))
    return tuple(shifted)


def _layers_of(layout: Layout, name: str) -> tuple[Layer, ...]:
    return tuple(layer for layer in layout.layers if layer.on == name or layer.on.startswith(f"{name}:"))


def _space(table: Table, partition: Partition) -> SpaceId:
    return f"{table.on}:{partition.number}"


def _end(partition: Partition) -> int:
    return partition.start + partition.size
