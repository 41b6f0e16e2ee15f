"""What was restored and where it stands: what all of adaptation works on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from remetal.layout.model import FileSystem, Layout, MdArray, SpaceId, spaces_of
from remetal.layout.opened import span_of
from remetal.system.blockdev import Span, flush_cache, probe_geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A restored machine whose devices are open.

    `source` is the layout as captured, `result` as it stands; `devices` are the paths of the disks and of what was
    opened on them, by name. `moved` says where the content of dissolved arrays stands, by the arrays' names. On the
    spaces in `kept` nothing was written, so nothing is looked into or changed there; for a disk itself that means its
    partition table and its boot code. Before anything is restored there are no devices, but files that show what will
    stand on a space: `shown`.
    """

    source: Layout
    result: Layout
    devices: Mapping[SpaceId, Path]
    moved: Mapping[SpaceId, SpaceId] = field(default_factory=dict)
    kept: frozenset[SpaceId] = frozenset()
    shown: Mapping[SpaceId, Path] = field(default_factory=dict)

    def file_systems(self) -> Iterator[FileSystem]:
        """Yield the file systems that were restored, in the order in which they lie."""
        for volume in self.result.volumes():
            if isinstance(volume, FileSystem) and self.is_restored(volume.on):
                yield volume

    def is_restored(self, space: SpaceId) -> bool:
        """Whether what stands on a space of the result was restored and can be reached."""
        layer = self.result.layer_on(space)
        spaces = (space,) if layer is None or isinstance(layer, MdArray) else spaces_of(layer)
        return not self.kept & set(spaces) and all(
            each in self.shown or self.result.place(each)[0].name in self.devices for each in spaces
        )

    def is_type(self, space: SpaceId, *types: str) -> bool:
        """Whether a file system of one of these types stands on a space of the result."""
        layer = self.result.layer_on(space)
        return isinstance(layer, FileSystem) and layer.type in types

    def span(self, space: SpaceId) -> Span:
        """Return the bytes of a space of the result."""
        if space in self.shown:
            return Span(self.shown[space], 0, probe_geometry(self.shown[space]).size)
        return span_of(space, self.result, self.devices)

    def now(self, space: SpaceId) -> SpaceId:
        """Return the space of the result that a captured one has become; it need not be there."""
        for old, new in self.moved.items():
            if space == old or space.startswith(f"{old}:"):
                return new + space.removeprefix(old)
        return space

    def before(self, space: SpaceId) -> SpaceId:
        """Return the captured space whose content stands on a space of the result."""
        for old, new in reversed(list(self.moved.items())):
            if space == new or space.startswith(f"{new}:"):
                return old + space.removeprefix(new)
        return space

    def flush(self) -> None:
        """Write back and drop what the kernel caches of all devices, those that stand on others first."""
        for path in reversed(list(self.devices.values())):
            flush_cache(path)
