"""A store that tries again: what fails for a moment is not told to anybody.

A call may have been carried out although its answer was lost. Reading and deleting again do no harm; an object that is
there when it is put again was put by us if its bytes are ours.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TypeVar

from remetal.errors import UnavailableError
from remetal.storage.store import AlreadyExistsError, Entry, NotFoundError, Pieces, Store

ATTEMPTS = 6
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; each further pause is twice as long, up to `LONGEST_PAUSE`."""
LONGEST_PAUSE = 30.0
_KEPT_AT_ONCE = 4096
"""Of so many names is remembered which are to be kept, to try it again; a repository has millions."""

ResultT = TypeVar("ResultT")


class RetryingStore:
    """The store of `remetal.storage.store` over another one that may fail for a while."""

    def __init__(self, store: Store, *, attempts: int = ATTEMPTS, sleep: Callable[[float], None] = time.sleep) -> None:
        self._store = store
        self._attempts = attempts
        self._sleep = sleep

    @property
    def location(self) -> str:
        """The location of the store below."""
        return self._store.location

    def put(self, name: str, data: Pieces) -> None:
        """Create an object; see the contract."""
        uncertain = False

        def attempt() -> None:
            nonlocal uncertain
            try:
                self._store.put(name, data)
            except AlreadyExistsError:
                if not uncertain or not self._is_ours(name, data):
                    raise
            except UnavailableError:
                uncertain = True
                raise

        self._repeat(attempt)

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return an object's bytes; see the contract."""
        return self._repeat(lambda: self._store.get(name, start=start, size=size))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield objects in the order of names, going on behind the last one after a failure; see the contract."""
        last = ""
        pauses = self._pauses()
        while True:
            try:
                for entry in self._store.entries(prefix):
                    if entry.name > last:
                        last, pauses = entry.name, self._pauses()
                        yield entry
            except UnavailableError:
                if not self._wait(pauses):
                    raise
            else:
                return

    def delete(self, name: str) -> None:
        """Remove an object; see the contract."""
        self._repeat(lambda: self._store.delete(name))

    def keep(self, names: Iterable[str]) -> int:
        """Protect objects; see the contract."""
        left, kept = iter(names), 0
        while some := list(islice(left, _KEPT_AT_ONCE)):
            kept += self._repeat(partial(self._store.keep, some))
        return kept

    def close(self) -> None:
        """Close the store below."""
        self._store.close()

    def _is_ours(self, name: str, data: Pieces) -> bool:
        whole = b"".join(data)
        try:
            return self._store.get(name, size=len(whole) + 1) == whole
        except NotFoundError:
            return False

    def _repeat(self, attempt: Callable[[], ResultT]) -> ResultT:
        pauses = self._pauses()
        while True:
            try:
                return attempt()
            except UnavailableError:
                if not self._wait(pauses):
                    raise

    def _pauses(self) -> Iterator[float]:
        for number in range(self._attempts - 1):
            yield min(FIRST_PAUSE * 2**number, LONGEST_PAUSE) * random.uniform(0.5, 1.0)  # noqa: S311

    def _wait(self, pauses: Iterator[float]) -> bool:
        pause = next(pauses, None)
        if pause is not None:
            self._sleep(pause)
        return pause is not None
