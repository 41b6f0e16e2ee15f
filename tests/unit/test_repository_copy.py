"""Copies of a repository: whole, up to date when run again, and never of anything that is damaged."""

from __future__ import annotations

import pytest

from remetal.errors import RefusedError
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.copy import copy_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.prune import prune_machine
from remetal.repository.repository import add_passphrase, open_repository, remove_passphrase
from remetal.storage import RetainedError
from tests.repositories import CHUNK, MemoryStore, Site, StoreDiedError, backup, die_at, make_site, noise, restore

_DATA = [noise("copy a", 4), noise("copy b", 3) + noise("copy a", 2), noise("copy c", 2)]


@pytest.fixture
def site() -> Site:
    site = make_site()
    for data in _DATA[:2]:
        backup(site, data)
    return site


def at(site: Site, store: MemoryStore) -> Site:
    return Site(store, open_repository(store), site.keys, site.key)


def sound(site: Site, expected: list[bytes]) -> None:
    snapshots = open_catalog(site.repository, site.key).snapshots()
    assert [restore(site, each) for each in snapshots] == expected
    assert check_repository(site.repository, keys=site.key, read_data=True).problems == []


def test_a_copy_is_the_same_repository(site: Site) -> None:
    target = MemoryStore()
    result = copy_repository(site.store, target)
    assert target.objects == site.store.objects
    assert (result.objects, result.problems) == (len(site.store.objects), [])
    sound(at(site, target), _DATA[:2])
    again = copy_repository(site.store, target)
    assert (again.objects, again.bytes, again.there) == (0, 0, len(target.objects) - 1)


def test_a_copy_is_brought_up_to_date(site: Site) -> None:
    target = MemoryStore()
    copy_repository(site.store, target)
    backup(site, _DATA[2])
    copy_repository(site.store, target)
    sound(at(site, target), _DATA)


def test_what_was_pruned_and_removed_goes_on_demand(site: Site) -> None:
    target = MemoryStore()
    add_passphrase(site.repository, site.key, "old")
    copy_repository(site.store, target)
    remove_passphrase(site.repository, "old")
    first = open_catalog(site.repository, site.key).snapshots()[0]
    forget_snapshots(site.repository, site.key, [first.id])
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=0)
    copy_repository(site.store, target)
    sound(at(site, target), _DATA[1:2])
    assert site.store.objects.keys() < target.objects.keys()
    assert copy_repository(site.store, target, delete=True).deleted > 3
    assert target.objects == site.store.objects
    sound(at(site, target), _DATA[1:2])


def test_what_the_target_retains_is_told_and_goes_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    target = MemoryStore()
    copy_repository(site.store, target)
    first = open_catalog(site.repository, site.key).snapshots()[0]
    forget_snapshots(site.repository, site.key, [first.id])
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=0)

    def retain(name: str) -> None:
        raise RetainedError(f"{name} is locked")

    with monkeypatch.context() as patch:
        patch.setattr(target, "delete", retain)
        result = copy_repository(site.store, target, delete=True)
    assert (result.deleted, result.retained > 3, result.problems) == (0, True, [])
    assert site.store.objects.keys() < target.objects.keys()
    sound(at(site, target), _DATA[1:2])
    assert copy_repository(site.store, target, delete=True).retained == 0
    assert target.objects == site.store.objects


@pytest.mark.parametrize("after", [False, True])
def test_a_copy_that_is_cut_off_is_no_trap(site: Site, after: bool) -> None:
    for number in range(1, len(site.store.objects) + 1):
        target = MemoryStore()
        die_at(number, after=after)(target)
        with pytest.raises(StoreDiedError):
            copy_repository(site.store, target)
        survived = target.copy()
        if "config" in survived.objects:
            sound(at(site, survived), _DATA[:2])
        copy_repository(site.store, survived)
        assert survived.objects == site.store.objects


def test_updates_that_are_cut_off_leave_whole_snapshots(site: Site) -> None:
    base = MemoryStore()
    copy_repository(site.store, base)
    backup(site, _DATA[2])
    for number in range(1, len(site.store.objects) - len(base.objects) + 1):
        target = base.copy()
        die_at(number, after=False)(target)
        with pytest.raises(StoreDiedError):
            copy_repository(site.store, target)
        sound(at(site, target.copy()), _DATA[:2])


@pytest.mark.parametrize("prefix", ["packs/", "index/", "maps/", "history/", "keys/machines/", "keys/slots/"])
def test_what_is_damaged_is_told_and_not_copied(site: Site, prefix: str) -> None:
    name = next(entry.name for entry in site.store.entries(prefix))
    good = site.store.objects[name]
    site.store.objects[name] = good[:-1] + bytes([good[-1] ^ 1])
    parity = {each.name: site.store.objects.pop(each.name) for each in list(site.store.entries("parity/"))}
    target = MemoryStore()
    result = copy_repository(site.store, target)
    assert any(name in problem for problem in result.problems)
    assert name not in target.objects
    site.store.objects |= {name: good, **parity}
    assert copy_repository(site.store, target).problems == []
    assert target.objects == site.store.objects


def test_a_damaged_pack_that_parity_can_rebuild_is_whole_in_the_copy(site: Site) -> None:
    for name in [entry.name for entry in site.store.entries("packs/")]:
        good = site.store.objects[name]
        site.store.objects[name] = good[:-1] + bytes([good[-1] ^ 1])
        target = MemoryStore()
        (problem,) = copy_repository(site.store, target).problems
        assert name in problem
        assert "the copy is whole" in problem
        sound(at(site, target), _DATA[:2])
        site.store.objects[name] = good


def test_what_was_cut_short_at_the_target_is_mended(site: Site) -> None:
    target = MemoryStore()
    copy_repository(site.store, target)
    for prefix in ("packs/", "maps/"):
        name = next(entry.name for entry in target.entries(prefix))
        target.objects[name] = target.objects[name][: CHUNK // 2]
    copy_repository(site.store, target)
    assert target.objects == site.store.objects


def test_places_that_are_taken_are_refused(site: Site) -> None:
    other = make_site()
    with pytest.raises(RefusedError, match="another repository"):
        copy_repository(site.store, other.store)
    del other.store.objects["config"]
    with pytest.raises(RefusedError, match="something else"):
        copy_repository(site.store, other.store)
    with pytest.raises(RefusedError, match="something else"):
        copy_repository(site.store, MemoryStore({"photos/a": b"x"}))
    with pytest.raises(RefusedError, match="no repository"):
        copy_repository(MemoryStore(), MemoryStore())


def test_two_places_that_went_on_by_themselves_are_told(site: Site) -> None:
    target = MemoryStore()
    copy_repository(site.store, target)
    twin = at(site.copy(), target)
    backup(twin, _DATA[2])
    backup(site, _DATA[0])
    result = copy_repository(site.store, target)
    assert any("both places" in problem for problem in result.problems)
    sound(twin, [*_DATA[:2], _DATA[2]])
