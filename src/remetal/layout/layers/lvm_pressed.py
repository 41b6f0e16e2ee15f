"""Making a volume group smaller where not all of its volumes are linear. Pure.

Every piece of a volume stays on its physical volume. Where one of these lacks extents, the volumes on it give up what
their content does not need, those with several tracks on all of them alike; then the pieces close up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from remetal.layout.layers.lvm_text import edited, with_segments
from remetal.layout.layers.lvm_tracks import Tracks, find_tracks
from remetal.ondisk import lvm as ondisk
from remetal.ondisk.lvm_config import Section
from remetal.ondisk.regions import BadStructureError
from remetal.units import format_bytes


@dataclass(frozen=True, slots=True)
class _Piece:
    """One stripe of a segment of a volume, on a physical volume."""

    volume: str
    segment: int
    stripe: int
    place: str
    first: int
    count: int


def with_less(
    config: Section, group: ondisk.VolumeGroup, there: Mapping[str, int], spare: Mapping[str, int]
) -> tuple[dict[str, int], Section]:
    """Return the extents of all volumes that lie on these physical volumes, and the metadata with them closed up.

    `there` are the extents of each physical volume, `spare` those that each volume can do without. Raises
    BadStructureError if that is not enough.
    """
    pieces = sorted(_pieces(group), key=lambda each: (each.place, each.first))
    taken = _Taking(group, pieces, there, spare).take()
    firsts: dict[_Piece, int] = {}
    ends: Counter[str] = Counter()
    for each in pieces:
        firsts[each] = ends[each.place]
        ends[each.place] += each.count - taken[each]
    sizes: dict[str, int] = {}
    for volume in group.lvs:
        own = [each for each in pieces if each.volume == volume.name]
        if own:
            segments, sizes[volume.name] = _segments(volume, own, firsts, taken)
            config = with_segments(config, group, volume.name, segments)
    for volume in group.lvs:
        tracks = find_tracks(group, volume)
        if tracks is not None and tracks.images:
            sizes[volume.name] = sizes[tracks.images[0]] * tracks.data
            whole = edited(volume.segments[0], extent_count=sizes[volume.name])
            config = with_segments(config, group, volume.name, [whole])
    return sizes, config


def least_extents(group: ondisk.VolumeGroup, place: str, spare: Mapping[str, int]) -> int:
    """Return how many extents a physical volume needs at least, if the others get smaller as it does."""
    spared = 0
    for volume in group.lvs:
        tracks = find_tracks(group, volume)
        own = sum(each.count for each in _pieces(group) if (each.volume, each.place) == (volume.name, place))
        if tracks is not None:
            spared += spare[volume.name] // tracks.data * tracks.places.count(place)
        elif own:
            spared += spare[volume.name] * own // volume.extents
    return sum(each.count for each in _pieces(group) if each.place == place) - spared


def _pieces(group: ondisk.VolumeGroup) -> Iterator[_Piece]:
    pvs = {pv.id for pv in group.pvs}
    for volume in group.lvs:
        for number, segment in enumerate(volume.segments):
            for stripe, (name, first) in enumerate(segment.stripes):
                if name in pvs:
                    yield _Piece(volume.name, number, stripe, name, first, segment.extents // len(segment.stripes))


def _segments(
    volume: ondisk.LogicalVolume, own: Sequence[_Piece], firsts: Mapping[_Piece, int], taken: Mapping[_Piece, int]
) -> tuple[list[Section], int]:
    """Return what is left of a volume's segments, and its extents."""
    segments, start = [], 0
    for number, segment in enumerate(volume.segments):
        stripes = sorted((each for each in own if each.segment == number), key=lambda each: each.stripe)
        count = stripes[0].count - taken[stripes[0]]
        if count:
            places = tuple(word for each in stripes for word in (each.place, firsts[each]))
            whole = count * len(stripes)
            segments.append(edited(segment, start_extent=start, extent_count=whole, stripes=places))
            start += whole
    return segments, start


class _Taking:
    """Decides how many extents each piece gives up."""

    def __init__(
        self,
        group: ondisk.VolumeGroup,
        pieces: Sequence[_Piece],
        there: Mapping[str, int],
        spare: Mapping[str, int],
    ) -> None:
        self.group = group
        self.pieces = pieces
        self.spare = dict(spare)
        self.tracks = {each.name: find_tracks(group, each) for each in group.lvs}
        self.taken: Counter[_Piece] = Counter()
        self.lack: Counter[str] = Counter()
        for each in pieces:
            self.lack[each.place] += each.count
        self.lack.subtract(there)

    def take(self) -> Counter[_Piece]:
        """Take from those who can give most, until nothing is lacking. Raises BadStructureError if that cannot be."""
        for place in sorted(self.lack):
            for name in sorted(self.spare, key=lambda name: (-self.spare[name], name)):
                tracks = self.tracks[name]
                if self.lack[place] > 0 and tracks is None:
                    self._shorten([each for each in self.pieces if (each.volume, each.place) == (name, place)], place)
                elif self.lack[place] > 0 and tracks is not None and place in tracks.places:
                    self._shorten_all(tracks, place)
            if self.lack[place] > 0:
                size = self.lack[place] * self.group.extent_size
                raise BadStructureError(
                    f"the volume group {self.group.name} does not fit: its physical volume {place} lacks "
                    f"{format_bytes(size)} ({size} bytes)"
                )
        return self.taken

    def _shorten(self, own: Sequence[_Piece], place: str) -> None:
        """Take from the pieces of a linear volume on this physical volume."""
        if own:
            count = min(self.lack[place], self.spare[own[0].volume], sum(each.count for each in own))
            self.spare[own[0].volume] -= count
            self._cut(own, count)

    def _shorten_all(self, tracks: Tracks, place: str) -> None:
        """Take as much from each track as this physical volume lacks."""
        name = tracks.volume.name
        count = min(-(-self.lack[place] // tracks.places.count(place)), self.spare[name] // tracks.data)
        self.spare[name] -= count * tracks.data
        for index, image in enumerate(tracks.images or (name,) * len(tracks.places)):
            track = [each for each in self.pieces if each.volume == image and (tracks.images or each.stripe == index)]
            self._cut(track, count)

    def _cut(self, own: Sequence[_Piece], count: int) -> None:
        """Take from the last pieces first."""
        for each in sorted(own, key=lambda each: -each.segment):
            given = min(each.count, count)
            self.taken[each] += given
            self.lack[each.place] -= given
            count -= given
