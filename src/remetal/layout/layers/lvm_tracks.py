"""Volumes that lie on several physical volumes side by side: stripes, mirrors, RAID. How they grow and shrink. Pure.

Each of their tracks, which is a stripe or an image of a RAID, stays on its physical volume and gets longer or shorter
by as many extents as all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remetal.layout.layers.lvm_text import Stretch, edited, joined, with_segments, with_stretches
from remetal.ondisk import lvm as ondisk
from remetal.ondisk.lvm_config import Section, find_entry

_MOST_REGIONS = 1 << 21
"""What the kernel keeps in the bitmap of a RAID (drivers/md/dm-raid.c)."""


@dataclass(frozen=True, slots=True)
class Tracks:
    """The physical volumes of a volume's tracks, and the hidden volumes that they belong to (none of plain stripes).

    `data` of them hold the volume's own bytes: it has so many times the extents of each track.
    """

    volume: ondisk.LogicalVolume
    places: tuple[str, ...]
    images: tuple[str, ...]
    data: int


def find_tracks(group: ondisk.VolumeGroup, volume: ondisk.LogicalVolume) -> Tracks | None:
    """Return the tracks of a volume; None if it has none, or is put together in a way that is to be left alone."""
    pvs = {pv.id for pv in group.pvs}
    (segment, *more) = volume.segments
    names = tuple(name for name, _ in segment.stripes)
    if more or len(names) < 2:
        return None
    if segment.type == "striped":
        return Tracks(volume, names, (), len(names)) if pvs.issuperset(names) else None
    data = _count_data(segment)
    images = [ondisk.find_volume(group, name) for name in names]
    places = [_find_place(image, pvs) for image in images if image is not None]
    if not data or len(places) < len(names) or not all(places):
        return None
    return Tracks(volume, tuple(places), names, data)


def _count_data(segment: ondisk.Segment) -> int:
    """Return how many images' worth of data a mirror or a RAID holds; 0 for what is not known."""
    count = len(segment.stripes)
    match segment.type[:5], segment.type:
        case _, "mirror" | "raid1":
            return 1
        case _, "raid0" | "raid0_meta":
            return count
        case _, "raid10" | "raid10_near":
            copies = find_entry(segment.config, "data_copies")
            return count // 2 if copies in {None, 2} and count % 2 == 0 else 0
        case "raid4" | "raid5", _:
            return count - 1
        case "raid6", _:
            return count - 2
        case _:
            return 0


def _find_place(image: ondisk.LogicalVolume, pvs: set[str]) -> str:
    """Return the physical volume that an image lies on; empty if it is not on one alone."""
    names = {name for each in image.segments for name, _ in each.stripes}
    plain = all(each.type == "striped" and len(each.stripes) == 1 for each in image.segments)
    return names.pop() if plain and len(names) == 1 and names <= pvs else ""


def find_growth(group: ondisk.VolumeGroup, tracks: Tracks, gained: Sequence[Stretch]) -> int:
    """Return by how many extents each track gets longer if the volume takes what is gained."""
    there = {name: count for name, _, count in gained}
    most = min(there.get(place, 0) // tracks.places.count(place) for place in tracks.places)
    region = tracks.volume.segments[0].region_size
    if tracks.images and region:
        now = tracks.volume.extents // tracks.data
        most = min(most, max(region * _MOST_REGIONS // group.extent_size - now, 0))
    return most


def with_growth(
    config: Section, group: ondisk.VolumeGroup, tracks: Tracks, gained: Sequence[Stretch], growth: int
) -> Section:
    """Return the metadata with each track longer by `growth` extents, which are the first of what is gained."""
    volume, free = tracks.volume, {name: first for name, first, _ in gained}
    added: list[Stretch] = []
    for place in tracks.places:
        added.append((place, free[place], growth))
        free[place] += growth
    (segment,) = volume.segments
    if not tracks.images:
        more = edited(
            segment,
            start_extent=volume.extents,
            extent_count=growth * tracks.data,
            stripes=tuple(word for name, first, _ in added for word in (name, first)),
        )
        return with_segments(config, group, volume.name, [segment.config, more])
    for name, stretch in zip(tracks.images, added, strict=True):
        image = ondisk.find_volume(group, name)
        assert image is not None
        own = [(*each.stripes[0], each.extents) for each in image.segments]
        config = with_stretches(config, group, name, joined([*own, stretch]))
    longer = edited(segment, extent_count=volume.extents + growth * tracks.data)
    return with_segments(config, group, volume.name, [longer])
