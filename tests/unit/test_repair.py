"""Repair: whatever damage there is to a pack comes right, and all that a repair does can be taken back."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import pytest

from remetal.errors import DamagedError, RefusedError, RemetalError, UnavailableError
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.journal import Journal, last_repair
from remetal.repository.locks import hold_machine
from remetal.repository.objects import pack_name
from remetal.repository.parity import find_groups
from remetal.repository.prune import prune_machine
from remetal.repository.repair import accept_repair, repair_repository, undo_repair
from remetal.repository.repository import open_repository
from remetal.storage import UnreadableError
from tests.repositories import CHUNK, MemoryStore, Site, StoreDiedError, backup, die_at, make_site, noise, restore

_DATA = noise("whole", 7)


@pytest.fixture(scope="module")
def start() -> Site:
    """A repository with packs in two groups."""
    site = make_site()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)
        backup(site, _DATA, workers=1)
        backup(site, _DATA + noise("more", 4), workers=1)
    return site


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)


@pytest.fixture
def site(start: Site) -> Site:
    return start.copy()


def named(site: Site, prefix: str) -> list[str]:
    return sorted(name for name in site.store.objects if name.startswith(prefix))


def need_sound(site: Site) -> None:
    snapshots = open_catalog(site.repository, site.key).snapshots()
    assert [restore(site, each) for each in snapshots[:2]] == [_DATA, _DATA + noise("more", 4)]
    result = check_repository(site.repository, keys=site.key, read_data=True)
    assert (result.problems, result.unprotected) == ([], 0)


def same_but_for_locks(site: Site, objects: dict[str, bytes]) -> bool:
    return {name: data for name, data in site.store.objects.items() if not name.startswith("locks/")} == objects


def damages(good: bytes, others: list[bytes]) -> dict[str, bytes | None]:
    """Return what may happen to an object: a bit, a sector, its end, its whole, and that it is gone."""
    middle = len(good) // 2
    return {
        "bit": good[:middle] + bytes([good[middle] ^ 16]) + good[middle + 1 :],
        "first bit": bytes([good[0] ^ 1]) + good[1:],
        "sector": good[: middle - 256] + bytes(512) + good[middle + 256 :],
        "cut": good[:-1],
        "halved": good[:middle],
        "empty": b"",
        "longer": good + b"\0",
        "much longer": good + os.urandom(3 << 20),
        "garbage": os.urandom(len(good)),
        "another": next(each for each in others if each != good),
        "gone": None,
    }


def apply(site: Site, name: str, bad: bytes | None) -> None:
    if bad is None:
        del site.store.objects[name]
    else:
        site.store.objects[name] = bad


@pytest.mark.parametrize("keyless", [True, False])
@pytest.mark.parametrize("what", list(damages(b"x" * 2000, [b""])))
def test_any_damage_to_any_pack_is_mended_and_the_repair_taken_back(start: Site, what: str, *, keyless: bool) -> None:
    names = named(start, "packs/")
    for name in names:
        site = start.copy()
        apply(site, name, damages(site.store.objects[name], [site.store.objects[each] for each in names])[what])
        broken = dict(site.store.objects)
        assert what == "gone" or any(name in each for each in check_repository(site.repository).problems)
        result = repair_repository(site.repository, None if keyless else site.key)
        assert (result.rebuilt, result.lost, result.damaged, result.aside) == (1, [], [], 0 if what == "gone" else 1)
        assert site.store.objects[name] == start.store.objects[name]
        need_sound(site)
        assert repair_repository(site.repository, site.key).number == 0
        undo_repair(site.repository, None)
        assert same_but_for_locks(site, broken)


@pytest.mark.parametrize("what", list(damages(b"x" * 2000, [b""])))
def test_any_damage_to_parity_is_mended(start: Site, what: str) -> None:
    for name in named(start, "parity/"):
        site = start.copy()
        other = site.store.objects[named(site, "packs/")[0]]
        apply(site, name, damages(site.store.objects[name], [other])[what])
        broken = dict(site.store.objects)
        assert what == "gone" or any(name in each for each in check_repository(site.repository).problems)
        assert repair_repository(site.repository, None).parity == 1
        need_sound(site)
        undo_repair(site.repository, None)
        assert same_but_for_locks(site, broken)


def test_one_pack_of_every_group_at_once(site: Site) -> None:
    data = noise("many", 80)
    snapshot = backup(site, data)
    groups = named(site, "parity/")
    assert len(groups) >= 3
    for number, group in enumerate(list(find_groups(site.store, site.keys.machine_id, []))):
        name = pack_name(site.keys.machine_id, sorted(group.packs)[number % len(group.packs)])
        apply(site, name, None if number % 2 else b"damaged")
    assert check_repository(site.repository).repairable == len(groups)
    assert restore(site, snapshot) == data
    assert repair_repository(site.repository, None).rebuilt == len(groups)
    assert check_repository(site.repository, keys=site.key, read_data=True).problems == []


def broken_all_over(site: Site) -> None:
    """Damage a pack, cut an index object, lose another, and spoil parity that is not needed for the pack."""
    packs, parity, index = (named(site, each) for each in ("packs/", "parity/", "index/"))
    site.store.objects[packs[0]] = site.store.objects[packs[0]][:-5]
    site.store.objects[index[0]] = b"cut"
    del site.store.objects[index[1]]
    for name in parity:
        trial = site.copy()
        trial.store.objects[name] = b"spoilt"
        if check_repository(trial.repository).repairable:
            site.store.objects[name] = b"spoilt"
            return


def test_everything_at_once(site: Site) -> None:
    broken_all_over(site)
    broken = dict(site.store.objects)
    result = repair_repository(site.repository, site.key)
    assert (result.rebuilt, result.aside, result.lost) == (1, 3, [])
    assert result.indexed > 0
    need_sound(site)
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0)  # nothing of it is in the way of a prune
    need_sound(site)
    other = site.copy()
    undone = undo_repair(site.repository, None)
    assert undone.returned == 3
    assert accept_repair(other.repository) == 1
    assert named(other, "aside/") == named(other, "repairs/") == []
    need_sound(other)
    assert broken.keys() - site.store.objects.keys() == set()


@pytest.mark.parametrize("after", [False, True])
def test_a_repair_that_dies_anywhere_goes_on_or_is_taken_back(start: Site, *, after: bool) -> None:
    site = start.copy()
    broken_all_over(site)
    broken = dict(site.store.objects)
    total = count_changes(site, lambda site: repair_repository(site.repository, site.key))
    assert total > 15
    for number in range(1, total + 1):
        dead = site.copy()
        die_at(number, after=after)(dead.store)
        with suppress(StoreDiedError):
            repair_repository(dead.repository, dead.key)
        calm = without_locks(dead)
        backwards = calm.copy()
        repair_repository(calm.repository, calm.key)
        need_sound(calm)
        for each in (backwards, calm):
            while last_repair(each.store) is not None:
                undo_repair(each.repository, None)
            assert same_but_for_locks(each, broken), number


@pytest.mark.parametrize("after", [False, True])
def test_an_undo_that_dies_anywhere_goes_on(start: Site, *, after: bool) -> None:
    site = start.copy()
    broken_all_over(site)
    broken = dict(site.store.objects)
    repair_repository(site.repository, site.key)
    total = count_changes(site, lambda site: undo_repair(site.repository, None))
    assert total > 15
    for number in range(1, total + 1):
        dead = site.copy()
        die_at(number, after=after)(dead.store)
        with suppress(StoreDiedError):
            undo_repair(dead.repository, None)
        calm = without_locks(dead)
        with suppress(RefusedError):  # it was all done, but for giving back the lock
            undo_repair(calm.repository, None)
        assert same_but_for_locks(calm, broken), number
        repair_repository(calm.repository, calm.key)
        need_sound(calm)


def count_changes(site: Site, work: Callable[[Site], object]) -> int:
    counting, count = site.copy(), 0

    def step(operation: tuple[str, str]) -> None:
        nonlocal count
        count += 1

    counting.store.before = step
    work(counting)
    return count


def without_locks(site: Site) -> Site:
    """Return what a dead computer leaves to others: its locks would be taken over, ours stand as long as we live."""
    store = MemoryStore({name: data for name, data in site.store.objects.items() if not name.startswith("locks/")})
    return Site(store, site.repository, site.keys, site.key).copy()


def test_repairs_are_taken_back_one_after_the_other(site: Site) -> None:
    states = [dict(site.store.objects)]
    for number in range(3):
        apply(site, named(site, "packs/")[number], b"damaged %d" % number)
        states.append(dict(site.store.objects))
        assert repair_repository(site.repository, None).number == number + 1
    for number in range(3):
        assert undo_repair(site.repository, None).number == 3 - number
        kept = {name: data for name, data in site.store.objects.items() if not name.startswith(("repairs/", "aside/"))}
        assert kept == {**states[0], named(site, "packs/")[2 - number]: b"damaged %d" % (2 - number)} | {
            name: b"damaged %d" % each for each, name in enumerate(named(site, "packs/")[:3]) if each >= 2 - number
        }
    with pytest.raises(RefusedError, match="no repair"):
        undo_repair(site.repository, None)
    with pytest.raises(RefusedError, match="no repair"):
        accept_repair(site.repository)


def test_a_prune_since_then_keeps_a_repair_from_being_taken_back(site: Site) -> None:
    """It may have condemned another pack with the same chunks, because the one that was rebuilt has them."""
    (name, *_) = named(site, "packs/")
    apply(site, name, None)
    repair_repository(site.repository, None)
    gone = backup(site, noise("not for long", 4))
    forget_snapshots(site.repository, site.key, [gone.id])
    prune_machine(site.repository, site.key, site.keys.machine_id)
    before = dict(site.store.objects)
    with pytest.raises(RefusedError, match="was pruned since the repair"):
        undo_repair(site.repository, site.key)
    assert same_but_for_locks(site, before)
    assert accept_repair(site.repository) == 1


def test_a_snapshot_that_relies_on_it_keeps_a_repair_from_being_taken_back(site: Site) -> None:
    (name, *_) = named(site, "packs/")
    apply(site, name, None)
    repair_repository(site.repository, None)
    relying = backup(site, _DATA + noise("more", 4) + b"since")
    before = dict(site.store.objects)
    with pytest.raises(RefusedError, match="was backed up since"):
        undo_repair(site.repository, None)
    with pytest.raises(RefusedError, match=f"{relying.id[:12]} of 'web'.*relies"):
        undo_repair(site.repository, site.key)
    assert same_but_for_locks(site, before)
    assert restore(site, relying) == _DATA + noise("more", 4) + b"since"
    forget_snapshots(site.repository, site.key, [relying.id])
    assert undo_repair(site.repository, site.key).removed == 1
    assert name not in site.store.objects


def test_a_snapshot_that_relies_on_the_index_does_so_too(site: Site) -> None:
    for name in named(site, "index/"):
        del site.store.objects[name]
    repair_repository(site.repository, site.key)
    backup(site, _DATA + noise("more", 4))
    with pytest.raises(RefusedError, match="relies"):
        undo_repair(site.repository, site.key)


def test_a_snapshot_that_needs_nothing_of_it_does_not(site: Site) -> None:
    first = named(site, "packs/")[0]
    apply(site, first, None)
    repair_repository(site.repository, None)
    unrelated = backup(site, noise("quite another", 3))
    assert undo_repair(site.repository, site.key).removed == 1
    assert restore(site, unrelated) == noise("quite another", 3)


def test_what_somebody_else_has_mended_stays(site: Site) -> None:
    """A pack that was set aside, and that came back from a copy, is not replaced by the damaged one."""
    name = named(site, "packs/")[0]
    good = site.store.objects[name]
    apply(site, name, b"damaged")
    repair_repository(site.repository, None)
    repair = last_repair(site.store)
    assert repair is not None
    number, step = repair.steps[-1]
    assert (step.action, step.name) == ("aside", name)
    assert not repair.undo_step(number, step)
    assert site.store.objects[name] == good


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize(
    "kind", ["keys/recipients/", "keys/slots/", "keys/machines/", "keys/secrets/", "index/", "maps/", "history/"]
)
def test_what_is_beyond_a_repair_is_told(start: Site, kind: str, *, gone: bool) -> None:
    """With a key the index is made anew; without one its loss cannot be told, nor that of what sealed records name."""
    for name in named(start, kind):
        for keyless in (True, False):
            site = start.copy()
            apply(site, name, None if gone else b"damaged")
            result = repair_repository(site.repository, None if keyless else site.key)
            told = "index/" not in kind if not keyless else not gone or kind in {"keys/recipients/", "keys/machines/"}
            if gone and kind in {"keys/slots/", "history/"}:
                told = name == named(start, "history/")[0]  # nothing names a passphrase, nor the newest entry
            assert bool(result.damaged) == told, (name, keyless)
            assert gone or not told or any(name in each for each in result.damaged)
            assert (result.lost, check_repository(site.repository, keys=None if keyless else site.key).ok) == (
                [],
                not told,
            )


@pytest.mark.parametrize("kind", ["keys/machines/", "keys/secrets/"])
def test_packs_that_nobody_can_say_are_unneeded_count_as_lost(site: Site, kind: str) -> None:
    group = max(find_groups(site.store, site.keys.machine_id, []), key=lambda group: len(group.packs))
    for identity in sorted(group.packs)[:2]:
        apply(site, pack_name(site.keys.machine_id, identity), None)
    assert len(repair_repository(site.copy().repository, site.key).lost) == 2
    apply(site, named(site, kind)[0], b"damaged")
    assert len(repair_repository(site.repository, site.key).lost) == 2


@pytest.mark.parametrize("name", ["repairs/", "aside/"])
def test_a_damaged_journal_is_beyond_a_repair(site: Site, name: str) -> None:
    apply(site, named(site, "packs/")[0], b"damaged")
    repair_repository(site.repository, site.key)
    apply(site, named(site, name)[-1], b"damaged as well")
    assert [named(site, name)[-1] in each for each in repair_repository(site.repository, site.key).damaged] == [True]


class Misread(MemoryStore):
    """A store in memory one read of which goes wrong: of the object `name`, after so many that went well."""

    name = ""
    passed = 0
    how = ""

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        data = super().get(name, start=start, size=size)
        if name == self.name:
            self.passed -= 1
            if self.passed == -1 and self.how == "unreadable":
                raise UnreadableError("a bad sector")
            if self.passed == -1:
                return data[: len(data) // 2] if self.how == "short" else bytes(len(data))
        return data


@pytest.mark.parametrize("passed", [0, 1, 2])
@pytest.mark.parametrize("how", ["short", "zeros", "unreadable"])
def test_what_was_misread_once_is_not_touched(start: Site, how: str, passed: int) -> None:
    for name in named(start, ""):
        store = Misread(dict(start.store.objects))
        site = Site(store, open_repository(store), start.keys, start.key)
        store.name, store.passed, store.how = name, passed, how
        result = repair_repository(site.repository, site.key)
        store.name = ""
        assert (result.aside, result.lost) == (0, []), name
        assert not result.damaged or name.startswith(("config", "keys/", "maps/")), "as a check would, it tells that"
        assert same_but_for_locks(site, start.store.objects) or result.indexed, name
        need_sound(site)


class Failing(MemoryStore):
    """A store in memory that cannot read some bytes of an object."""

    bad = range(0)

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        data = super().get(name, start=start, size=size)
        if name == "packs/bad" and range(max(start, self.bad.start), min(start + len(data), self.bad.stop)):
            raise UnreadableError("a bad sector")
        return data


@pytest.mark.parametrize("bad", [range(1), range(249, 250), range(99, 101), range(120, 130), range(250)])
def test_of_what_cannot_be_read_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch, bad: range) -> None:
    monkeypatch.setattr("remetal.repository.journal._PART", 100)
    monkeypatch.setattr("remetal.repository.journal._BLOCK", 10)
    data = bytes(range(1, 251))
    store = Failing({"packs/bad": data})
    store.bad = bad
    journal = Journal(store, {})
    journal.set_aside("packs/bad")
    assert (journal.aside, "packs/bad" in store.objects) == (1, False)
    repair = last_repair(store)
    assert repair is not None
    ((number, step),) = repair.steps
    blocks = [data[start : start + 10] for start in range(0, 250, 10)]
    kept = [bytes(10) if set(range(10 * n, 10 * n + 10)) & set(bad) else each for n, each in enumerate(blocks)]
    assert repair.read_aside(step) == b"".join(kept)
    store.bad = range(0)
    assert repair.undo_step(number, step)
    assert store.objects["packs/bad"] == b"".join(kept)


def test_a_damaged_journal_is_told_and_nothing_is_taken_back(site: Site) -> None:
    apply(site, named(site, "packs/")[0], b"damaged")
    repair_repository(site.repository, None)
    good = dict(site.store.objects)
    for name in named(site, "repairs/") + named(site, "aside/"):
        site.store.objects[name] = good[name][:-1] + b"?"
        assert any(name in each for each in check_repository(site.repository).problems)
        with pytest.raises(DamagedError):
            undo_repair(site.repository, None)
        site.store.objects[name] = good[name]
    undo_repair(site.repository, None)


def test_a_machine_at_work_is_passed_over(site: Site) -> None:
    apply(site, named(site, "packs/")[0], b"damaged")
    with hold_machine(site.store, site.keys.machine_id):
        result = repair_repository(site.repository, site.key)
    assert (result.rebuilt, result.busy) == (0, [site.keys.machine_id])
    assert repair_repository(site.repository, site.key).rebuilt == 1
    need_sound(site)


def test_only_one_repair_is_at_work(site: Site) -> None:
    with hold_machine(site.store, "0" * 32):
        for work in (repair_repository, undo_repair):
            with pytest.raises(UnavailableError):
                work(site.repository, None)


def test_parity_of_what_was_pruned_is_no_loss(site: Site) -> None:
    """Parity that tells of packs that are gone on purpose may bring one back: the next prune takes it away again."""
    stale = {name: site.store.objects[name] for name in named(site, "parity/")}
    snapshots = open_catalog(site.repository, site.key).snapshots()
    backup(site, noise("more", 4))
    forget_snapshots(site.repository, site.key, [each.id for each in snapshots])
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=1)
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=1)
    for data in (noise("other", 2), noise("another", 2)):  # until no ledger tells of them any more
        newest = backup(site, data)
        snapshots = open_catalog(site.repository, site.key).snapshots()
        forget_snapshots(site.repository, site.key, [each.id for each in snapshots if each.id != newest.id])
        prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=1)
    packs = named(site, "packs/")
    site.store.objects.update(stale)
    result = repair_repository(site.repository, site.key)
    assert result.lost == []
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=1)
    assert named(site, "packs/") == packs
    assert check_repository(site.repository, keys=site.key, read_data=True).problems == []


def test_a_repair_of_what_is_whole_changes_nothing(site: Site) -> None:
    before = dict(site.store.objects)
    result = repair_repository(site.repository, site.key)
    assert (result.number, result.rebuilt, result.indexed, result.parity, result.aside) == (0, 0, 0, 0, 0)
    assert same_but_for_locks(site, before)


def test_a_failing_store_is_told(site: Site) -> None:
    apply(site, named(site, "packs/")[0], b"damaged")
    die_at(4, after=False)(site.store)
    with pytest.raises(RemetalError):
        repair_repository(site.repository, site.key)
