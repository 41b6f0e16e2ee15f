"""Which extents of which physical volumes a volume group's volumes take on other disks. Pure.

A group is carried by its own metadata. As long as no physical volume loses extents that are in use, everything stays in
its place, and one volume may take what is gained. Otherwise linear volumes are packed anew, one behind the other, and
may become smaller; where others are among them, all stay on their physical volumes (see `lvm_pressed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import msgspec.structs

from remetal.layout.layers.lvm_pressed import least_extents, with_less
from remetal.layout.layers.lvm_text import Stretch, joined, with_members, with_stretches
from remetal.layout.layers.lvm_tracks import find_growth, find_tracks, with_growth
from remetal.layout.model import LogicalVolume, PhysicalVolume, SpaceId, VolumeGroup
from remetal.ondisk import lvm as ondisk
from remetal.ondisk.lvm_config import Section, format_config
from remetal.ondisk.regions import BadStructureError
from remetal.units import MIB, format_bytes

MAX_METADATA = MIB
"""Characters. What `pvcreate` sets aside for the metadata holds them twice, and so about half of this."""

_parse = lru_cache(maxsize=8)(ondisk.parse_volume_group)


def find_disagreement(layer: VolumeGroup) -> str:
    """Return in what the metadata of a group are not those of its record, in a few words; nothing if they agree.

    From the metadata the group is made, and by the record it is planned: what is planned must be what is made.
    """
    if len(layer.metadata) > MAX_METADATA:
        return "they are larger than any"
    try:
        group = _parse(layer.metadata)
    except BadStructureError as error:
        return error.message
    if (group.name, group.uuid, group.extent_size) != (layer.name, layer.uuid, layer.extent_size):
        return "they are of another group"
    if "EXPORTED" in group.status or group.lock_type not in {"", "none"}:
        return "it is exported, or shared by machines"
    noted = sorted((each.name, each.uuid, each.data_start, each.extents) for each in layer.members)
    if noted != sorted((each.id, each.uuid, each.data_start, each.extents) for each in group.pvs):
        return "they tell of other physical volumes"
    shown = sorted((each.name, each.uuid, ondisk.volume_size(group, each.name)) for each in _visible(group))
    if shown != sorted((each.name, each.uuid, each.size) for each in layer.volumes):
        return "they tell of other logical volumes"
    kinds = {each.name: each for each in _visible(group)}
    for volume in layer.volumes:
        first = kinds[volume.name].segments[0]
        if volume.kind == "linear" and not _is_linear(group, kinds[volume.name]):
            return f"{volume.name} is not linear"
        if volume.pool not in {"", first.pool} or volume.origin not in {"", first.origin}:
            return f"{volume.name} has another pool or origin"
    return "two of its volumes share extents" if _find_shared(group) else ""


def _visible(group: ondisk.VolumeGroup) -> tuple[ondisk.LogicalVolume, ...]:
    return ondisk.visible_volumes(group)


def _is_linear(group: ondisk.VolumeGroup, volume: ondisk.LogicalVolume) -> bool:
    """Whether a volume is nothing but stretches of physical volumes, one behind the other."""
    pvs = {pv.id for pv in group.pvs}
    return all(
        each.type in {"striped", "linear"} and len(each.stripes) == 1 and each.stripes[0][0] in pvs
        for each in volume.segments
    )


def _stretches(group: ondisk.VolumeGroup) -> Iterator[Stretch]:
    """Yield what lies on physical volumes, of all volumes, hidden ones too."""
    names = {pv.id for pv in group.pvs}
    for volume in group.lvs:
        for segment in volume.segments:
            share = len(segment.stripes) if segment.type == "striped" else 1
            for name, first in segment.stripes:
                if name in names:
                    yield name, first, segment.extents // max(share, 1)


def _find_shared(group: ondisk.VolumeGroup) -> bool:
    """Whether two volumes lay claim to one extent."""
    ends: dict[str, int] = {}
    for name, first, count in sorted(_stretches(group)):
        if first < ends.get(name, 0):
            return True
        ends[name] = first + count
    return False


def extensible_devices(layer: VolumeGroup) -> tuple[SpaceId, ...]:
    """Return the volumes that can take extents, the largest first.

    A linear volume takes them wherever they are, one with several tracks where each of these can have as many.
    """
    able = _resizable(layer, _parse(layer.metadata))
    return tuple(f"{layer.name}/{each.name}" for each in sorted(able, key=lambda each: (-each.size, each.name)))


def _resizable(layer: VolumeGroup, group: ondisk.VolumeGroup) -> list[LogicalVolume]:
    """Return the volumes that may become larger or smaller: linear ones, and those with tracks."""
    return [
        each for each in layer.volumes if each.captured and (each.kind == "linear" or _has_tracks(group, each.name))
    ]


def _has_tracks(group: ondisk.VolumeGroup, name: str) -> bool:
    volume = ondisk.find_volume(group, name)
    return volume is not None and find_tracks(group, volume) is not None


def least_space(layer: VolumeGroup, space: SpaceId, size: int, needs: Mapping[SpaceId, int]) -> int:
    """Return what a physical volume needs: what is in use there, or what the volumes need if they can be packed.

    What lies around its extents, such as a second copy of the metadata, is needed as well.
    """
    member = next(each for each in layer.members if each.space == space)
    group = _parse(layer.metadata)
    used = _used_extents(group).get(member.name, 0)
    spare = _spare_extents(layer, group, needs)
    if len(layer.members) == 1 and _is_packable(group):
        used = min(used, sum(each.extents - spare[each.name] for each in group.lvs))
    elif not _is_packable(group):
        used = min(used, least_extents(group, member.name, spare))
    return size - (member.extents - used) * layer.extent_size


def plan_container(
    layer: VolumeGroup, gains: Mapping[SpaceId, int], wish: SpaceId, needs: Mapping[SpaceId, int]
) -> VolumeGroup:
    """Return the group on other physical volumes; the volume `wish` takes all extents that are gained.

    `needs` are the bytes that each volume needs at least. Raises BadStructureError if they do not fit.
    """
    group = _parse(layer.metadata)
    members = tuple(
        msgspec.structs.replace(each, extents=each.extents + gains[each.space] // layer.extent_size)
        for each in layer.members
    )
    small = next((each for each in members if each.extents < 0), None)
    if small is not None:
        raise BadStructureError(f"the physical volume of {layer.name} on {small.space} has no room for its metadata")
    config = with_members(group, members, gains)
    used = _used_extents(group)
    there = {each.name: each.extents for each in members}
    if all(there.get(name, 0) >= count for name, count in used.items()):
        gained = [
            (new.name, old.extents, new.extents - old.extents)
            for old, new in zip(layer.members, members, strict=True)
            if new.extents > old.extents
        ]
        sizes, config = _extended(config, layer, group, wish, gained)
    else:
        sizes, config = _smaller(config, layer, group, members, needs)
    volumes = tuple(msgspec.structs.replace(each, size=sizes.get(each.name, each.size)) for each in layer.volumes)
    return msgspec.structs.replace(layer, members=members, volumes=volumes, metadata=format_config(config))


def _used_extents(group: ondisk.VolumeGroup) -> dict[str, int]:
    """Return the first extent behind all that is in use, by the physical volume's name; nothing for unused ones."""
    used: dict[str, int] = {}
    for name, first, count in _stretches(group):
        used[name] = max(used.get(name, 0), first + count)
    return used


