"""What tells what is in use, kept in the kernel's memory, so that a large file system is not held while a disk seeks.

The page cache of a disk knows nothing of what a mounted file system writes beside it. But who follows all writes knows
which of its pages are stale, and need drop only those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress

from remetal.errors import RemetalError
from remetal.image.extents import probe_used
from remetal.system.blockdev import Span, drop_cache
from remetal.units import MIB

_SCATTERED = frozenset({"ext2", "ext3", "ext4", "xfs"})
"""The file systems whose maps of what is used lie all over the disk."""

_PIECE = 2 * MIB
"""The kernel keeps pages in groups of up to so many bytes, and drops a group that is named as a whole."""


class CachedMaps:
    """What the kernel has in memory of volumes, by name, and where it is stale."""

    def __init__(self, volumes: Mapping[str, tuple[Span, str]]) -> None:
        """Take the span and the kind of each, as blkid names it."""
        self._volumes = volumes
        self._stale: dict[str, set[int]] = defaultdict(set)

    def fill(self) -> None:
        """Have all maps read that lie scattered. They need not be right: the file systems are in use."""
        for span, kind in self._volumes.values():
            if kind in _SCATTERED:
                with suppress(RemetalError):
                    probe_used(span, kind, frozen=True)

    def note(self, written: Mapping[str, Collection[int]], grain: int) -> None:
        """Note which blocks of `grain` bytes of each volume were written."""
        for name, blocks in written.items():
            start = self._volumes[name][0].start
            for block in blocks:
                first, last = start + block * grain, start + (block + 1) * grain - 1
                self._stale[name].update(range(first // _PIECE, last // _PIECE + 1))

    def drop_stale(self, name: str) -> None:
        """Drop from memory what was written since it was read. Raises RefusedError if the disk is gone."""
        pieces = sorted(self._stale.pop(name, ()))
        drop_cache(self._volumes[name][0].path, ((piece * _PIECE, _PIECE) for piece in pieces))
