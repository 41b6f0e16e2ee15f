"""Forgetting and pruning: nothing that is needed goes, all that is not goes in the end, whatever is cut off when."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec
import pytest

from remetal.errors import DamagedError, RefusedError, RemetalError, UnavailableError, UsageError
from remetal.repository import clocks, encoder
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository, rebuild_index
from remetal.repository.clocks import Witness, passed
from remetal.repository.forget import forget_snapshots
from remetal.repository.machines import MachineKeys
from remetal.repository.objects import encode_lines, put_named
from remetal.repository.packs import sealed_to
from remetal.repository.prune import prune_machine
from remetal.repository.recipients import MAX_RECIPIENTS, Revocation, put_revocation
from remetal.repository.remove import remove_recipient
from remetal.repository.repository import (
    accept_recipients,
    active_recipients,
    add_recipient,
    enroll_machine,
    list_keys,
    open_repository,
    unlock_with_passphrase,
)
from remetal.repository.retention import Policy, check_policy, choose_kept
from remetal.repository.session import open_session
from remetal.repository.snapshots import Snapshot
from remetal.storage import NotFoundError, RetainedError
from tests.repositories import CHUNK, Site, StoreDiedError, backup, die_at, make_site, noise, restore, write

_A, _B, _C = noise("a", 4), noise("b", 5), noise("c", 3)
_DATA = {"one": _A + _B, "two": _B + _C, "three": _C + noise("d", 4) + _A[:CHUNK]}


@pytest.fixture(autouse=True)
def many_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make packs and index objects small, so that a small backup has many of them."""
    monkeypatch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)
    monkeypatch.setattr(encoder, "PACKS_PER_INDEX", 2)


class Clock:
    """A host's clocks that the test sets."""

    def __init__(self) -> None:
        self.wall, self.uptime, self.boot = 1e9, 1e3, "boot-1"

    def now(self) -> Witness:
        return Witness(time=self.wall, host_id="h", boot_id=self.boot, uptime=self.uptime)

    def sleep(self, seconds: float) -> None:
        self.wall += seconds
        self.uptime += seconds

    def reboot(self, jump: float = 0.0) -> None:
        self.wall += jump
        self.uptime, self.boot = 10.0, f"{self.boot}+"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("remetal.repository.prune.witness_now", clock.now)
    return clock


def three(site: Site) -> dict[str, Snapshot]:
    return {name: backup(site, data, workers=1) for name, data in _DATA.items()}


@pytest.fixture
def site() -> Site:
    return make_site()


def prune(site: Site, grace: float = 0.0, max_unused: float = 0.0, *, reseal: bool = False) -> None:
    machine = site.keys.machine_id
    prune_machine(site.repository, site.key, machine, grace=grace, max_unused=max_unused, reseal=reseal)


def sound(site: Site, expected: dict[str, bytes]) -> None:
    """Everything that is listed is what was acknowledged, restores to the last bit, and no check complains."""
    listed = {each.id: each for each in open_catalog(site.repository, site.key).snapshots()}
    assert listed.keys() == expected.keys()
    for identity, data in expected.items():
        assert restore(site, listed[identity]) == data
    assert check_repository(site.repository, keys=site.key, read_data=True).problems == []
    assert check_repository(site.repository, keys=None).problems == []
    assert check_repository(site.repository, keys=site.keys).problems == []


def stored_bytes(site: Site) -> int:
    return sum(entry.size for entry in site.store.entries("packs/"))


def test_forgotten_snapshots_are_gone_and_the_rest_is_whole(site: Site) -> None:
    made = three(site)
    before = stored_bytes(site)
    assert forget_snapshots(site.repository, site.key, [made["two"].id, "nonsense"]) == [made["two"].id]
    kept = {made[name].id: _DATA[name] for name in ("one", "three")}
    sound(site, kept)
    assert stored_bytes(site) == before
    assert len(list(site.store.entries("history/"))) == 3
    prune(site)
    sound(site, kept)
    after = backup(site, _DATA["two"])
    assert after.sequence == 6
    sound(site, {**kept, after.id: _DATA["two"]})