def _is_packable(group: ondisk.VolumeGroup) -> bool:
    return all(_is_linear(group, volume) for volume in group.lvs)


def _spare_extents(layer: VolumeGroup, group: ondisk.VolumeGroup, needs: Mapping[str, int]) -> dict[str, int]:
    """Return the extents that each volume can do without, by name; hidden ones, pools and the like cannot."""
    spare = dict.fromkeys((each.name for each in group.lvs), 0)
    for volume in _resizable(layer, group):
        need = min(needs.get(f"{layer.name}/{volume.name}", volume.size), volume.size)
        spare[volume.name] = volume.size // layer.extent_size - max(-(-need // layer.extent_size), 1)
    return spare


def _extended(
    config: Section, layer: VolumeGroup, group: ondisk.VolumeGroup, wish: SpaceId, gained: Sequence[Stretch]
) -> tuple[dict[str, int], Section]:
    """Return the new size of the volume that takes what is gained, if there is one, and the metadata with it."""
    name = wish.removeprefix(f"{layer.name}/")
    volume = ondisk.find_volume(group, name) if wish else None
    if volume is None or not gained:
        return {}, config
    tracks = find_tracks(group, volume)
    if tracks is not None:
        growth = find_growth(group, tracks, gained)
        if not growth:
            return {}, config
        more = growth * tracks.data
        config = with_growth(config, group, tracks, gained, growth)
    else:
        own = [(*segment.stripes[0], segment.extents) for segment in volume.segments]
        more = sum(count for _, _, count in gained)
        config = with_stretches(config, group, name, joined([*own, *gained]))
    return {name: volume.size + more * layer.extent_size}, config


