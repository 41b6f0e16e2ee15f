"""A store that dies at any change, two backups at once, and locks that somebody left behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec
import pytest

from remetal.errors import RefusedError, RemetalError, UnavailableError
from remetal.repository import encoder
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.locks import LEASE, LockRecord, MachineLock, _this_process, hold_machine, is_stale
from remetal.repository.machines import MachineKeys
from remetal.repository.objects import encode_json
from remetal.repository.packs import Codec, Encoding
from remetal.repository.repository import add_recipient, enroll_machine, init_repository, list_keys, open_repository
from remetal.repository.session import Batch, open_session
from remetal.system.locks import process_start
from tests.repositories import (
    CHUNK,
    MemoryStore,
    Operation,
    Site,
    StoreDiedError,
    backup,
    die_at,
    make_site,
    restore,
    write,
)

_FIRST = os.urandom(4 * CHUNK)
_SECOND = os.urandom(5 * CHUNK) + _FIRST[CHUNK:]
_SITE = make_site()
_SNAPSHOT = backup(_SITE, _FIRST)


@pytest.fixture
def site() -> Site:
    return _SITE.copy()


@pytest.fixture
def many_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make packs and index objects small, so that a small backup has many of them."""
    monkeypatch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)
    monkeypatch.setattr(encoder, "PACKS_PER_INDEX", 2)


def changes_of_a_backup(site: Site) -> int:
    count = 0

    def step(operation: tuple[str, str]) -> None:
        nonlocal count
        count += 1

    site.store.before = step
    backup(site, _SECOND)
    return count


@pytest.mark.usefixtures("many_packs")
@pytest.mark.parametrize("after", [False, True])
def test_a_store_that_dies_at_any_change_loses_nothing(after: bool) -> None:
    total = changes_of_a_backup(_SITE.copy())
    assert total > 8
    for number in range(1, total + 1):
        site = _SITE.copy()
        die_at(number, after=after)(site.store)
        acknowledged = attempt(site)
        store = site.store.copy()
        survived = Site(store, open_repository(store), MachineKeys(site.keys.stored), site.key)
        snapshots = {each.id: each for each in open_catalog(survived.repository, survived.key).snapshots()}
        assert _SNAPSHOT.id in snapshots
        assert acknowledged is None or acknowledged in snapshots
        assert check_repository(survived.repository, keys=survived.key, read_data=True).problems == []
        for snapshot in snapshots.values():
            assert restore(survived, snapshot) == (_FIRST if snapshot.id == _SNAPSHOT.id else _SECOND)
        forget_lock(survived)
        following = backup(survived, _SECOND)
        assert restore(survived, following) == _SECOND
        assert check_repository(survived.repository, keys=survived.keys).problems == []


def attempt(site: Site) -> str | None:
    try:
        return backup(site, _SECOND).id
    except StoreDiedError:
        return None


def forget_lock(site: Site) -> None:
    """Our own process is alive, so its lock would stand; a dead one's is the test below."""
    for entry in list(site.store.entries("locks/")):
        site.store.delete(entry.name)


@pytest.mark.usefixtures("many_packs")
def test_the_backup_after_a_broken_one_reuses_its_packs(site: Site) -> None:
    die_at(9, after=True)(site.store)
    with pytest.raises(StoreDiedError):
        backup(site, os.urandom(3 * CHUNK) + _SECOND)
    store = site.store.copy()
    survived = Site(store, open_repository(store), MachineKeys(site.keys.stored), site.key)
    forget_lock(survived)
    assert len(list(survived.store.entries("index/"))) > len(list(_SITE.store.entries("index/")))
    with open_session(survived.repository, survived.keys) as session:
        write(session, _SECOND)
        session.commit(layout=b"{}", hostname="h")
    assert session.statistics.chunks_known > 3