def test_what_is_left_is_as_small_as_a_fresh_repository(site: Site) -> None:
    made = three(site)
    forget_snapshots(site.repository, site.key, [made["one"].id, made["two"].id])
    prune(site)
    sound(site, {made["three"].id: _DATA["three"]})
    fresh = make_site()
    backup(fresh, _DATA["three"], workers=1)
    assert stored_bytes(site) <= stored_bytes(fresh) + 2 * 1300
    assert len(list(site.store.entries("maps/"))) == 1
    prune(site)
    sound(site, {made["three"].id: _DATA["three"]})


def test_nothing_to_do_changes_nothing(site: Site) -> None:
    three(site)
    before = dict(site.store.objects)
    prune(site, max_unused=1.0)
    assert site.store.objects == before


def test_the_newest_may_be_forgotten_and_the_machine_goes_on(site: Site) -> None:
    made = three(site)
    forget_snapshots(site.repository, site.key, [each.id for each in made.values()])
    prune(site)
    sound(site, {})
    assert stored_bytes(site) == 0
    following = backup(site, _DATA["one"])
    assert following.sequence > 4
    sound(site, {following.id: _DATA["one"]})


def test_a_policy_keeps_the_newest_of_each_period() -> None:
    times = [f"2026-{month:02}-{day:02}T{hour:02}:00:00Z" for month in (1, 2, 3) for day in (1, 15) for hour in (1, 13)]
    made = [_dated(number, time) for number, time in enumerate(times, start=1)]

    def kept(policy: Policy) -> list[int]:
        return sorted(int(each) for each in choose_kept(made, policy))

    assert kept(Policy(keep_last=2)) == [11, 12]
    assert kept(Policy(keep_daily=3)) == [8, 10, 12]
    assert kept(Policy(keep_monthly=2)) == [8, 12]
    assert kept(Policy(keep_yearly=5)) == [12]
    assert kept(Policy(keep_hourly=1, keep_weekly=2)) == [10, 12]
    assert kept(Policy(keep_last=1, keep_tag=("3",))) == [3, 12]
    assert choose_kept(made, Policy(keep_last=1, keep_daily=1))["12"] == ("newest", "last", "daily")
    assert choose_kept([], Policy(keep_last=1)) == {}


def test_a_policy_survives_wrong_clocks() -> None:
    """A snapshot ten years ahead takes one place of each rule and no more; the newest is the one made last."""
    made = [_dated(1, "2026-01-01T00:00:00Z"), _dated(2, "2036-01-01T00:00:00Z"), _dated(3, "2026-01-02T00:00:00Z")]
    made.append(_dated(4, "not a time"))
    assert sorted(choose_kept(made, Policy(keep_daily=3))) == ["2", "3", "4"]
    assert sorted(choose_kept(made, Policy(keep_yearly=9))) == ["2", "3", "4"]


@pytest.mark.parametrize("policy", [Policy(), Policy(keep_tag=("a",)), Policy(keep_last=-1, keep_daily=3)])
def test_policies_that_make_no_sense(policy: Policy) -> None:
    with pytest.raises(UsageError):
        check_policy(policy)


def _dated(number: int, time: str) -> Snapshot:
    return Snapshot(
        id=str(number),
        machine_id="m",
        machine="web",
        sequence=number,
        previous="",
        time=time,
        hostname="",
        tags=(str(number),),
        version="",
        layout=b"",
        images=(),
    )


def test_the_grace_period_is_kept(site: Site, clock: Clock) -> None:
    made = three(site)
    forget_snapshots(site.repository, site.key, [made["one"].id])
    kept = {made[name].id: _DATA[name] for name in ("two", "three")}
    before = stored_bytes(site)
    prune(site, grace=100)
    clock.sleep(99)
    prune(site, grace=100)
    assert stored_bytes(site) >= before
    sound(site, kept)
    clock.sleep(2)
    prune(site, grace=100)
    assert stored_bytes(site) < before
    sound(site, kept)


