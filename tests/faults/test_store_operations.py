"""A fault at every store operation of everything that changes a repository."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import pytest

from remetal.errors import DamagedError, RefusedError, RemetalError
from remetal.repository import encoder
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository, rebuild_index
from remetal.repository.copy import copy_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.objects import pack_name
from remetal.repository.parity import find_groups
from remetal.repository.prune import prune_machine
from remetal.repository.remove import remove_recipient
from remetal.repository.repair import repair_repository
from remetal.repository.repository import (
    accept_recipients,
    add_passphrase,
    add_recipient,
    change_passphrase,
    enroll_machine,
    init_repository,
    list_keys,
    open_repository,
    remove_passphrase,
    unlock_with_kit,
    unlock_with_passphrase,
)
from remetal.repository.retire import retire_machine
from tests.faults.campaign import FAILURES, LIES, MODES, FaultyStore, World, need_sound, run_campaign
from tests.faults.counting import Count, StartCount
from tests.repositories import CHUNK, PASSPHRASE, MemoryStore, Site, backup, make_site, noise, restore

_ONE, _TWO, _THREE = noise("f1", 3), noise("f2", 2) + noise("f1", 2), noise("f3", 2) + noise("f2", 1)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Make packs and index objects small, and passphrases quick."""
    patch = pytest.MonkeyPatch()
    patch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)
    patch.setattr(encoder, "PACKS_PER_INDEX", 2)
    patch.setattr("remetal.repository.slots.MEMORY_KIB", 1 << 10)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def world(small: None) -> World:
    site = make_site()
    made = {backup(site, data, workers=1).id: data for data in (_ONE, _TWO)}
    return World(site, made)


def _first(world: World) -> str:
    return next(iter(world.expected))


BOTH = pytest.mark.parametrize("modes", [FAILURES, pytest.param(LIES, marks=pytest.mark.faults)], ids=["fails", "lies"])


@BOTH
def test_backup(world: World, modes: Sequence[str], counts: StartCount) -> None:
    def work(world: World) -> Iterable[tuple[str, bytes]]:
        return [(backup(world.site, _THREE, workers=1).id, _THREE)]

    world = World(world.site, world.expected, {"unacknowledged": _THREE})
    assert run_campaign(world, work, counts("store operations, backup"), modes) > 20


@pytest.mark.parametrize("modes", [("once-before", *LIES)], ids=["moments"])
def test_backup_behind_a_ledger(world: World, modes: Sequence[str], counts: StartCount) -> None:
    """What is not to be read for a moment must not be passed over: the next entry is to follow it."""
    site = _copied(world.site)
    first = _first(world)
    forget_snapshots(site.repository, site.key, [first])
    expected = {identity: data for identity, data in world.expected.items() if identity != first}

    def work(world: World) -> Iterable[tuple[str, bytes]]:
        return [(backup(world.site, _THREE, workers=1).id, _THREE)]

    run_campaign(World(site, expected, {"": _THREE}), work, counts("store operations, backup"), modes)


@BOTH
def test_forget(world: World, modes: Sequence[str], counts: StartCount) -> None:
    first = _first(world)

    def work(world: World) -> Iterable[tuple[str, bytes]]:
        world.maybe[first] = world.expected.pop(first)
        forget_snapshots(world.site.repository, world.site.key, [first])
        return []

    run_campaign(world, work, counts("store operations, forget"), modes)


@BOTH
@pytest.mark.parametrize("grace", [0.0, 1e6])
def test_prune(world: World, grace: float, modes: Sequence[str], counts: StartCount) -> None:
    site = _copied(world.site)
    first = _first(world)
    forget_snapshots(site.repository, site.key, [first])
    expected = {identity: data for identity, data in world.expected.items() if identity != first}

    def work(world: World) -> Iterable[tuple[str, bytes]]:
        site = world.site
        prune_machine(site.repository, site.key, site.keys.machine_id, grace=grace, max_unused=0, reseal=grace > 0)
        return []

    run_campaign(World(site, expected), work, counts("store operations, prune"), modes)