@pytest.mark.usefixtures("many_packs")
def test_index_objects_grow_with_what_is_stored(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """So there are not many of them, and never is more than a part of the packs in none."""
    monkeypatch.setattr(encoder, "_SHARE_AT_RISK", 4)
    before = {entry.name for entry in site.store.entries("index/")}
    packs, at_risk, indexed = 0, 0, 0

    def step(operation: tuple[str, str]) -> None:
        nonlocal packs, at_risk, indexed
        packs += operation[1].startswith("packs/")
        if operation[1].startswith("index/"):
            indexed = packs
        elif packs > 20:
            at_risk = max(at_risk, packs - indexed - packs // 4)

    site.store.before = step
    backup(site, os.urandom(120 * CHUNK))
    assert packs >= 60
    assert at_risk <= 2 + encoder.UPLOADERS
    assert 5 < len({entry.name for entry in site.store.entries("index/")} - before) < 20


def test_leaving_without_commit_lists_nothing_and_keeps_the_chunks(site: Site) -> None:
    with open_session(site.repository, site.keys) as session:
        write(session, _SECOND)
    assert [each.id for each in open_catalog(site.repository, site.key).snapshots()] == [_SNAPSHOT.id]
    assert list(site.store.entries("locks/")) == []
    assert check_repository(site.repository, keys=site.key).ok


def test_an_interrupt_releases_every_batch(site: Site) -> None:
    taken: list[int] = []
    released: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(20):
            if number == 15:
                raise KeyboardInterrupt
            taken.append(number)
            yield Batch(number, memoryview(os.urandom(CHUNK)), lambda number=number: released.append(number))  # type: ignore[misc]

    def interrupted() -> None:
        with open_session(site.repository, site.keys) as session:
            session.write_image("sda:1", 20 * CHUNK, batches())

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(released) == taken
    backup(site, _SECOND)


def test_a_failing_store_releases_every_batch(site: Site, many_packs: None) -> None:
    taken: list[int] = []
    released: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(200):
            taken.append(number)
            yield Batch(number, memoryview(os.urandom(CHUNK)), lambda number=number: released.append(number))  # type: ignore[misc]

    die_at(4, after=False)(site.store)

    def failing() -> None:
        with open_session(site.repository, site.keys) as session:
            session.write_image("sda:1", 200 * CHUNK, batches())

    with pytest.raises(StoreDiedError):
        failing()
    assert sorted(released) == taken
    assert len(taken) < 200


@pytest.mark.parametrize(("first", "size"), [(0, 100), (1, CHUNK), (2, 2 * CHUNK), (-1, CHUNK), (3, CHUNK)], ids=str)
def test_batches_that_cannot_be(site: Site, first: int, size: int) -> None:
    released: list[int] = []
    good = Batch(1, memoryview(bytes(CHUNK)), lambda: released.append(1))
    bad = Batch(first, memoryview(bytes(size)), lambda: released.append(2))
    with open_session(site.repository, site.keys) as session, pytest.raises(ValueError, match="cannot stand"):
        session.write_image("sda:1", 3 * CHUNK, [good, bad])
    assert sorted(released) == [1, 2]


def test_a_computer_that_miscalculates_is_told_and_stores_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compressor is made to give other bytes than it should, as bad memory would."""
    encode = Codec.encode

    def faulty(self: Codec, data: memoryview) -> Encoding:
        encoded = encode(self, data)
        return Encoding(bytes([encoded.data[0] ^ 1]) + bytes(encoded.data[1:]), encoded.flag)

    monkeypatch.setattr(Codec, "encode", faulty)
    packs = len(list(site.store.entries("packs/")))
    with pytest.raises(RemetalError, match="read back") as caught:
        backup(site, os.urandom(2 * CHUNK))
    assert "memtest" in caught.value.hint
    assert len(list(site.store.entries("packs/"))) == packs


@pytest.mark.parametrize("after", [False, True])
def test_init_and_keys_survive_a_store_that_dies(after: bool) -> None:
    for number in range(1, 4):
        store = MemoryStore()
        die_at(number, after=after)(store)
        with pytest.raises(StoreDiedError):
            init_repository(store, passphrase="x")
        again = store.copy()
        if number == 3 and after:
            assert check_repository(open_repository(again), keys=None).ok
        else:
            with pytest.raises(RefusedError, match="no repository"):
                open_repository(again)
            repository, _ = init_repository(again, passphrase="x")
            assert check_repository(repository, keys=None).problems == []
            assert [each.kind for each in list_keys(repository)] == ["recipient", "passphrase"]
    site = _SITE.copy()
    die_at(2, after=after)(site.store)
    with pytest.raises(StoreDiedError):
        add_recipient(site.repository, site.key, "escrow")
    calm = site.store.copy()
    assert restore(Site(calm, open_repository(calm), site.keys, site.key), _SNAPSHOT) == _FIRST


def test_enrolling_survives_a_store_that_dies() -> None:
    for number in (1, 2):
        site = _SITE.copy()
        die_at(number, after=False)(site.store)
        with pytest.raises(StoreDiedError):
            enroll_machine(site.repository, "db")
        calm = open_repository(site.store.copy())
        assert check_repository(calm, keys=site.key).ok
        enroll_machine(calm, "db")


def test_two_backups_of_a_machine_at_once(site: Site) -> None:
    with open_session(site.repository, site.keys) as session:
        with (
            pytest.raises(UnavailableError, match="a backup or prune") as caught,
            open_session(site.repository, site.keys),
        ):
            pass
        assert str(os.getpid()) in caught.value.message
        write(session, _SECOND)
        session.commit(layout=b"{}", hostname="h")
    backup(site, _FIRST)


def test_different_machines_may_write_at_once(site: Site) -> None:
    other = Site(site.store, site.repository, enroll_machine(site.repository, "db"), site.key)
    with open_session(site.repository, site.keys) as session:
        write(session, _SECOND)
        assert restore(other, backup(other, _FIRST)) == _FIRST
        snapshot = session.commit(layout=b"{}", hostname="h")
    assert restore(site, snapshot) == _SECOND


def put_lock(site: Site, **changes: object) -> LockRecord:
    record = msgspec.structs.replace(_this_process(site.keys.machine_id), **changes)
    site.store.put(f"locks/{site.keys.machine_id}/{5:016x}", [encode_json(record)])
    return record


def test_the_lock_of_a_dead_process_is_taken_over_at_once(site: Site) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    put_lock(site, pid=process.pid, started=process_start(process.pid))
    with pytest.raises(UnavailableError), open_session(site.repository, site.keys):
        pass
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()
    backup(site, _SECOND)
    assert list(site.store.entries("locks/")) == []


def test_when_a_lock_counts_as_left_behind(site: Site) -> None:
    own = _this_process(site.keys.machine_id)
    now = time.time()
    assert not is_stale(own, now=now)
    assert is_stale(own, now=now + LEASE + 60)
    assert is_stale(msgspec.structs.replace(own, started=own.started + 1), now=now)  # the pid was used again
    assert not is_stale(msgspec.structs.replace(own, host_id="other", boot_id="other", pid=1 << 30), now=now)
    assert not is_stale(msgspec.structs.replace(own, namespace="other", pid=1 << 30), now=now)
    if own.host_id:
        assert is_stale(msgspec.structs.replace(own, boot_id="before"), now=now)
        assert is_stale(msgspec.structs.replace(own, pid=1 << 30), now=now)


def test_nobody_is_dead_because_nothing_can_be_read() -> None:
    """A process without a free descriptor cannot look at others, and must not take their locks over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert process_start(os.getpid()) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert process_start(os.getpid())
    assert process_start(1 << 30) == 0


def test_a_foreign_lock_stands_for_its_lease(site: Site) -> None:
    put_lock(site, host="elsewhere", host_id="other", time=time.time() - LEASE + 60)
    with pytest.raises(UnavailableError, match="elsewhere"):
        backup(site, _SECOND)
    site.store.delete(f"locks/{site.keys.machine_id}/{5:016x}")
    put_lock(site, host="elsewhere", host_id="other", time=time.time() - LEASE - 60)
    backup(site, _SECOND)


def test_a_lock_that_means_nothing_holds_nobody_up(site: Site) -> None:
    site.store.put(f"locks/{site.keys.machine_id}/{9:016x}", [b"\xff garbage"])
    backup(site, _SECOND)
    assert list(site.store.entries("locks/")) == []


def test_a_lock_is_renewed_while_the_work_lasts(site: Site) -> None:
    with hold_machine(site.store, site.keys.machine_id, renewal=0.01) as lock:
        deadline = time.monotonic() + 10
        while not site.store.objects.get(f"locks/{site.keys.machine_id}/{3:016x}") and time.monotonic() < deadline:
            time.sleep(0.005)
        lock.check()
        assert len(list(site.store.entries("locks/"))) <= 2
        with pytest.raises(UnavailableError), hold_machine(site.store, site.keys.machine_id):
            pass
    assert list(site.store.entries("locks/")) == []


def test_a_backup_whose_lock_was_taken_over_does_not_commit(site: Site) -> None:
    with open_session(site.repository, site.keys) as session:
        write(session, _SECOND)
        forget_lock(site)
        with pytest.raises(UnavailableError, match="taken over"):
            session.commit(layout=b"{}", hostname="h")
    assert [each.id for each in open_catalog(site.repository, site.key).snapshots()] == [_SNAPSHOT.id]


@pytest.fixture
def slept(site: Site) -> Iterator[MachineLock]:
    """The first lock, whose holder slept: it was taken over and given back, and somebody else has its number now."""
    names = f"locks/{site.keys.machine_id}/"
    with hold_machine(site.store, site.keys.machine_id) as lock:
        former = site.store.objects.pop(f"{names}{1:016x}")
        with hold_machine(site.store, site.keys.machine_id):
            other = dict(site.store.objects)
            assert other[f"{names}{1:016x}"] != former
            yield lock
            assert site.store.objects == other
    assert list(site.store.entries("locks/")) == []


def test_who_slept_finds_the_lock_of_another(slept: MachineLock) -> None:
    with pytest.raises(UnavailableError, match="taken over"):
        slept.check()


def test_who_slept_renews_no_lock_of_another(slept: MachineLock) -> None:
    with pytest.raises(UnavailableError, match="taken over"):
        slept.renew()


def test_who_slept_gives_no_lock_of_another_back(slept: MachineLock) -> None:
    slept.release()


def test_who_slept_amid_a_renewal_deletes_no_lock_of_another(site: Site) -> None:
    """While the holder sleeps between its new lock and its old one, both go, and the old number is taken."""
    names = f"locks/{site.keys.machine_id}/"
    with hold_machine(site.store, site.keys.machine_id) as lock:
        other: dict[str, bytes] = {}

        def sleep(operation: Operation) -> None:
            if operation == ("put", f"{names}{2:016x}"):
                site.store.after = lambda operation: None
                forget_lock(site)
                site.store.put(f"{names}{1:016x}", [encode_json(_this_process(site.keys.machine_id))])
                other.update(site.store.objects)

        site.store.after = sleep
        lock.renew()
        assert other
        assert site.store.objects == other


def test_who_slept_while_taking_a_lock_deletes_no_lock_of_another(site: Site) -> None:
    """A lock is left behind; who takes it over sleeps right after that, and the number left behind is taken anew."""
    names = f"locks/{site.keys.machine_id}/"
    site.store.put(f"{names}{1:016x}", [b"left behind"])
    other: dict[str, bytes] = {}

    def sleep(operation: Operation) -> None:
        site.store.after = lambda operation: None
        forget_lock(site)
        site.store.put(f"{names}{1:016x}", [encode_json(_this_process(site.keys.machine_id))])
        other.update(site.store.objects)

    site.store.after = sleep
    with pytest.raises(UnavailableError, match="taken over"), hold_machine(site.store, site.keys.machine_id):
        pass
    assert other
    assert site.store.objects == other


def test_a_description_that_no_reader_would_take_is_refused(site: Site) -> None:
    entries = len(list(site.store.entries("history/")))
    with open_session(site.repository, site.keys) as session, pytest.raises(RefusedError, match=r"32\.0 MiB at once"):
        session.commit(layout=b" " * (33 << 20), hostname="web")
    assert len(list(site.store.entries("history/"))) == entries
