"""Keys that open encrypted containers: what an administrator gave us, and for which container."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from remetal.layout.model import SpaceId


@dataclass(frozen=True, slots=True)
class Key:
    """A passphrase, the content of a key file, or the volume key itself; for one container, or for any ("")."""

    data: bytes = field(repr=False)
    space: SpaceId = ""
    is_volume_key: bool = False


def keys_for(space: SpaceId, keys: Sequence[Key]) -> Iterator[Key]:
    """Yield the keys to try on the container that stands on a space: its own first."""
    yield from (key for key in keys if key.space == space)
    yield from (key for key in keys if not key.space and not key.is_volume_key)
