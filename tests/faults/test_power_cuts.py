"""The power goes at any moment, and only what was synced is left: what was acknowledged is there, all else harmless."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from remetal.errors import RefusedError
from remetal.repository import encoder
from remetal.repository.check import rebuild_index
from remetal.repository.copy import copy_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.machines import MachineKeys
from remetal.repository.prune import prune_machine
from remetal.repository.repository import (
    add_recipient,
    change_passphrase,
    init_repository,
    open_repository,
    unlock_with_passphrase,
)
from remetal.storage import LocalStore
from tests.faults.calls import Fault, KilledError, watched_calls
from tests.faults.campaign import World, need_listed, need_sound
from tests.faults.counting import Count, StartCount
from tests.faults.disk import Disk
from tests.faults.schedule import InlineExecutor
from tests.repositories import CHUNK, PASSPHRASE, MemoryStore, Site, backup, make_site, noise

_ONE, _TWO, _THREE = noise("p1", 3), noise("p2", 2) + noise("p1", 2), noise("p3", 2) + noise("p2", 1)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Make packs small and passphrases quick, and let everything run in one thread."""
    patch = pytest.MonkeyPatch()
    patch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)
    patch.setattr(encoder, "PACKS_PER_INDEX", 2)
    patch.setattr("remetal.repository.slots.MEMORY_KIB", 1 << 10)
    for module in ("session", "encoder", "copy"):
        patch.setattr(f"remetal.repository.{module}.ThreadPoolExecutor", InlineExecutor)
    yield
    patch.undo()


@dataclass
class Start:
    """What a power cut may hit: a repository in memory with two snapshots."""

    site: Site
    expected: dict[str, bytes]


