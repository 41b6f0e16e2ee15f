"""How large arrays are, what they do without, and what becomes of them on other members. Pure.

Sources: Linux drivers/md/raid0.c, linear.c, raid5.c and raid10.c for the sizes of arrays, md_p.h for where superblocks
of the versions 0.90 and 1.0 lie, which is at the end; mdadm(8) for `--size`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec.structs

from remetal.layout.model import ArrayMember, MdArray, SpaceId
from remetal.ondisk.regions import BadStructureError
from remetal.units import KIB, TIB, align_down, align_up

STRIPED = {"raid0", "linear"}
"""Levels that use all of every member, without redundancy."""

_SECTOR = 512
_GRANULE = 64 * KIB
"""Bytes by multiples of which a component without chunks changes its size."""

_PARITY = {"raid4": 1, "raid5": 1, "raid6": 2}
_ENDS = {"0.90": 64 * KIB, "1.0": 4 * KIB}
"""Bytes to which the place of a superblock at the end of a member is aligned."""
_MOST_0 = 4 * TIB
"""Members that metadata 0.90 takes are smaller than this."""


def is_startable(level: str, layout: str, slots: int, there: set[int]) -> bool:
    """Whether an array works with the devices in these slots."""
    missing = slots - len(there)
    match level:
        case "raid1":
            return bool(there)
        case "raid4" | "raid5":
            return missing <= 1
        case "raid6":
            return missing <= 2
        case "raid10":
            near, far = _copies(layout)
            firsts = {number * near % slots for number in range(slots)}
            return all(any((first + copy) % slots in there for copy in range(near * far)) for first in firsts)
        case _:
            return missing == 0


def array_size(layer: MdArray) -> int:
    """Return how many bytes the kernel makes of an array's members, all of which are there where it takes them all."""
    component, chunk = layer.component_size, layer.chunk
    if layer.level in STRIPED:
        return sum(_share(layer, each) for each in layer.members if each.slot >= 0)
    if layer.level == "raid1":
        return component
    if layer.level == "raid10":
        near, far = _copies(layer.layout)
        return component // chunk // far * layer.slots // near * chunk
    return align_down(component, chunk) * (layer.slots - _PARITY[layer.level])


def _share(layer: MdArray, member: ArrayMember) -> int:
    """Return what a member gives to an array without redundancy."""
    whole = align_down(member.data_size, layer.chunk or _SECTOR)
    # The kernel's RAID 0 rounds with a mask too, although the chunk may be 12 KiB: then it shows less than it could.
    return whole & ~(layer.chunk - _SECTOR) if layer.level == "raid0" else whole


def _copies(layout: str) -> tuple[int, int]:
    """Return how many near and how many far copies a RAID 10 keeps."""
    count = int(layout[1:]) if layout[1:].isdigit() else 1
    return (count, 1) if layout[:1] == "n" else (1, count)


def data_gain(metadata: str, before: int, after: int) -> int:
    """Return by how many bytes the room for data changes in a member of `before` bytes that gets `after`.

    A superblock at the end has an aligned place.
    """
    end = _ENDS.get(metadata, _SECTOR)
    return align_down(after, end) - align_down(before, end)


def extensible_devices(layer: MdArray) -> tuple[SpaceId, ...]:
    """Return the array: it is made anew, and so can have another size at any level."""
    return (layer.device,)


def least_space(layer: MdArray, space: SpaceId, size: int, needs: Mapping[SpaceId, int]) -> int:
    """Return what a member needs: its share of what the array needs, and what lies around its data."""
    member = next(each for each in layer.members if each.space == space)
    around = size - member.data_size
    return align_up(around + _least_data(layer, member, needs[layer.device]), _ENDS.get(layer.metadata, _SECTOR))


def _least_data(layer: MdArray, member: ArrayMember, need: int) -> int:
    """Return the room for data that a member needs for an array of `need` bytes."""
    if layer.level in STRIPED:
        total = sum(each.data_size for each in layer.members if each.slot >= 0)
        return align_up(-(-need * member.data_size // total), layer.chunk or _SECTOR)
    if layer.level == "raid1":
        return align_up(need, _GRANULE)
    if layer.level == "raid10":
        near, far = _copies(layer.layout)
        return -(-(-(-need // layer.chunk) * near) // layer.slots) * far * layer.chunk
    return align_up(-(-need // (layer.slots - _PARITY[layer.level])), layer.chunk)


def plan_container(
    layer: MdArray, gains: Mapping[SpaceId, int], wish: SpaceId, needs: Mapping[SpaceId, int]
) -> MdArray:
    """Return the array on members of other sizes: as large as its smallest member allows.

    `gains` are those of their room for data (`data_gain`). Raises BadStructureError if it does not fit.
    """
    members = tuple(
        msgspec.structs.replace(each, data_size=each.data_size + gains[each.space]) if each.space else each
        for each in layer.members
    )
    there = [each for each in members if each.space]
    if layer.metadata == "0.90" and any(each.data_size >= _MOST_0 - _GRANULE for each in there):
        raise BadStructureError(f"the array {layer.device} has metadata 0.90, which take members of less than 4 TiB")
    component = 0 if layer.level in STRIPED else _plan_component(layer, min(each.data_size for each in there))
    fitted = msgspec.structs.replace(layer, members=members, component_size=component)
    size = array_size(fitted)
    if min(each.data_size for each in there) <= 0 or size <= 0:
        raise BadStructureError(f"the array {layer.device} does not fit onto members of that size")
    return msgspec.structs.replace(fitted, size=size)


def _plan_component(layer: MdArray, room: int) -> int:
    """Return how many bytes of each member hold data, if the smallest one has `room` for them.

    What was left free before, for a bitmap at the end or by `mdadm --size`, stays free where there is more room.
    """
    granule = layer.chunk or _GRANULE
    before = min(each.data_size for each in layer.members if each.space)
    if room < layer.component_size:
        return align_down(room, granule)
    return layer.component_size + max(align_down(room - before, granule), 0)
