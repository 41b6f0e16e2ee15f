"""What a restore leaves out or takes apart because its user says so: disks and arrays. Pure: layout in, layout out.

An array that loses disks becomes degraded, as long as it works without them. One that is dissolved leaves what it
holds on its first member, so that it needs one disk alone. A volume group that loses physical volumes is packed onto
the others. What stood on a disk that is left out, and on nothing else, is left out as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec.structs

from remetal.errors import RefusedError, UsageError
from remetal.layout.fitting import exact_bytes, plan_fit
from remetal.layout.layers import md_sizes
from remetal.layout.model import (
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
    device_names,
    spaces_of,
)
from remetal.units import MIB, align_up

_LINUX_RAID = "A19D880F-05FC-4D3B-A006-743F0F84911E"
_LINUX_DATA = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


@dataclass(frozen=True, slots=True)
class Reshaped:
    """The layout that is left, and how it came about.

    `images` says whose image a space of it gets, where that is another; `dropped` are the volumes and LUKS containers
    that are left out, by their spaces, `repacked` the groups that lost physical volumes, by name; `notes` are
    sentences. `moved` says where the content of each dissolved array goes.
    """

    layout: Layout
    images: Mapping[SpaceId, SpaceId] = field(default_factory=dict)
    dropped: tuple[SpaceId, ...] = ()
    repacked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    moved: Mapping[SpaceId, SpaceId] = field(default_factory=dict)


def reshape(layout: Layout, *, without: Collection[str], dissolve: Collection[SpaceId]) -> Reshaped:
    """Return the layout without these disks, and with these arrays dissolved.

    Raises UsageError if there is no such disk or array, RefusedError if what is left would not work.
    """
    _check_names(layout, without, dissolve)
    shaped = _Shaper(layout, frozenset(without), frozenset(dissolve))
    for layer in layout.layers:
        shaped.take(layer)
    return shaped.result()


def _check_names(layout: Layout, without: Collection[str], dissolve: Collection[SpaceId]) -> None:
    disks = [disk.name for disk in layout.disks]
    arrays = [layer.device for layer in layout.layers if isinstance(layer, MdArray)]
    for name in without:
        if name not in disks:
            raise UsageError(f"the snapshot has no disk '{name}'", hint=f"Its disks: {', '.join(disks)}.")
    for name in dissolve:
        if name not in arrays:
            raise UsageError(f"the snapshot has no array '{name}'", hint=f"Its arrays: {', '.join(arrays) or 'none'}.")
    if len(set(without)) == len(disks) and disks:
        raise UsageError("every disk of the snapshot is left out", hint="Leave out fewer.")


class _Shaper:
    """Takes layer after layer, and knows which spaces are gone and which have another name."""

    def __init__(self, layout: Layout, without: frozenset[str], dissolve: frozenset[SpaceId]) -> None:
        self.layout = layout
        self.dissolve = dissolve
        self.gone: set[SpaceId] = set(without)
        self.names: dict[SpaceId, SpaceId] = {}
        self.sizes: dict[SpaceId, int] = {}
        """What the content of a dissolved array has room for, by the space where it goes."""
        self.layers: list[Layer] = []
        self.disks = {disk.name: disk for disk in layout.disks if disk.name not in without}
        self.dropped: list[SpaceId] = []
        self.repacked: list[str] = []
        self.notes: list[str] = []

    def result(self) -> Reshaped:
        """Return what is left."""
        layout = Layout(disks=tuple(self.disks.values()), layers=tuple(self.layers), inventory=self.layout.inventory)
        if self.sizes:  # what takes up its space whole takes up its new place
            fit = plan_fit(layout, self.disks, keep_sizes=True, repacked=self.repacked, sizes=self.sizes)
            layout = msgspec.structs.replace(layout, layers=fit.layers)
        images = {self._name(each.volume): each.volume for each in self.layout.captured()}
        renamed = {new: old for new, old in images.items() if new != old}
        return Reshaped(layout, renamed, tuple(self.dropped), tuple(self.repacked), tuple(self.notes), self.names)

    def take(self, layer: Layer) -> None:
        """Add a layer to what is left, unless it stands on what is gone."""
        match layer:
            case MdArray() if layer.device in self.dissolve:
                self._dissolve(layer)
            case MdArray():
                self._keep_array(layer)
            case VolumeGroup():
                self._keep_group(layer)
            case FileSystem(parts=parts) if parts and any(self._is_gone(space) for space in layer.spaces):
                self._drop_spanning(layer)
            case _:
                if self._is_gone(spaces_of(layer)[0]):
                    self._drop(layer)
                else:
                    self.layers.append(self._renamed(layer))

    def _is_gone(self, space: SpaceId) -> bool:
        return self.layout.place(space)[0].name in self.gone or space in self.gone

    def _drop(self, layer: Layer) -> None:
        if isinstance(layer, (FileSystem, Swap, Raw, Luks)):
            self.dropped.append(layer.on)
        if isinstance(layer, (MdArray, VolumeGroup, Luks)):
            self.gone.update(device_names(layer))

    def _drop_spanning(self, volume: FileSystem) -> None:
        if not all(self._is_gone(space) for space in volume.spaces):
            raise RefusedError(
                f"the {volume.type} on {', '.join(volume.spaces)} needs all of its devices",
                hint="Give each of their disks a target.",
            )
        self._drop(volume)

    def _keep_array(self, array: MdArray) -> None:
        left = [each for each in array.members if each.space and not self._is_gone(each.space)]
        lost = len(array.spaces) - len(left)
        there = {each.slot for each in left if each.slot >= 0}
        if not there:
            self._drop(array)
            return
        if not md_sizes.is_startable(array.level, array.layout, array.slots, there):
            raise RefusedError(
                f"the {array.level} {array.device} does not work with {len(there)} of {array.slots} devices",
                hint=f"Give more of its disks a target, or dissolve it: --dissolve {array.device}.",
            )
        if lost and len(there) < array.slots:
            self.notes.append(f"{array.device} will run with {len(there)} of {array.slots} devices")
        members = tuple(
            msgspec.structs.replace(each, space="" if self._is_gone(each.space) else self._name(each.space))
            if each.space
            else each
            for each in array.members
            if each.slot >= 0 or not self._is_gone(each.space)
        )
        self.layers.append(msgspec.structs.replace(array, members=members))

    def _keep_group(self, group: VolumeGroup) -> None:
        left = tuple(
            msgspec.structs.replace(each, space=self._name(each.space))
            for each in group.members
            if not self._is_gone(each.space)
        )
        if not left:
            self._drop(group)
            return
        if len(left) < len(group.members):
            self.repacked.append(group.name)
            lost = ", ".join(each.space for each in group.members if self._is_gone(each.space))
            self.notes.append(
                f"volume group {group.name} is packed onto the physical volumes that are left, without {lost}"
            )
        self.layers.append(msgspec.structs.replace(group, members=left))

    def _dissolve(self, array: MdArray) -> None:
        """Put what an array holds onto its first member that is left."""
        left = [each for each in array.members if each.space and each.slot >= 0 and not self._is_gone(each.space)]
        if not left:
            self._drop(array)
            return
        place = self._name(left[0].space)
        keep = "Keep the array; it may be degraded: leave it out of --dissolve."
        if isinstance(self.layout.layer_on(array.device), (GptTable, MbrTable)) and place not in self.layout.devices:
            raise RefusedError(
                f"{array.device} cannot be dissolved: it has a partition table, which cannot lie inside a partition",
                hint=keep,
            )
        size = self._make_room(place, array.size) or self.layout.place(left[0].space)[2]
        if size < array.size:
            raise RefusedError(
                f"{array.device} cannot be dissolved: it holds {exact_bytes(array.size)}, and {place}, which is "
                f"made of others itself, has {exact_bytes(size)}",
                hint=keep,
            )
        self.names[array.device] = place
        self.sizes[place] = array.size
        self.notes.append(f"{array.device} is dissolved: what it holds goes onto {place} alone")

    def _make_room(self, space: SpaceId, size: int) -> int:
        """Let a space of the source count as large enough for an array's content, moving what lies behind it.

        Returns its size; 0 for other than disks and their partitions, which cannot get larger.
        """
        name, _, number = space.rpartition(":")
        if space in self.disks:
            disk = self.disks[space]
            size = max(disk.size, align_up(size, disk.logical_sector))
            self.disks[space] = msgspec.structs.replace(disk, size=size)
            return size
        for index, layer in enumerate(self.layers):
            if isinstance(layer, (GptTable, MbrTable)) and layer.on == name and name in self.disks:
                table, more = _enlarged(layer, int(number), size)
                self.layers[index] = table
                disk = self.disks[name]
                self.disks[name] = msgspec.structs.replace(disk, size=disk.size + more)
                return next(each.size for each in table.partitions if each.number == int(number))
        return 0

    def _name(self, space: SpaceId) -> SpaceId:
        """Return what a space is called now: what was on a dissolved array is on its place."""
        for old, new in self.names.items():
            if space == old or space.startswith(f"{old}:"):
                return new + space.removeprefix(old)
        return space

    def _renamed(self, layer: Layer) -> Layer:
        match layer:
            case FileSystem(parts=parts) if parts:
                named = tuple(msgspec.structs.replace(each, space=self._name(each.space)) for each in parts)
                return msgspec.structs.replace(layer, on=self._name(layer.on), parts=named)
            case MdArray() | VolumeGroup():
                raise AssertionError("arrays and groups are kept by their members")
            case _:
                return msgspec.structs.replace(layer, on=self._name(layer.on))


def _enlarged(table: Table, number: int, size: int) -> tuple[Table, int]:
    """Return a table whose partition has `size` bytes at least and is no RAID's any more, and what that takes more."""
    chosen = next(each for each in table.partitions if each.number == number)
    more = max(align_up(size, MIB) - chosen.size, 0)
    return msgspec.structs.replace(table, partitions=tuple(_moved(table, chosen, more))), more


def _moved(table: Table, chosen: Partition, more: int) -> Iterator[Partition]:
    for each in table.partitions:
        if each is chosen:
            kind = {_LINUX_RAID: _LINUX_DATA, "fd": "83"}.get(each.type, each.type)
            yield msgspec.structs.replace(each, size=each.size + more, type=kind)
        elif each.start > chosen.start:
            record = each.record + more if each.record else 0
            yield msgspec.structs.replace(each, start=each.start + more, record=record)
        elif each.end > chosen.start:
            yield msgspec.structs.replace(each, size=each.size + more)
        else:
            yield each