@pytest.mark.parametrize("jump", [10 * 365 * 86400.0, 3600.0, -3600.0, -10 * 365 * 86400.0])
def test_no_single_wrong_clock_ends_the_grace_period(site: Site, clock: Clock, jump: float) -> None:
    made = three(site)
    forget_snapshots(site.repository, site.key, [made["one"].id])
    before = stored_bytes(site)
    prune(site, grace=7200)
    clock.reboot(jump)
    prune(site, grace=7200)
    clock.sleep(600)
    prune(site, grace=7200)
    assert stored_bytes(site) >= before
    clock.sleep(7200)
    prune(site, grace=7200)
    assert stored_bytes(site) < before
    sound(site, {made[name].id: _DATA[name] for name in ("two", "three")})


def test_how_much_time_has_surely_passed() -> None:
    def at(time: float, boot: str, uptime: float) -> Witness:
        return Witness(time=time, host_id="h", boot_id=boot, uptime=uptime)

    assert passed(at(0, "a", 5), at(1e9, "a", 65), most=10) == 60
    assert passed(at(0, "a", 5), at(1e9, "b", 65), most=10) == 10
    assert passed(at(50, "a", 5), at(53, "b", 65), most=10) == 3
    assert passed(at(50, "a", 5), at(-1e9, "b", 65), most=10) == -10
    assert passed(at(50, "", 5), at(51, "", 65), most=10) == 1
    assert clocks.witness_now().uptime > 0


def test_a_restore_under_way_goes_on_while_a_prune_runs(site: Site, clock: Clock) -> None:
    from remetal.repository.reader import open_reader

    made = three(site)
    with open_reader(site.repository, site.key, made["one"]) as reader:
        forget_snapshots(site.repository, site.key, [made["one"].id])
        prune(site, grace=100)
        image = made["one"].images[0]
        chunks = [reader.read_chunk(each) for run in reader.runs(image) for each in run.ids]
    assert b"".join(chunks) == _DATA["one"]


def test_a_backup_that_began_before_a_prune_does_not_rely_on_what_it_condemned(site: Site) -> None:
    """It slept past its lease, so the prune did not wait for it; then it goes on."""
    made = three(site)
    with open_session(site.repository, site.keys, workers=1) as session:
        write(session, _DATA["one"])
        _drop_locks(site)
        forget_snapshots(site.repository, site.key, [made["one"].id])
        prune(site)
        session._lock.check = lambda: None  # type: ignore[method-assign]  # it was asked a moment too early
        with pytest.raises(UnavailableError, match="a prune ran"):
            session.commit(layout=b"{}", hostname="h")
    _drop_locks(site)
    kept = {made[name].id: _DATA[name] for name in ("two", "three")}
    sound(site, kept)
    again = backup(site, _DATA["one"])
    sound(site, {**kept, again.id: _DATA["one"]})


def test_a_backup_commits_behind_a_forget_that_came_in_between(site: Site) -> None:
    made = three(site)
    with open_session(site.repository, site.keys, workers=1) as session:
        write(session, _DATA["one"])
        forget_snapshots(site.repository, site.key, [made["two"].id])
        snapshot = session.commit(layout=b"{}", hostname="h")
    assert snapshot.sequence == 5
    sound(site, {made["one"].id: _DATA["one"], made["three"].id: _DATA["three"], snapshot.id: _DATA["one"]})


def _drop_locks(site: Site) -> None:
    for entry in list(site.store.entries("locks/")):
        site.store.delete(entry.name)


def test_a_page_that_is_condemned_is_not_used_again(site: Site, clock: Clock) -> None:
    """The same content comes back while its map's page waits for its end: it gets a page of another name."""
    made = three(site)
    forget_snapshots(site.repository, site.key, [made["one"].id])
    prune(site, grace=100)
    again = backup(site, _DATA["one"], workers=1)
    clock.sleep(101)
    prune(site, grace=100)
    sound(site, {made["two"].id: _DATA["two"], made["three"].id: _DATA["three"], again.id: _DATA["one"]})
    assert again.images[0].pages != made["one"].images[0].pages


@pytest.mark.parametrize("prefix", ["index/", "maps/", "packs/"])
def test_a_prune_that_slept_deletes_nothing_that_came_back(site: Site, prefix: str) -> None:
    """It sleeps amid its deletions; another one finishes them and has others, and the same content is stored again.

    Nobody knows any more then what the first prune is about to delete.
    """
    made = three(site)
    forget_snapshots(site.repository, site.key, [made["one"].id])
    again: list[Snapshot] = []

    def sleep(operation: tuple[str, str]) -> None:
        if operation[0] == "delete" and operation[1].startswith(prefix):
            site.store.before = lambda operation: None
            _drop_locks(site)
            forget_snapshots(site.repository, site.key, [made["two"].id])
            prune(site)
            again.append(backup(site, _DATA["one"], workers=1))

    site.store.before = sleep
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0)
    sound(site, {made["three"].id: _DATA["three"], again[0].id: _DATA["one"]})


