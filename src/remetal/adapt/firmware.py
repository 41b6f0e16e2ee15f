"""What the firmware sees of a restored machine: disks and their partitions, and nothing of what stands on them. Pure.

A mirror whose metadata stand at its members' ends shows its content on each of them: so an EFI system partition, or a
whole disk with its partition table, can lie on an array, and the firmware still finds it on every member.
"""

from __future__ import annotations

from remetal.layout.model import Layout, MdArray, SpaceId


def find_boot_device(layout: Layout, disk: SpaceId) -> SpaceId:
    """Return the device whose content the firmware takes for that of a disk: the disk, or a mirror of whole disks."""
    array = layout.layer_on(disk)
    return array.device if isinstance(array, MdArray) and disk in _plain_members(array) else disk


def find_partitions(layout: Layout, space: SpaceId) -> tuple[SpaceId, ...]:
    """Return the partitions that hold what stands on a space as the firmware sees it; one for each disk.

    Nothing for what only an operating system can reach, and for what lies in no partition.
    """
    device = layout.place(space)[0].name
    array = layout.provider_of(device)
    members = _plain_members(array) if isinstance(array, MdArray) else ()
    if device == space:
        return tuple(found for member in members for found in find_partitions(layout, member))
    if array is None or any(layout.provider_of(member) is None and _is_device(layout, member) for member in members):
        return (space,)
    return ()


def _plain_members(array: MdArray) -> tuple[SpaceId, ...]:
    """Return the members whose bytes are the array's own, from the first one on."""
    if array.level != "raid1":
        return ()
    return tuple(each.space for each in array.members if each.space and each.slot >= 0 and not each.data_offset)


def _is_device(layout: Layout, space: SpaceId) -> bool:
    return layout.place(space)[0].name == space
