"""A store that moves no more bytes a second than it may, in both directions together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from remetal.storage.store import Entry, Pieces, Store


class LimitedStore:
    """The store of `remetal.storage.store` over another one, at `rate` bytes a second at most, on the long run."""

    def __init__(
        self,
        store: Store,
        rate: float,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._rate = rate
        self._sleep = sleep
        self._clock = clock
        self._guard = threading.Lock()
        self._free_at = 0.0

    @property
    def location(self) -> str:
        """The location of the store below."""
        return self._store.location

    def put(self, name: str, data: Pieces) -> None:
        """Create an object; see the contract."""
        self._pay(sum(len(piece) for piece in data))
        self._store.put(name, data)

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return an object's bytes; see the contract."""
        data = self._store.get(name, start=start, size=size)
        self._pay(len(data))
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

    def _pay(self, size: int) -> None:
        """Wait until what was moved before has had its time, and take the time of `size` bytes."""
        with self._guard:
            now = self._clock()
            begin = max(now, self._free_at)
            self._free_at = begin + size / self._rate
        if begin > now:
            self._sleep(begin - now)
