"""Several actors on one store, one operation at a time, in an order that the test chooses: same order, same end.

What runs in threads of its own inside a session runs at once here, so that an actor is one thread.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest

from remetal.errors import RemetalError
from remetal.storage import Entry, Pieces
from tests.repositories import MemoryStore

Choose: TypeAlias = Callable[[Sequence[int]], int]
"""Says who of the actors that can go on does."""


class Priorities:
    """Always lets the actor of the highest priority go on, and at a few points makes that one the last of all.

    With so many points every fault that needs as many changes of turn comes up with a known probability (Burckhardt et
    al., A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs, 2010): better than fair turns, where
    everybody does everything at about the same time, and nobody sleeps.
    """

    def __init__(self, seed: int, actors: int, *, points: int = 4, length: int = 500) -> None:
        generator = random.Random(seed)
        self._order = generator.sample(range(actors), actors)
        self._points = {generator.randrange(length) for _ in range(points)}
        self._step = 0

    def __call__(self, ready: Sequence[int]) -> int:
        chosen = next(each for each in self._order if each in ready)
        if self._step in self._points:
            self._order.remove(chosen)
            self._order.append(chosen)
            chosen = next(each for each in self._order if each in ready)
        self._step += 1
        return chosen


class Bursts:
    """Lets each of the named actors go on for so many operations; then everybody in turn to the end."""

    def __init__(self, bursts: Sequence[tuple[int, int]]) -> None:
        self._plan = [actor for actor, length in bursts for _ in range(length)]
        self._step = 0

    def __call__(self, ready: Sequence[int]) -> int:
        while self._step < len(self._plan):
            chosen = self._plan[self._step]
            self._step += 1
            if chosen in ready:
                return chosen
        self._step += 1
        return ready[self._step % len(ready)]


class InlineExecutor:
    """Carries out what is submitted before it returns."""

    def __init__(self, *words: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(self, *words: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *words: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*words))
        except BaseException as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        return future

    def shutdown(self, **options: Any) -> None:
        pass


class NoLock:
    """A lock that nobody holds."""

    def check(self) -> None:
        pass


@contextmanager
def without_locks_and_threads() -> Iterator[None]:
    """Let sessions and prunes run without the locks that keep them apart, and each in one thread."""
    patch = pytest.MonkeyPatch()

    @contextmanager
    def hold(*words: Any, **options: Any) -> Iterator[NoLock]:
        yield NoLock()

    for module in ("session", "prune"):
        patch.setattr(f"remetal.repository.{module}.hold_machine", hold)
    for module in ("session", "encoder"):
        patch.setattr(f"remetal.repository.{module}.ThreadPoolExecutor", InlineExecutor)
    try:
        yield
    finally:
        patch.undo()


@dataclass
class ScheduledStore(MemoryStore):
    """A store in memory that lets a registered thread go on only when it is its turn."""

    turns: Turns = field(default_factory=lambda: Turns())  # noqa: PLW0108 - it is defined below

    def put(self, name: str, data: Pieces) -> None:
        self.turns.take()
        super().put(name, data)

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        self.turns.take()
        return super().get(name, start=start, size=size)

    def entries(self, prefix: str) -> Iterator[Entry]:
        self.turns.take()
        yield from list(super().entries(prefix))

    def delete(self, name: str) -> None:
        self.turns.take()
        super().delete(name)


class Turns:
    """Who may go on. Threads that are no actors always may."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._alive: set[int] = set()
        self._turn = -1
        self._own = threading.local()

    def take(self) -> None:
        """Wait for this actor's turn."""
        me = getattr(self._own, "number", None)
        if me is None:
            return
        with self._changed:
            self._waiting.add(me)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._turn == me)
            self._turn = -1
            self._waiting.discard(me)

    def run(self, actors: Sequence[Callable[[], object]], choose: Choose) -> list[BaseException]:
        """Run all actors to their ends; `choose` says who of those that can go on does.

        Returns errors that no administrator would see.
        """
        errors: list[BaseException] = []

        def act(number: int, work: Callable[[], object]) -> None:
            self._own.number = number
            try:
                with suppress(RemetalError):
                    work()
            except BaseException as error:  # noqa: BLE001 - told by the caller
                errors.append(error)
            finally:
                with self._changed:
                    self._alive.discard(number)
                    self._changed.notify_all()

        self._alive = set(range(len(actors)))
        threads = [threading.Thread(target=act, args=each) for each in enumerate(actors)]
        for thread in threads:
            thread.start()
        with self._changed:
            while self._alive:
                self._changed.wait_for(lambda: self._turn == -1 and self._waiting >= self._alive)
                if self._alive:
                    ready = sorted(self._waiting & self._alive)
                    self._turn = choose(ready)
                    self._changed.notify_all()
        for thread in threads:
            thread.join()
        return errors