def _smaller(
    config: Section,
    layer: VolumeGroup,
    group: ondisk.VolumeGroup,
    members: Sequence[PhysicalVolume],
    needs: Mapping[str, int],
) -> tuple[dict[str, int], Section]:
    """Return the sizes of all volumes, and the metadata with them, where a physical volume loses what is in use."""
    if _is_packable(group):
        return _packed(config, layer, group, members, needs)
    there = {each.name: each.extents for each in members}
    if {pv.id for pv in group.pvs} - set(there):
        raise BadStructureError(
            f"the volume group {layer.name} has volumes that are not linear, and so needs all of its physical volumes"
        )
    counts, config = with_less(config, group, there, _spare_extents(layer, group, needs))
    return {each.name: counts[each.name] * layer.extent_size for each in layer.volumes if each.name in counts}, config


def _packed(
    config: Section,
    layer: VolumeGroup,
    group: ondisk.VolumeGroup,
    members: Sequence[PhysicalVolume],
    needs: Mapping[SpaceId, int],
) -> tuple[dict[str, int], Section]:
    """Return the sizes of all volumes, and the metadata with them packed one behind the other."""
    there = sum(each.extents for each in members)
    counts = {each.name: each.extents for each in group.lvs}
    spare = _spare_extents(layer, group, needs)
    short = sum(counts.values()) - there
    if short > sum(spare.values()):
        lack = (short - sum(spare.values())) * layer.extent_size
        raise BadStructureError(
            f"the volume group {layer.name} does not fit: it lacks {format_bytes(lack)} ({lack} bytes)"
        )
    for name in sorted(spare, key=lambda name: (-spare[name], name)):
        given = min(max(short, 0), spare[name])
        counts[name] -= given
        short -= given
    free = _free_extents(members)
    for name, count in counts.items():
        config = with_stretches(config, group, name, list(_take(free, count)))
    return {name: count * layer.extent_size for name, count in counts.items()}, config


def _free_extents(members: Sequence[PhysicalVolume]) -> list[Stretch]:
    """Return all extents, the last stretch first, for `_take` to take from the end of the list."""
    return [(each.name, 0, each.extents) for each in reversed(members) if each.extents > 0]


def _take(free: list[Stretch], count: int) -> Iterator[Stretch]:
    """Yield stretches of `count` extents in all, and take them away from what is free."""
    while count > 0:
        name, first, there = free.pop()
        taken = min(there, count)
        if taken < there:
            free.append((name, first + taken, there - taken))
        count -= taken
        yield name, first, taken
