"""What every layer's file provides. One file is one layer; the table in `layers/__init__.py` registers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from remetal.errors import RemetalError
from remetal.layout.keys import Key
from remetal.layout.model import Container, FileSystem, Part, SpaceId, Table, Volume
from remetal.ondisk.regions import Read
from remetal.system.blockdev import Span

ContainerT = TypeVar("ContainerT", bound=Container)


@dataclass(frozen=True, slots=True)
class Content:
    """What a probe looks at: a space, its bytes, and what blkid says about it.

    `read` counts from the start of the space; `type`, `label` and `uuid` are empty where blkid found nothing.
    """

    space: SpaceId
    span: Span
    read: Read
    type: str = ""
    label: str = ""
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """What a kind makes of some of its members: the layer that they form, or the sentence why they form none.

    `complete` is False where the layer works without a member that may still turn up inside another one;
    `lacks_members` is True where there is no layer without them. `spaces` are the members that are accounted for.
    """

    spaces: tuple[SpaceId, ...]
    layer: Container | FileSystem | None = None
    complete: bool = True
    lacks_members: bool = False
    problem: str = ""
    hint: str = ""


class CannotOpenError(RemetalError):
    """A container that is whole cannot be opened here: no key opens it, or the kernel or its programs do not."""


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


class SpanningKind(Protocol):
    """A file system that may span several spaces; each of them has an image of its own."""

    PROGRAMS: tuple[str, ...]
    """The programs that growing needs."""

    def plan_growth(self, volume: FileSystem, rooms: Mapping[SpaceId, int]) -> FileSystem:
        """Return the file system as it will be when it has grown into these rooms, in bytes; itself if it cannot."""

    def plan_shrinking(self, volume: FileSystem, rooms: Mapping[SpaceId, int]) -> FileSystem | str:
        """Return the file system as it will be in these rooms, some of which are too small for it as it is.

        Or return the sentence why it cannot be.
        """

    def least_size(self, volume: FileSystem, part: Part) -> int:
        """Return the bytes that a space needs for one of its devices at least, if it shrinks."""

    def apply_growth(self, volume: FileSystem, spans: Mapping[SpaceId, Span]) -> int:
        """Let the file system on `spans` grow to what `volume` says; return the bytes written.

        Raises ProgramFailedError if its own programs cannot; it then stands as it was restored.
        """


class TableKind(Protocol):
    """A kind of partition table."""

    NAME: str
    """As blkid names it."""

    def probe_table(self, read: Read, size: int, sector: int, on: SpaceId) -> tuple[Table, tuple[str, ...]] | None:
        """Return the table of a device of `size` bytes and what is wrong with it, or None if there is none.

        Raises BadStructureError if there is one that cannot be trusted.
        """


class GroupKind(Protocol):
    """A layer that stands on one or several members, which are found one by one."""

    TYPES: tuple[str, ...]
    """What blkid calls a member."""

    def probe_groups(self, members: Sequence[Content]) -> list[Found]:
        """Say what the members form, each member in one Found. Reads their structures and opens nothing.

        A damaged member is a Found with a problem; nothing is raised for what stands on a disk.
        """


class ContainerKind(GroupKind, Protocol[ContainerT]):
    """A layer that provides devices once it is opened: an array, a volume group, an encrypted container."""

    PROGRAMS: tuple[str, ...]
    """The programs that opening and making it needs."""

    def open_container(
        self, layer: ContainerT, members: Mapping[SpaceId, Span], keys: Sequence[Key], *, writable: bool
    ) -> AbstractContextManager[Mapping[SpaceId, Path]]:
        """Open what stands on `members` and yield the paths of the devices that it provides, by their names.

        What the running system has open already is used as it is, and left open. Reading alone changes no byte of a
        member. Raises CannotOpenError.
        """

    def find_running(self, layer: ContainerT) -> tuple[Path, ...]:
        """Return the open devices of a container of this identity, whatever disks it is on.

        Empty for kinds of which several of one identity may be open beside each other.
        """

    def is_made(self, layer: ContainerT, members: Mapping[SpaceId, Span]) -> bool:
        """Whether this very container stands on its members, as it should be, so that it need only be opened."""

    def apply_container(self, layer: ContainerT, members: Mapping[SpaceId, Span]) -> int:
        """Make the container on its members, whatever is on them; return the bytes written.

        Raises ProgramFailedError if its programs cannot; running it again starts anew.
        """

    def extensible_devices(self, layer: ContainerT) -> tuple[SpaceId, ...]:
        """Return the devices that can get larger where the members do, the one that takes it first; pure."""

    def least_space(self, layer: ContainerT, space: SpaceId, size: int, needs: Mapping[SpaceId, int]) -> int:
        """Return how many bytes of a member, which has `size`, the container needs at least; pure.

        `needs` are the bytes that its devices need, by name.
        """

    def plan_container(
        self, layer: ContainerT, gains: Mapping[SpaceId, int], wish: SpaceId, needs: Mapping[SpaceId, int]
    ) -> ContainerT:
        """Return the container as it will be on members that are larger (or smaller) by `gains` bytes; pure.

        The device `wish` takes what a container of several devices gains ("": none does); `needs` are the bytes that
        its devices need at least, by name. Raises BadStructureError if it does not fit.
        """
