"""The devices of a layout while its containers are open: where a space's bytes are right now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from remetal.layout.keys import Key
from remetal.layout.layers import container_kind
from remetal.layout.model import Container, Layout, SpaceId, spaces_of
from remetal.system.blockdev import Span


def span_of(space: SpaceId, layout: Layout, devices: Mapping[SpaceId, Path]) -> Span:
    """Return the bytes of a space; `devices` are the paths of disks and of opened devices, by name.

    Raises KeyError if there is no such space, or its container is not open.
    """
    device, start, size = layout.place(space)
    return Span(devices[device.name], start, size)


def members_of(container: Container, layout: Layout, devices: Mapping[SpaceId, Path]) -> dict[SpaceId, Span]:
    """Return the bytes of all spaces that a container stands on."""
    return {space: span_of(space, layout, devices) for space in spaces_of(container)}


def open_container(
    container: Container,
    layout: Layout,
    devices: Mapping[SpaceId, Path],
    *,
    keys: Sequence[Key] = (),
    writable: bool = False,
) -> AbstractContextManager[Mapping[SpaceId, Path]]:
    """Open a container for the length of a block and yield the paths of its devices. Raises CannotOpenError."""
    kind = container_kind(container)
    return kind.open_container(container, members_of(container, layout, devices), keys, writable=writable)