def test_an_unchanged_page_is_kept(site: Site) -> None:
    """A snapshot has the pages of the one before it, as long as nothing in them has changed, and they may stay."""
    first = backup(site, _DATA["one"])
    second = backup(site, _DATA["one"])
    other = backup(site, _DATA["two"])
    assert second.images[0].pages == first.images[0].pages
    assert len(list(site.store.entries("maps/"))) == 2
    again = backup(site, _DATA["one"])
    assert again.images[0].pages != first.images[0].pages
    name = f"maps/{site.keys.machine_id}/{again.images[0].pages[0].hex()}"
    site.store.objects[name] = b"damaged"
    mended = backup(site, _DATA["one"])
    assert mended.images[0].pages != again.images[0].pages
    forget_snapshots(site.repository, site.key, [again.id])
    prune(site)
    sound(site, {each.id: _DATA["one"] for each in (first, second, mended)} | {other.id: _DATA["two"]})


def test_no_page_is_kept_while_nobody_knows_what_is_condemned(site: Site) -> None:
    """What was decided last cannot be read: it may be that the pages of the snapshot before are being deleted."""
    before = backup(site, _DATA["one"])
    following = backup(site, _DATA["one"])
    forget_snapshots(site.repository, site.key, [before.id])
    site.store.objects[f"history/{site.keys.machine_id}/{3:016x}"] = b"damaged"
    again = backup(site, _DATA["one"])
    assert again.images[0].pages != following.images[0].pages
    assert restore(site, again) == _DATA["one"]