@BOTH
@pytest.mark.timeout(7200)
def test_repair(world: World, modes: Sequence[str], counts: StartCount) -> None:
    """A lost index and a lost pack of every group come back.

    A repair that was cut off, or says that something is damaged still, is completed by the next one.
    """
    site = _copied(world.site)
    for entry in list(site.store.entries("index/")):
        site.store.delete(entry.name)
    for number, group in enumerate(list(find_groups(site.store, site.keys.machine_id, []))):
        name = pack_name(site.keys.machine_id, min(group.packs))
        site.store.delete(name)
        if number:
            site.store.put(name, [b"spoilt"])
    total = _operations(site, lambda site: repair_repository(site.repository, site.key))
    count = counts("store operations, repair")
    for mode in modes:
        for at in range(1, total + 1):
            broken = _faulty(site, at, mode)
            mended = False
            with _told(count):
                result = repair_repository(broken.repository, broken.key)
                mended = not result.lost and not result.damaged
            with count.case((mode, at)):
                calm = _copied(broken)
                for name in [name for name in calm.store.objects if name.startswith("locks/")]:
                    del calm.store.objects[name]  # a dead computer's are taken over; ours stand as long as we live
                if not mended:
                    repair_repository(calm.repository, calm.key)
                need_sound(World(calm, world.expected))


def test_rebuilding_an_index(world: World, counts: StartCount) -> None:
    """A lost index is made anew. What is cut off leaves the repository as damaged as it was; a second one mends it."""
    site = _copied(world.site)
    for entry in list(site.store.entries("index/")):
        site.store.delete(entry.name)
    total = _operations(site, lambda site: rebuild_index(site.repository, site.key))
    count = counts("store operations, rebuilding an index")
    for mode in MODES:
        for at in range(1, total + 1):
            broken = _faulty(site, at, mode)
            with _told(count):
                rebuild_index(broken.repository, broken.key)
            with count.case((mode, at)):
                calm = _copied(broken)
                rebuild_index(calm.repository, calm.key)
                need_sound(World(calm, world.expected))


@contextmanager
def _told(count: Count) -> Iterator[None]:
    """Count an error that an administrator would see."""
    try:
        yield
    except RemetalError:
        count.told()


def _change(site: Site) -> None:
    change_passphrase(site.repository, PASSPHRASE, "new")


def _remove(site: Site) -> None:
    add_passphrase(site.repository, site.key, "another")
    remove_passphrase(site.repository, PASSPHRASE)


def _escrow(site: Site) -> None:
    add_recipient(site.repository, site.key, "escrow")
    accept_recipients(site.repository, site.keys)


def _revoke(site: Site) -> None:
    _escrow(site)
    other = unlock_with_passphrase(site.repository, "escrow")
    remove_recipient(site.repository, site.key, other.id)


def _retire(site: Site) -> None:
    retire_machine(site.repository, site.key, site.keys.machine_id)


@pytest.mark.parametrize("work", [_change, _remove, _escrow, _revoke, _retire])
def test_keys(world: World, work: object, counts: StartCount) -> None:
    """Whatever is cut off: some passphrase opens the repository, the kit does, and everything restores."""
    assert callable(work)
    count = counts("store operations, key change")
    total = _operations(_copied(world.site), work)
    for mode in MODES:
        for at in range(1, total + 1):
            site = _faulty(world.site, at, mode)
            with _told(count):
                work(site)
            with count.case((mode, at)):
                calm = _copied(site)
                opened = 0
                for passphrase in (PASSPHRASE, "new", "another"):
                    with suppress(RefusedError):
                        opened += unlock_with_passphrase(calm.repository, passphrase).id == calm.key.id
                assert opened
                assert check_repository(calm.repository, keys=calm.key).problems == []
                need_restores(calm, world.expected)
                if work is not _retire and count.cases % 3 == 0:  # retired keys add no backup any more
                    need_sound(World(calm, world.expected))


def need_restores(site: Site, expected: dict[str, bytes], *, at_least: dict[str, bytes] | None = None) -> None:
    """What is listed restores to what it was; all of it is listed, or what `at_least` says."""
    found = {}
    for each in open_catalog(site.repository, site.key).snapshots():
        try:
            found[each.id] = restore(site, each)
        except DamagedError:
            assert at_least is not None
    assert all(expected[identity] == data for identity, data in found.items())
    assert (expected if at_least is None else at_least).keys() <= found.keys()


