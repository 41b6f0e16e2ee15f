"""Editing the metadata of a volume group, so that the same group is made on other disks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from remetal.layout.model import PhysicalVolume, SpaceId
from remetal.ondisk import lvm as ondisk
from remetal.ondisk.lvm_config import Entry, Section, find_entry, replace_entry

Stretch: TypeAlias = tuple[str, int, int]
"""A physical volume's name, its first extent, and the number of extents."""


def joined(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Return the stretches with those joined that follow one another."""
    found: list[Stretch] = []
    for name, first, count in stretches:
        if found and found[-1][0] == name and found[-1][1] + found[-1][2] == first:
            found[-1] = (name, found[-1][1], found[-1][2] + count)
        else:
            found.append((name, first, count))
    return found


def with_members(group: ondisk.VolumeGroup, members: Sequence[PhysicalVolume], gains: Mapping[SpaceId, int]) -> Section:
    """Return the metadata with these physical volumes and no others, in their new sizes."""
    place = (group.name, "physical_volumes")
    section = find_entry(group.config, *place)
    assert isinstance(section, Section)
    kept = {each.name for each in members}
    config = replace_entry(
        group.config, place, Section(tuple((name, entry) for name, entry in section.entries if name in kept))
    )
    for each in members:
        size = find_entry(config, *place, each.name, "dev_size")
        config = replace_entry(config, (*place, each.name, "pe_count"), each.extents)
        if isinstance(size, int):
            config = replace_entry(config, (*place, each.name, "dev_size"), max(size + gains[each.space] // 512, 0))
    return config


def with_stretches(config: Section, group: ondisk.VolumeGroup, name: str, stretches: Sequence[Stretch]) -> Section:
    """Return the metadata with a linear volume made of these stretches."""
    start, segments = 0, []
    for pv, first, count in stretches:
        segments.append(
            Section(
                (
                    ("start_extent", start),
                    ("extent_count", count),
                    ("type", "striped"),
                    ("stripe_count", 1),
                    ("stripes", (pv, first)),
                )
            )
        )
        start += count
    return with_segments(config, group, name, segments)


def with_segments(config: Section, group: ondisk.VolumeGroup, name: str, segments: Sequence[Section]) -> Section:
    """Return the metadata with a volume made of these segments."""
    place = (group.name, "logical_volumes", name)
    volume = find_entry(config, *place)
    assert isinstance(volume, Section)
    kept = tuple((key, entry) for key, entry in volume.entries if not key.startswith("segment"))
    numbered: list[tuple[str, Entry]] = [(f"segment{number}", each) for number, each in enumerate(segments, 1)]
    return replace_entry(config, place, Section((*kept, ("segment_count", len(segments)), *numbered)))


def edited(segment: ondisk.Segment, **entries: Entry) -> Section:
    """Return a segment with some of its entries replaced."""
    return Section(tuple({**dict(segment.config.entries), **entries}.items()))
