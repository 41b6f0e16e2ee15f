"""The contract that every store keeps.

A store holds immutable objects under names such as `packs/3f/3fa9…`: lower-case ASCII words of
`[a-z0-9._-]`, separated by `/`, never starting with a dot. Objects are created once and never changed; a
reader sees a whole object or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from remetal.errors import DamagedError, RemetalError, UsageError

_VOLATILE = "locks/"
_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]{0,199}(?:/[a-z0-9_-][a-z0-9._-]{0,199}){0,7}")


class NotFoundError(RemetalError):
    """The store has no object of that name."""


class AlreadyExistsError(RemetalError):
    """An object of that name is there already; it was left as it is."""


class UnreadableError(DamagedError):
    """The store has the object and cannot read it, though it reads others; trying again is of no use."""


class RetainedError(RemetalError):
    """The store keeps the object for some time yet, whoever asks; nothing else is wrong."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An object's name and its size in bytes."""

    name: str
    size: int


def is_name(name: str) -> bool:
    """Whether a name keeps the contract: up to 8 words of up to 200 of `[a-z0-9._-]`, none starting with a dot."""
    return _NAME.fullmatch(name) is not None


def is_volatile(name: str) -> bool:
    """Whether objects of this name come and go; all others stay what they are until they are deleted for good."""
    return name.startswith(_VOLATILE)


def check_name(name: str) -> None:
    """Raise UsageError for a name that no store may be asked for; nothing like `../x` gets past this."""
    if not is_name(name):
        raise UsageError(f"{name!r} is not a name that an object can have")


Pieces = Sequence[bytes | memoryview]
"""An object's bytes in order, in as many pieces as is convenient: nobody joins them just to write them."""


@runtime_checkable
class Store(Protocol):
    """A place that keeps objects. All methods may be called from many threads at once.

    Every method raises UnavailableError if the place cannot be reached or is full; the object is then either
    whole or absent, and the same call may be tried again. `put`, `get` and `delete` raise UsageError for a name
    that breaks the contract (`check_name`).
    """

    @property
    def location(self) -> str:
        """How a person names this place, as given to `--repo`, without credentials."""

    def put(self, name: str, data: Pieces) -> None:
        """Create an object. When this returns, the object survives a power cut.

        The pieces are only read, and not kept after the call. Raises AlreadyExistsError if the name is
        taken, even when two callers race for it: exactly one wins.
        """

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return `size` bytes of an object from byte `start`; to its end if `size` is None.

        A range that reaches behind the end returns what there is. Raises NotFoundError, and UnreadableError if some
        of these bytes cannot be read.
        """

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield every object whose name starts with `prefix` (a folder: `packs/`), in the order of names.

        The order is that of the names' bytes. What is put or deleted meanwhile may or may not be among them;
        everything else in the place that no `put` has made is passed over.
        """

    def delete(self, name: str) -> None:
        """Remove an object; removing one that is not there is no error.

        Raises RetainedError if the store protects it for some time.
        """

    def keep(self, names: Iterable[str]) -> int:
        """Protect objects from deletion for as long as the store protects new ones; return for how many that was due.

        A store that protects nothing does nothing.
        """

    def close(self) -> None:
        """Let go of connections and handles; further calls are a mistake of the caller."""
