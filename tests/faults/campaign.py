"""A campaign: some work is done over and over, each time with a fault at another of its store operations.

After every fault the invariants are looked at: an acknowledged snapshot restores to the last bit, one that was not is
whole if it is listed at all, a check finds nothing wrong, the next backup and prune succeed without help, and then
every pack is protected by parity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from remetal.errors import RemetalError, UnavailableError
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.machines import MachineKeys
from remetal.repository.prune import prune_machine
from remetal.repository.repository import open_repository
from remetal.storage import Entry, Pieces, Store
from tests.faults.counting import Count
from tests.repositories import MemoryStore, Site, backup, restore

FAILURES = ("before", "torn", "after", "lost", "once-before", "once-after")
LIES = ("empty", "stale", "truncated", "empty-on", "stale-on")
MODES = (*FAILURES, *LIES)
"""How an operation fails.

`before` and `after` it takes effect, and with it all that follow: the computer has died. `lost`: it is acknowledged and
has no effect, and the computer dies. `torn`: half of a pack or of a page of a map arrives under its name, as no store
that keeps its contract shows it, and the computer dies. `once-…`: it alone fails, and the work goes on as it will. The
lies are no failures: a listing that shows nothing, or not what was made last; a read that ends early. With `…-on` all
further listings lie, too: they show nothing, or what was there by then.
"""


class FaultError(UnavailableError):
    """The failure that a campaign puts into a store."""


@dataclass
class FaultyStore(MemoryStore):
    """A store in memory whose operation number `at` fails; reads and listings count, too."""

    at: int = 0
    mode: str = "before"
    count: int = 0
    torn: str = ""
    frozen: dict[str, int] | None = None

    def _begin(self) -> bool:
        """Count an operation; return whether it is to have its effect. Raises FaultError if it is not even that."""
        with self.guard:
            self.count += 1
            number = self.count
        if not self.at or number < self.at:
            return True
        if number > self.at:
            if self.mode.startswith("once") or self.mode in LIES:
                return True
            raise FaultError("the store is gone")
        if self.mode.endswith("before"):
            raise FaultError("the store fails")
        return self.mode not in {"lost", "torn"}

    def _end(self) -> None:
        if self.at and self.count == self.at and self.mode.endswith(("after", "torn")):
            raise FaultError("the store has done it, and says that it failed")

    def _lies(self, mode: str) -> bool:
        if not self.at or not self.mode.startswith(mode):
            return False
        return self.count >= self.at if self.mode.endswith("-on") else self.count == self.at

    def put(self, name: str, data: Pieces) -> None:
        if self._begin():
            super().put(name, data)
        elif self.mode == "torn" and name.startswith(("packs/", "maps/")):
            whole = b"".join(data)
            super().put(name, [whole[: len(whole) // 2]])
            self.torn = name
            raise FaultError("the store fails amid the object")
        self._end()

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        self._begin()
        found = super().get(name, start=start, size=size)
        self._end()
        return found[: len(found) // 2] if self._lies("truncated") else found

    def entries(self, prefix: str) -> Iterator[Entry]:
        self._begin()
        found = list(super().entries(prefix))
        self._end()
        if self._lies("empty"):
            found = []
        if self._lies("stale"):
            if self.frozen is None:
                old = list(self.objects)[: -len(self.objects) // 4]  # in the order in which they were made
                self.frozen = {name: len(self.objects[name]) for name in old}
            found = [Entry(name, size) for name, size in self.frozen.items() if name.startswith(prefix)]
        yield from found

    def delete(self, name: str) -> None:
        if self._begin():
            super().delete(name)
        self._end()


@dataclass
class World:
    """A site, what its snapshots hold by their ids, and which of those may or may not be there."""

    site: Site
    expected: dict[str, bytes]
    maybe: dict[str, bytes] = field(default_factory=dict)


Work = Callable[[World], Iterable[tuple[str, bytes]]]
"""What is done to a world; returns the snapshots that it has made, and may leave out of `expected` those it forgets."""


def run_campaign(world: World, work: Work, count: Count, modes: Iterable[str] = MODES) -> int:
    """Do the work with a fault at each of its operations, in each mode, and check the invariants after each.

    Returns how many operations there are.
    """
    total = _count(world, work)
    for mode in modes:
        for at in range(1, total + 1):
            copy = _copy(world, at, mode)
            made: Iterable[tuple[str, bytes]] = ()
            try:
                made = list(work(copy))
            except RemetalError:
                count.told()
            with count.case(f"fault {mode} at operation {at} of {total}"):
                need_sound(copy, made)
    return total


def _count(world: World, work: Work) -> int:
    copy = _copy(world, 0, "before")
    made = list(work(copy))
    store = copy.site.store
    assert isinstance(store, FaultyStore)
    total = store.count
    need_sound(copy, made)
    return total


def _copy(world: World, at: int, mode: str) -> World:
    store = FaultyStore(dict(world.site.store.objects), at=0, mode=mode)
    repository = open_repository(store)
    store.count, store.at = 0, at
    site = Site(store, repository, MachineKeys(world.site.keys.stored), world.site.key)
    return World(site, dict(world.expected), dict(world.maybe))


def need_sound(world: World, made: Iterable[tuple[str, bytes]] = (), *, store: Store | None = None) -> None:
    """Check the invariants of what is left, by a computer that knows nothing of the fault.

    `store` is what is left, by default a copy in memory of the world's.
    """
    expected = world.expected | dict(made)
    store = store or MemoryStore(dict(world.site.store.objects))
    for entry in list(store.entries("locks/")):
        store.delete(entry.name)  # our own process lives, so its locks would stand; a dead one's are taken over
    keys = MachineKeys(world.site.keys.stored)
    site = Site(store, open_repository(store), keys, world.site.key)  # type: ignore[arg-type]
    need_listed(site, expected, world.maybe)
    torn = world.site.store.torn if isinstance(world.site.store, FaultyStore) else ""
    problems = check_repository(site.repository, keys=site.key, read_data=True).problems
    problems += check_repository(site.repository, keys=site.keys).problems
    assert [each for each in problems if not torn or torn not in each] == []
    fresh = b"after the fault" * 9000
    following = backup(site, fresh, workers=1)
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=0)
    need_listed(site, expected | {following.id: fresh}, world.maybe)
    result = check_repository(site.repository, keys=site.key, read_data=True)
    assert (result.problems, result.unprotected) == ([], 0)


def need_listed(site: Site, expected: dict[str, bytes], maybe: dict[str, bytes]) -> None:
    """Every expected snapshot restores; whatever else is listed was begun and is whole."""
    snapshots = {each.id: each for each in open_catalog(site.repository, site.key).snapshots()}
    assert expected.keys() <= snapshots.keys(), "an acknowledged snapshot is lost"
    for identity, snapshot in snapshots.items():
        data = restore(site, snapshot)
        if identity in expected:
            assert data == expected[identity], "a snapshot has other bytes than it had"
        else:
            assert data in maybe.values() or identity in maybe, "something is listed that nobody has made"