def test_init_and_enroll(counts: StartCount) -> None:
    """Either there is no repository, and init makes one, or it is whole; a machine that was not enrolled can be."""
    store = FaultyStore()
    _begin(store)
    total = store.count
    count = counts("store operations, init")
    for mode in MODES:
        for at in range(1, total + 1):
            broken = FaultyStore(at=at, mode=mode)
            with _told(count):
                _begin(broken)
            with count.case((mode, at)):
                _need_usable(MemoryStore(dict(broken.objects)))


def _need_usable(calm: MemoryStore) -> None:
    try:
        repository = open_repository(calm)
        key = unlock_with_passphrase(repository, PASSPHRASE)
    except RefusedError:
        repository, kit = init_repository(calm, passphrase=PASSPHRASE, chunk_size=CHUNK)
        key = unlock_with_kit(repository, kit.text())
    assert check_repository(repository, keys=key).problems == []
    assert sum(each.kind == "recipient" for each in list_keys(repository)) == 1
    site = Site(calm, repository, enroll_machine(repository, "late"), key)
    assert restore(site, backup(site, _ONE, workers=1)) == _ONE


def _begin(store: MemoryStore) -> None:
    repository, _ = init_repository(store, passphrase=PASSPHRASE, chunk_size=CHUNK)
    enroll_machine(repository, "web")


@pytest.mark.parametrize("side", ["source", "target"])
def test_copy(world: World, side: str, counts: StartCount) -> None:
    """A copy that is cut off at either side goes on, and shows whole snapshots only."""
    target = FaultyStore()
    source = _faulty(world.site, 0, "before")
    copy_repository(source.store, target)
    assert isinstance(source.store, FaultyStore)
    total = (source.store if side == "source" else target).count
    count = counts("store operations, copy")
    for mode in MODES:
        for at in range(1, total + 1):
            source = _faulty(world.site, at if side == "source" else 0, mode)
            target = FaultyStore(at=at if side == "target" else 0, mode=mode)
            with _told(count):
                copy_repository(source.store, target)
            with count.case((mode, at)):
                calm = MemoryStore(dict(target.objects))
                if "config" in calm.objects and mode != "lost":
                    shown = {} if mode in LIES else world.expected  # after a lie something may be lacking
                    need_restores(_over(world.site, calm), world.expected, at_least=shown)
                copy_repository(world.site.store, calm)
                need_restores(_over(world.site, calm), world.expected)
                assert calm.objects == world.site.store.objects


@BOTH
@pytest.mark.parametrize("side", ["source", "target"])
def test_copy_that_deletes(world: World, side: str, modes: Sequence[str], counts: StartCount) -> None:
    """A copy follows a prune. Wherever it is cut off, all that is needed is there, and another one ends it."""
    before = dict(world.site.store.objects)
    site = _copied(world.site)
    first = _first(world)
    forget_snapshots(site.repository, site.key, [first])
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=0)
    expected = {identity: data for identity, data in world.expected.items() if identity != first}
    source, target = _faulty(site, 0, "before"), FaultyStore(dict(before))
    copy_repository(source.store, target, delete=True)
    assert isinstance(source.store, FaultyStore)
    total = (source.store if side == "source" else target).count
    count = counts("store operations, copy")
    for mode in modes:
        for at in range(1, total + 1):
            source = _faulty(site, at if side == "source" else 0, mode)
            target = FaultyStore(dict(before), at=at if side == "target" else 0, mode=mode)
            with _told(count):
                copy_repository(source.store, target, delete=True)
            with count.case((mode, at)):
                calm = MemoryStore(dict(target.objects))
                need_restores(_over(site, calm), world.expected, at_least=expected)
                copy_repository(site.store, calm, delete=True)
                need_restores(_over(site, calm), expected)
                assert calm.objects == site.store.objects


def _over(site: Site, store: MemoryStore) -> Site:
    return Site(store, open_repository(store), site.keys, site.key)


def _copied(site: Site) -> Site:
    return Site(MemoryStore(dict(site.store.objects)), site.repository, site.keys, site.key).copy()


def _faulty(site: Site, at: int, mode: str) -> Site:
    store = FaultyStore(dict(site.store.objects), mode=mode)
    repository = open_repository(store)
    store.count, store.at = 0, at
    copied = _copied(site)
    return Site(store, repository, copied.keys, site.key)


def _operations(site: Site, work: object) -> int:
    assert callable(work)
    counting = _faulty(site, 0, "before")
    work(counting)
    assert isinstance(counting.store, FaultyStore)
    return counting.store.count
