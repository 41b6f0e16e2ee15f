"""What every layer's file provides. One file is one layer; the table in `layers/__init__.py` registers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from remetal.layout.model import FileSystem, SpaceId, Table, Volume
from remetal.ondisk.regions import Read
from remetal.system.blockdev import Span


@dataclass(frozen=True, slots=True)
class Content:
    """What a probe looks at: a space, its bytes, and what blkid says about it.

    `read` counts from the start of the space; `type` and `label` are empty where blkid found nothing.
    """

    space: SpaceId
    span: Span
    read: Read
    type: str = ""
    label: str = ""


class VolumeKind(Protocol):
    """A kind of volume that is more than unknown bytes."""

    TYPES: tuple[str, ...]
    """The types, as blkid names them."""

    def probe_volume(self, content: Content) -> Volume:
        """Describe the volume. Raises BadStructureError if it is damaged, or other than remetal can handle."""


class GrowingKind(VolumeKind, Protocol):
    """A file system that can take up a larger space."""

    def plan_growth(self, volume: FileSystem, space: int) -> int:
        """Return the size in bytes that it can grow to in a space of `space` bytes; its own if not at all."""

    def apply_growth(self, span: Span, size: int) -> int:
        """Let the file system on `span` grow to `size` bytes; return the bytes written.

        One that has that size already is left alone; a rest too small for an allocation group may stay unused.
        Raises ProgramFailedError if its own programs cannot;
        it then stands as it was restored.
        """

    PROGRAMS: tuple[str, ...]
    """The programs that growing needs."""


class TableKind(Protocol):
    """A kind of partition table."""

    NAME: str
    """As blkid names it."""

    def probe_table(self, read: Read, size: int, sector: int, on: SpaceId) -> tuple[Table, tuple[str, ...]] | None:
        """Return the table of a disk of `size` bytes and what is wrong with it, or None if there is none.

        Raises BadStructureError if there is one that cannot be trusted.
        """