def test_a_listing_that_hid_an_index_costs_nothing(site: Site, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store once shows less than it holds: the prune refuses, or what it condemned is found to be needed."""
    made = three(site)
    everything = {made[name].id: _DATA[name] for name in made}
    entries = site.store.entries
    for hidden in ("index/", "packs/", "maps/", "history/"):
        for number in range(len(list(entries(hidden)))):
            monkeypatch.setattr(
                site.store,
                "entries",
                lambda prefix, hidden=hidden, number=number: iter(
                    [e for at, e in enumerate(entries(prefix)) if not (prefix.startswith(hidden) and at == number)]
                ),
            )
            with suppress(RemetalError):
                prune(site, grace=100)
            monkeypatch.setattr(site.store, "entries", entries)
            clock.sleep(1000)
            prune(site, grace=100)
            prune(site, grace=100)
            sound(site, everything)


@pytest.mark.parametrize("prefix", ["history/", "index/", "maps/", "packs/"])
def test_nothing_is_deleted_while_something_is_damaged(site: Site, prefix: str) -> None:
    made = three(site)
    forget_snapshots(site.repository, site.key, [made["two"].id])
    for name in [entry.name for entry in site.store.entries(prefix)]:
        good = site.store.objects[name]
        for bad in (good[:-1], b"", None):
            broken = site.copy()
            if bad is None:
                del broken.store.objects[name]
            else:
                broken.store.objects[name] = bad
            before = dict(broken.store.objects)
            try:
                prune(broken)
            except DamagedError:
                gone = before.keys() - broken.store.objects.keys()
                assert not {each for each in gone if not each.startswith("locks/")}, (name, bad)
            else:
                broken.store.objects[name] = good
                sound(broken, {made[each].id: _DATA[each] for each in ("one", "three")})


def test_what_was_condemned_does_not_come_back_by_a_repair(site: Site, clock: Clock) -> None:
    made = three(site)
    forget_snapshots(site.repository, site.key, [made["one"].id])
    prune(site, grace=100)
    assert rebuild_index(site.repository, site.key) == 0
    clock.sleep(101)
    prune(site, grace=100)
    sound(site, {made[name].id: _DATA[name] for name in ("two", "three")})


def test_what_an_interrupted_backup_left_goes(site: Site) -> None:
    made = three(site)
    other = Site(site.store, site.repository, enroll_machine(site.repository, "db"), site.key)
    theirs = backup(other, _DATA["two"])
    calm = dict(site.store.objects)
    die_at(8, after=True)(site.store)
    with pytest.raises(StoreDiedError):
        backup(site, noise("lost", 8), workers=1)
    for what in ("before", "after"):
        setattr(site.store, what, lambda operation: None)
    _drop_locks(site)
    assert stored_bytes(site) > sum(len(data) for name, data in calm.items() if name.startswith("packs/"))
    prune(site)
    assert stored_bytes(site) <= sum(len(data) for name, data in calm.items() if name.startswith("packs/"))
    sound(site, {**{made[name].id: _DATA[name] for name in made}, theirs.id: _DATA["two"]})


def test_packs_that_are_written_anew_open_for_those_that_could_open_them(site: Site) -> None:
    one = backup(site, _DATA["one"], workers=1)
    second = _second(site)
    two = backup(site, _DATA["two"], workers=1)
    forget_snapshots(site.repository, site.key, [one.id])
    prune(site)
    sound(site, {two.id: _DATA["two"]})
    with pytest.raises(RemetalError):
        restore(second, two)
    accept_recipients(site.repository, site.keys)
    three = backup(site, noise("new", 3), workers=1)
    assert restore(second, three) == noise("new", 3)


def test_old_packs_are_sealed_anew_to_those_that_count(site: Site) -> None:
    one = backup(site, _DATA["one"], workers=1)
    second = _second(site)
    accept_recipients(site.repository, site.keys)
    two = backup(site, _DATA["two"], workers=1)
    for snapshot in (one, two):
        with pytest.raises(RemetalError):
            restore(second, snapshot)
    prune(site, reseal=True)
    for snapshot, name in ((one, "one"), (two, "two")):
        assert restore(second, snapshot) == _DATA[name]
    sound(site, {one.id: _DATA["one"], two.id: _DATA["two"]})
    before = dict(site.store.objects)
    prune(site, reseal=True)
    assert site.store.objects == before


def test_a_removed_recipient_opens_nothing_new_and_in_the_end_nothing(site: Site) -> None:
    second = _second(site)
    accept_recipients(site.repository, site.keys)
    one = backup(site, _DATA["one"], workers=1)
    assert restore(second, one) == _DATA["one"]
    remove_recipient(site.repository, site.key, second.key.id)
    with pytest.raises(RefusedError, match="opens nothing"):
        unlock_with_passphrase(site.repository, "second")
    assert [each.kind for each in list_keys(site.repository)].count("revoked") == 1
    two = backup(site, _DATA["two"], workers=1)
    assert [each.id for each in site.keys.stored.recipients] == [site.key.id]
    assert open_catalog(second.repository, second.key).snapshots() == []
    prune(site, reseal=True)
    sound(site, {one.id: _DATA["one"], two.id: _DATA["two"]})
    for entry in site.store.entries("packs/"):
        assert sealed_to(entry.name, site.store.get(entry.name)) == [site.key.id]
    other = Site(site.store, site.repository, enroll_machine(site.repository, "db"), site.key)
    assert [each.id for each in other.keys.stored.recipients] == [site.key.id]


def test_the_founder_can_be_removed_by_another(site: Site) -> None:
    second = _second(site)
    accept_recipients(site.repository, site.keys)
    one = backup(site, _DATA["one"], workers=1)
    remove_recipient(site.repository, second.key, site.key.id)
    two = backup(site, _DATA["two"], workers=1)
    assert restore(second, one) == _DATA["one"]
    assert restore(second, two) == _DATA["two"]
    assert [each.id for each in site.keys.stored.recipients] == [second.key.id]
    assert check_repository(site.repository, keys=second.key, read_data=True).ok


def test_removals_that_are_refused(site: Site) -> None:
    second = _second(site)
    with pytest.raises(RefusedError, match="cannot remove itself"):
        remove_recipient(site.repository, site.key, site.key.id)
    with pytest.raises(RefusedError, match="there is no recipient"):
        remove_recipient(site.repository, site.key, "00" * 16)
    accept_recipients(site.repository, site.keys)
    remove_recipient(site.repository, site.key, second.key.id)
    with pytest.raises(RefusedError, match="counts no more"):
        remove_recipient(site.repository, second.key, site.key.id)


def test_a_prune_protects_all_that_is_needed_and_nothing_else(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a store locks for some time is locked again: with nothing but that the snapshot comes back."""
    first = backup(site, _DATA["one"], workers=1)
    second = backup(site, _DATA["two"], workers=1)
    forget_snapshots(site.repository, site.key, [first.id])
    kept: list[str] = []

    def keep(store: object, names: Iterable[str]) -> int:
        kept.extend(names)
        return 0

    monkeypatch.setattr(type(site.store), "keep", keep)
    prune_machine(site.repository, site.key, site.keys.machine_id)
    going = {name for name in site.store.objects if name not in kept and not name.startswith("locks/")}
    assert any(name.startswith("packs/") for name in going)
    for name in going:
        del site.store.objects[name]
    assert restore(site, second) == _DATA["two"]
    result = check_repository(site.repository, keys=site.key, read_data=True)
    assert (result.problems, result.unprotected) == ([], 0)


def test_what_is_locked_still_is_not_locked_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is condemned, doomed, forgotten or replaced would stay for ever."""
    made = three(site)
    before = set(site.store.objects)
    forget_snapshots(site.repository, site.key, [made["one"].id, made["two"].id])
    kept: set[str] = set()

    def keep(store: object, names: Iterable[str]) -> int:
        kept.update(names)
        return 0

    monkeypatch.setattr(type(site.store), "keep", keep)
    delete = site.store.delete

    def delete_locks(name: str) -> None:
        if not name.startswith("locks/"):
            raise RetainedError(f"{name} is locked")
        delete(name)

    with monkeypatch.context() as patch:
        patch.setattr(site.store, "delete", delete_locks)
        for grace in (100, 100, 0, 0):
            kept.clear()
            prune(site, grace=grace)
    prune(site)
    left = before & set(site.store.objects)
    assert before - left == before - kept
    for folder in ("packs/", "index/", "maps/", "parity/", "history/"):
        assert any(name.startswith(folder) for name in before - left), folder
    sound(site, {made["three"].id: _DATA["three"]})


def test_who_alone_opens_something_is_not_removed(site: Site) -> None:
    """Neither what was stored before the machine accepted another recipient is lost, nor what it stores after that."""
    one = backup(site, _DATA["one"], workers=1)
    second = _second(site)
    before = dict(site.store.objects)
    with pytest.raises(RefusedError, match=r"none of the other recipients opens: \d+ of machine 'web'"):
        remove_recipient(site.repository, second.key, site.key.id)
    assert site.store.objects == before
    accept_recipients(site.repository, site.keys)
    two = backup(site, _DATA["two"], workers=1)
    with pytest.raises(RefusedError, match="none of the other recipients opens"):
        remove_recipient(site.repository, second.key, site.key.id)
    prune(site, reseal=True)
    remove_recipient(site.repository, second.key, site.key.id)
    assert [restore(second, each) for each in (one, two)] == [_DATA["one"], _DATA["two"]]


def test_what_one_recipient_alone_opens_may_be_abandoned(site: Site) -> None:
    one = backup(site, _DATA["one"], workers=1)
    second = _second(site)
    remove_recipient(site.repository, second.key, site.key.id, abandon=True)
    with pytest.raises(RemetalError):
        restore(second, one)


def test_a_machine_whose_recipients_are_all_removed_makes_no_backup_that_nobody_opens(site: Site) -> None:
    second = _second(site)
    remove_recipient(site.repository, second.key, site.key.id)
    before = dict(site.store.objects)
    with pytest.raises(RefusedError, match="nobody could open this backup"):
        backup(site, _DATA["one"])
    with pytest.raises(RefusedError, match="nobody could open this backup"):
        enroll_machine(site.repository, "web", pinned=site.keys.stored.recipients)
    assert {name for name in site.store.objects if not name.startswith("locks/")} == set(before)
    accept_recipients(site.repository, site.keys)
    one = backup(site, _DATA["one"])
    assert restore(second, one) == _DATA["one"]
    assert [each.id for each in site.keys.stored.recipients] == [second.key.id]


def test_a_removal_that_was_cut_off_is_ended_by_another(site: Site) -> None:
    second = _second(site)
    accept_recipients(site.repository, site.keys)
    put_revocation(site.store, second.key.id, key=site.key, created="2026-01-01T00:00:00Z")
    remove_recipient(site.repository, site.key, second.key.id)
    with pytest.raises(RefusedError, match="opens nothing"):
        unlock_with_passphrase(site.repository, "second")
    assert not [name for name in site.store.objects if name.startswith("keys/secrets/") and second.key.id in name]


def test_recipients_come_and_go_more_often_than_there_may_be_at_once(site: Site) -> None:
    """Those that were removed take nobody's place, and what they have said about others stays good."""
    one = backup(site, _DATA["one"], workers=1)
    keys = [site.key]
    for number in range(MAX_RECIPIENTS + 2):
        add_recipient(site.repository, keys[-1], f"number {number}")
        keys.append(unlock_with_passphrase(site.repository, f"number {number}"))
        accept_recipients(site.repository, site.keys)
        prune_machine(site.repository, keys[-2], site.keys.machine_id, grace=0.0, reseal=True)
        remove_recipient(site.repository, keys[-1], keys[-2].id)
        backup(site, _DATA["two"], workers=1)
    assert [each.id for each in active_recipients(site.repository)] == [keys[-1].id]
    assert restore(Site(site.store, site.repository, site.keys, keys[-1]), one) == _DATA["one"]
    assert check_repository(site.repository, keys=keys[-1], read_data=True).ok


def test_more_recipients_than_there_may_be_are_refused(site: Site) -> None:
    for number in range(MAX_RECIPIENTS - 1):
        add_recipient(site.repository, site.key, f"number {number}")
    before = dict(site.store.objects)
    with pytest.raises(RefusedError, match=f"has {MAX_RECIPIENTS} recipients, and cannot have more"):
        add_recipient(site.repository, site.key, "one too many")
    assert site.store.objects == before


def test_a_machine_keeps_a_recipient_at_least(site: Site) -> None:
    """Two recipients have removed one another: the machine goes on sealing to those that it knows."""
    second = _second(site)
    accept_recipients(site.repository, site.keys)
    put_revocation(site.store, site.key.id, key=second.key, created="t")
    put_revocation(site.store, second.key.id, key=site.key, created="t")
    one = backup(site, _DATA["one"], workers=1)
    assert restore(site, one) == _DATA["one"]
    assert restore(second, one) == _DATA["one"]


def test_a_removal_that_nobody_vouches_for_means_nothing(site: Site) -> None:
    stranger = make_site()
    put_revocation(site.store, site.key.id, key=stranger.key, created="t")
    forged = Revocation(id="11" * 16, repository=site.repository.config.id, revoked_by=site.key.id, created="t")
    put_named(site.store, f"keys/revoked/{site.key.id}.", encode_lines(forged, bytes(64)))
    assert next(each.kind for each in list_keys(site.repository)) == "recipient"
    result = check_repository(site.repository, keys=None)
    assert sum("keys/revoked/" in problem for problem in result.problems) == 2
    backup(site, _DATA["one"])


def _second(site: Site) -> Site:
    """Add a recipient, and return the site with its key."""
    add_recipient(site.repository, site.key, "second")
    key = unlock_with_passphrase(site.repository, "second")
    return Site(site.store, site.repository, site.keys, key)


def _count(site: Site, work: Callable[[Site], object]) -> int:
    count = 0

    def step(operation: tuple[str, str]) -> None:
        nonlocal count
        count += 1

    site.store.before = step
    work(site)
    return count


@pytest.mark.parametrize("after", [False, True])
def test_a_store_that_dies_at_any_change_of_forget_and_prune_loses_nothing(after: bool, clock: Clock) -> None:
    start = make_site()
    made = three(start)
    kept = {made[name].id: _DATA[name] for name in ("two", "three")}

    def forget(site: Site) -> None:
        forget_snapshots(site.repository, site.key, [made["one"].id])

    def forgotten(site: Site) -> Site:
        forget(site)
        return site

    def condemned(site: Site) -> Site:
        prune(forgotten(site), grace=100)
        clock.sleep(101)
        return site

    works: list[tuple[Callable[[Site], Site], Callable[[Site], None]]] = [
        (lambda site: site, forget),
        (forgotten, lambda site: prune(site, grace=100)),
        (forgotten, prune),
        (condemned, lambda site: prune(site, grace=100)),
    ]
    for prepare, work in works:
        base = prepare(start.copy())
        total = _count(base.copy(), work)
        assert total >= 2
        for number in range(1, total + 1):
            site = base.copy()
            die_at(number, after=after)(site.store)
            with suppress(StoreDiedError) if number == total else pytest.raises(StoreDiedError):
                work(site)  # the last change may be that of giving the lock back, which nobody waits for
            store = site.store.copy()
            survived = Site(store, open_repository(store), MachineKeys(site.keys.stored), site.key)
            _drop_locks(survived)
            listed = {each.id for each in open_catalog(survived.repository, survived.key).snapshots()}
            expected = dict(kept)
            if made["one"].id in listed:
                assert work is forget
                expected[made["one"].id] = _DATA["one"]
            sound(survived, expected)
            following = backup(survived, _DATA["one"], workers=1)
            sound(survived, {**expected, following.id: _DATA["one"]})
            work(survived)
            prune(survived)
            expected = {identity: data for identity, data in expected.items() if identity != made["one"].id}
            sound(survived, {**expected, following.id: _DATA["one"]})


def test_a_ledger_that_a_stranger_wrote_means_nothing(site: Site) -> None:
    made = three(site)
    stranger = make_site()
    theirs = backup(stranger, _DATA["one"])
    forget_snapshots(stranger.repository, stranger.key, [theirs.id])
    name = max(entry.name for entry in stranger.store.entries("history/"))
    forged = f"history/{site.keys.machine_id}/{4:016x}"
    site.store.objects[forged] = stranger.store.objects[name]
    catalog = open_catalog(site.repository, site.key)
    assert len(catalog.snapshots()) == 3
    assert any(forged in problem for problem in catalog.problems)
    following = backup(site, _DATA["one"])
    assert following.sequence == 5
    assert restore(site, following) == _DATA["one"]
    assert restore(site, made["one"]) == _DATA["one"]


@pytest.mark.parametrize("kind", ["keys/machines/", "keys/secrets/", "history/"])
def test_what_cannot_be_seen_is_not_forgotten_in_silence(site: Site, kind: str) -> None:
    first, _ = backup(site, _A), backup(site, _B)
    name = next(name for name in site.store.objects if name.startswith(kind))
    site.store.objects[name] = b"damaged"
    before = dict(site.store.objects)
    with pytest.raises(DamagedError, match=name):
        forget_snapshots(site.repository, site.key, [first.id])
    assert site.store.objects == before


def test_a_machine_cannot_forget(site: Site) -> None:
    """A ledger that is signed by the machine's own key is no ledger."""
    import zstandard

    from remetal.repository.history import LEDGER, Gone, encode_clear, entry_name, sign_entry
    from remetal.repository.ledgers import NOTHING_DOOMED, LedgerBody

    made = three(site)
    one = made["one"]
    body = LedgerBody(
        time="t",
        version="v",
        gone=(Gone(first=1, last=1, previous="", id=one.id),),
        condemned=(),
        doomed=NOTHING_DOOMED,
    )
    packed = zstandard.ZstdCompressor().compress(msgspec.msgpack.encode(body))
    for signer in ("", site.key.id, site.keys.machine_id):
        clear = encode_clear(
            LEDGER,
            site.repository.config.id,
            site.keys.machine_id,
            4,
            previous=made["three"].id,
            ledger=0,
            signer=signer,
            size=len(packed),
        )
        data = sign_entry(LEDGER, site.keys.stored.signing_seed, clear, packed)
        site.store.objects[entry_name(site.keys.machine_id, 4)] = data
        assert len(open_catalog(site.repository, site.key).snapshots()) == 3
        with pytest.raises(DamagedError, match="damaged"):
            prune(site)
    with pytest.raises(NotFoundError):
        site.store.get(f"locks/{site.keys.machine_id}/{1:016x}")
