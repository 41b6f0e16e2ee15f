"""A store that moves no more bytes a second than it may, in both directions together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from remetal.pace import Pace
from remetal.storage.store import Entry, Pieces, Store


class LimitedStore:
    """The store of `remetal.storage.store` over another one, at a pace."""

    def __init__(self, store: Store, pace: Pace) -> None:
        self._store = store
        self._pace = pace

    @property
    def location(self) -> str:
        """The location of the store below."""
        return self._store.location

    def put(self, name: str, data: Pieces) -> None:
        """Create an object; see the contract. What fails counts whole: nobody knows how much of it was moved."""
        self._pace.pay(sum(len(piece) for piece in data))
        self._store.put(name, data)

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return an object's bytes; see the contract."""
        data = self._store.get(name, start=start, size=size)
        self._pace.pay(len(data))
        return data

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield objects; see the contract."""
        return self._store.entries(prefix)

    def delete(self, name: str) -> None:
        """Remove an object; see the contract."""
        self._store.delete(name)

    def keep(self, names: Iterable[str]) -> int:
        """Protect objects; see the contract."""
        return self._store.keep(names)

    def close(self) -> None:
        """Close the store below."""
        self._store.close()