@pytest.fixture(scope="module")
def start(small: None) -> Start:
    site = make_site()
    return Start(site, {backup(site, data, workers=1).id: data for data in (_ONE, _TWO)})


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is one, where fsync(2) costs nothing; the disk that forgets is a model."""
    shared = Path("/dev/shm")
    folder = (shared if shared.is_dir() else tmp_path) / f"remetal-power-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def lay_out(site: Site, folder: Path) -> Site:
    """Return the same site in a folder on disk, below which everything is durable."""
    root = folder / "repository"
    shutil.rmtree(root, ignore_errors=True)
    store = LocalStore(root)
    for name, data in site.store.objects.items():
        store.put(name, [data])
    store = LocalStore(root)
    return Site(store, open_repository(store), MachineKeys(site.keys.stored), site.key)  # type: ignore[arg-type]


Work = Callable[[Site], dict[str, bytes] | None]
"""Changes a repository; returns the snapshots that it has made."""
Look = Callable[[MemoryStore, bool, dict[str, bytes]], None]
"""Looks at what is left: the objects, whether the work was acknowledged before, and the snapshots that it had made."""


def cut_everywhere(site: Site, folder: Path, work: Work, look: Look, count: Count, *, chances: int, place: str) -> None:
    """Do the work, cut the power after each of its calls; look at what was synced, and at more than that by chance."""
    disk = Disk(folder)
    states: list[dict[str, bytes]] = []
    chance = random.Random(4)

    def done(call: str, *words: str | bytes) -> None:
        disk.done(call, *words)
        for each in (None, *[chance] * chances):
            state = disk.after_power_cut(each).get(place, {})
            if state not in states[-8:]:
                states.append(state)

    with watched_calls(folder) as calls:
        calls.done = done
        made = work(site) or {}
    calls_made = calls.count
    for state in states:
        with count.case(f"after one of {calls_made} calls"):
            look(MemoryStore(dict(state)), False, made)
    for each in (None, *[chance] * chances):
        with count.case("after the end"):
            look(MemoryStore(disk.after_power_cut(each).get(place, {})), True, made)


def looking(start: Start, *, new: bytes = b"", gone: str = "") -> Look:
    """Return what looks at a repository that has its two snapshots, a new one maybe, and one of them maybe not."""

    def look(store: MemoryStore, acknowledged: bool, made: dict[str, bytes]) -> None:
        expected = {identity: data for identity, data in start.expected.items() if identity != gone}
        maybe = {} if acknowledged or not new else {"": new}
        if gone and not acknowledged:
            maybe[gone] = start.expected[gone]
        site = Site(store, open_repository(store), MachineKeys(start.site.keys.stored), _key_of(store))
        need_sound(World(site, expected | (made if acknowledged else {}), maybe))

    return look


def _key_of(store: MemoryStore):  # type: ignore[no-untyped-def]
    repository = open_repository(store)
    try:
        return unlock_with_passphrase(repository, PASSPHRASE)
    except RefusedError:
        return unlock_with_passphrase(repository, "new")


CHANCES = pytest.mark.parametrize("chances", [0, pytest.param(6, marks=pytest.mark.faults)], ids=["synced", "more"])
_CAMPAIGN = "power cuts, "


@CHANCES
def test_backup(start: Start, folder: Path, chances: int, counts: StartCount) -> None:
    def work(site: Site) -> dict[str, bytes]:
        return {backup(site, _THREE, workers=1).id: _THREE}

    site, count = lay_out(start.site, folder), counts(_CAMPAIGN + "backup")
    cut_everywhere(site, folder, work, looking(start, new=_THREE), count, chances=chances, place="repository")


@CHANCES
def test_forget(start: Start, folder: Path, chances: int, counts: StartCount) -> None:
    first = next(iter(start.expected))

    def work(site: Site) -> None:
        forget_snapshots(site.repository, site.key, [first])

    site, count = lay_out(start.site, folder), counts(_CAMPAIGN + "forget")
    cut_everywhere(site, folder, work, looking(start, gone=first), count, chances=chances, place="repository")


@CHANCES
def test_prune(start: Start, folder: Path, chances: int, counts: StartCount) -> None:
    first = next(iter(start.expected))

    def work(site: Site) -> None:
        prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=0)

    site, count = lay_out(start.site, folder), counts(_CAMPAIGN + "prune")
    forget_snapshots(site.repository, site.key, [first])
    left = Start(start.site, {identity: data for identity, data in start.expected.items() if identity != first})
    cut_everywhere(site, folder, work, looking(left), count, chances=chances, place="repository")


@CHANCES
def test_repair(start: Start, folder: Path, chances: int, counts: StartCount) -> None:
    bare = start.site.copy()
    for entry in list(bare.store.entries("index/")):
        bare.store.delete(entry.name)
    sound = looking(start)

    def look(store: MemoryStore, acknowledged: bool, made: dict[str, bytes]) -> None:
        if not acknowledged:
            rebuild_index(open_repository(store), start.site.key)
        sound(store, acknowledged, made)

    def work(site: Site) -> None:
        rebuild_index(site.repository, site.key)

    site, count = lay_out(bare, folder), counts(_CAMPAIGN + "repair")
    cut_everywhere(site, folder, work, look, count, chances=chances, place="repository")


@CHANCES
def test_keys(start: Start, folder: Path, chances: int, counts: StartCount) -> None:
    def work(site: Site) -> None:
        change_passphrase(site.repository, PASSPHRASE, "new")
        add_recipient(site.repository, site.key, "escrow")

    site, count = lay_out(start.site, folder), counts(_CAMPAIGN + "key change")
    cut_everywhere(site, folder, work, looking(start), count, chances=chances, place="repository")


@CHANCES
def test_copy(start: Start, folder: Path, chances: int, counts: StartCount) -> None:
    target = folder / "copy"
    sound = looking(start)

    def look(store: MemoryStore, acknowledged: bool, made: dict[str, bytes]) -> None:
        if not acknowledged:
            if "config" in store.objects:
                site = Site(store, open_repository(store), start.site.keys, start.site.key)
                need_listed(site, start.expected, {})
            copy_repository(start.site.store, store)
        sound(store, acknowledged, made)

    def work(site: Site) -> None:
        copy_repository(site.store, LocalStore(target))

    site, count = lay_out(start.site, folder), counts(_CAMPAIGN + "copy")
    cut_everywhere(site, folder, work, look, count, chances=chances, place="copy")


@CHANCES
def test_init(start: Start, folder: Path, chances: int, counts: StartCount) -> None:
    def look(store: MemoryStore, acknowledged: bool, made: dict[str, bytes]) -> None:
        if not acknowledged:
            with suppress(RefusedError):
                init_repository(store, passphrase=PASSPHRASE, chunk_size=CHUNK)
        assert unlock_with_passphrase(open_repository(store), PASSPHRASE).id

    def work(site: Site) -> None:
        init_repository(LocalStore(folder / "fresh" / "deep"), passphrase=PASSPHRASE, chunk_size=CHUNK)

    site, count = lay_out(start.site, folder), counts(_CAMPAIGN + "init")

    def look_deep(store: MemoryStore, acknowledged: bool, made: dict[str, bytes]) -> None:
        look(MemoryStore({n.removeprefix("deep/"): data for n, data in store.objects.items()}), acknowledged, made)

    cut_everywhere(site, folder, work, look_deep, count, chances=chances, place="fresh")


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.faults)], ids=["some", "all"])
@pytest.mark.parametrize("snapshots", [0, 2])
def test_what_a_killed_writer_has_not_synced_is_not_built_upon(
    start: Start, folder: Path, snapshots: int, share: int, counts: StartCount
) -> None:
    """A backup is killed before any of its changes, the next one uses what it left, and then the power goes."""
    start = start if snapshots else Start(make_site(), {})
    count = counts("power cuts, after a kill")
    site = lay_out(start.site, folder)
    with watched_calls(folder) as calls:
        backup(site, _THREE, workers=1)
    changes = [
        at
        for at, name in enumerate(calls.names, start=1)
        if name in {"make", "writev", "fsync", "link", "mkdir", "unlink"}
    ]
    assert len(changes) > 40
    for at in changes[::share]:
        _kill_and_cut(start, folder, at, count)


def _kill_and_cut(start: Start, folder: Path, at: int, count: Count) -> None:
    site = lay_out(start.site, folder)
    disk = Disk(folder)
    with watched_calls(folder) as calls:
        calls.done = disk.done
        calls.fault = Fault(at)
        with suppress(KilledError):
            backup(site, _THREE, workers=1)
        assert calls.hits
        calls.fault = None
        store = LocalStore(folder / "repository")
        for entry in list(store.entries("locks/")):
            store.delete(entry.name)
        keys = MachineKeys(start.site.keys.stored)
        following = Site(store, open_repository(store), keys, start.site.key)  # type: ignore[arg-type]
        made = backup(following, _THREE, workers=1)
    left = MemoryStore(disk.after_power_cut()["repository"])
    with count.case(at, faults=2):
        after = Site(left, open_repository(left), MachineKeys(start.site.keys.stored), start.site.key)
        need_sound(World(after, start.expected | {made.id: _THREE}, {"": _THREE}))
