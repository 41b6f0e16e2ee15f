"""Retired machines: what was signed before stands, what a thief signs afterwards counts for nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from remetal.errors import DamagedError, RefusedError, UsageError
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.history import entry_name, put_entry
from remetal.repository.objects import RETIRED, encode_lines, put_named
from remetal.repository.prune import prune_machine
from remetal.repository.remove import remove_recipient
from remetal.repository.repository import (
    add_recipient,
    enroll_machine,
    list_keys,
    unlock_with_passphrase,
)
from remetal.repository.retention import Policy, choose_kept
from remetal.repository.retire import retire_machine
from remetal.repository.retired import Retired, Retirement, find_line, find_successors, put_retirement
from remetal.repository.session import open_session
from remetal.repository.snapshots import Body, Snapshot, encode_snapshot
from remetal.workflows.access import select_snapshot
from tests.repositories import CHUNK, Site, StoreDiedError, backup, die_at, make_site, restore

_SITE = make_site()
_DATA = bytes(range(256)) * (3 * CHUNK // 256)


@pytest.fixture
def site() -> Site:
    return _SITE.copy()


def forged(site: Site, previous: Snapshot, *, behind: int = 1) -> str:
    """Add a snapshot as a thief of the machine's keys would, who asks nobody; return its name."""
    body = Body(time="2099-01-01T00:00:00Z", hostname="x", tags=(), version="1", layout=b"{}", images=previous.images)
    sequence = behind + 1
    data = encode_snapshot(
        body,
        site.repository.config.id,
        site.keys.domain,
        site.keys.stored.signing_seed,
        sequence,
        previous=previous.id,
        ledger=0,
    )
    name = entry_name(site.keys.machine_id, sequence)
    put_entry(site.store, name, data)
    return name


def renewed(site: Site) -> Site:
    """Return the same site after the machine has enrolled anew."""
    return Site(site.store, site.repository, enroll_machine(site.repository, "web"), site.key)


def listed(site: Site) -> list[str]:
    return [each.id for each in open_catalog(site.repository, site.key).snapshots()]


def test_old_snapshots_stay_and_a_thief_adds_nothing(site: Site) -> None:
    first = backup(site, _DATA)
    before = retire_machine(site.repository, site.key, site.keys.machine_id)
    assert before == Retired(last=2, successor="")
    name = forged(site, first, behind=2)
    catalog = open_catalog(site.repository, site.key)
    assert [each.id for each in catalog.snapshots()] == [first.id]
    assert any("after they were retired" in problem for problem in catalog.problems)
    assert any("after they were retired" in problem for problem in check_repository(site.repository).problems)
    assert restore(site, first) == _DATA
    retire_machine(site.repository, site.key, site.keys.machine_id)
    assert name not in site.store.objects
    assert check_repository(site.repository, keys=site.key).problems == []
    forget_snapshots(site.repository, site.key, [first.id])
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0.0, max_unused=0.0)
    assert listed(site) == []


def test_the_machine_is_told_and_makes_no_snapshot_that_would_not_count(site: Site) -> None:
    backup(site, _DATA)
    with open_session(site.repository, site.keys) as session:
        retire_machine(site.repository, site.key, site.keys.machine_id)
        with pytest.raises(RefusedError, match="retired"):
            session.commit(layout=b"{}", hostname="x")
    with pytest.raises(RefusedError, match="retired"), open_session(site.repository, site.keys):
        pass
    assert len(listed(site)) == 1


def test_a_successor_goes_on_as_the_same_machine(site: Site) -> None:
    old = [backup(site, _DATA + bytes([number]) * CHUNK) for number in range(3)]
    other = renewed(site)
    new = backup(other, _DATA)
    catalog = open_catalog(site.repository, site.key)
    with pytest.raises(UsageError, match="several machines"):
        select_snapshot(catalog.snapshots(), "latest", "web", catalog.retired)
    retire_machine(site.repository, site.key, site.keys.machine_id, successor=other.keys.machine_id)
    catalog = open_catalog(site.repository, site.key)
    assert catalog.problems == []
    assert find_line(site.keys.machine_id, catalog.retired) == other.keys.machine_id
    assert select_snapshot(catalog.snapshots(), "latest", "web", catalog.retired).id == new.id
    kept = choose_kept(catalog.snapshots(), Policy(keep_last=2), catalog.retired)
    assert set(kept) == {new.id, old[-1].id}
    assert [restore(site, each) for each in old] == [_DATA + bytes([number]) * CHUNK for number in range(3)]
    kinds = {each.id: (each.kind, each.successor) for each in list_keys(site.repository)}
    assert kinds[site.keys.machine_id] == ("retired", other.keys.machine_id)
    with pytest.raises(RefusedError, match="has taken the place"):
        retire_machine(site.repository, site.key, other.keys.machine_id, successor=site.keys.machine_id)


def test_the_new_keys_are_sealed_to_whom_the_old_ones_were(site: Site) -> None:
    old = site.keys.stored.recipients
    add_recipient(site.repository, site.key, "a stranger, perhaps")
    assert enroll_machine(site.repository, "web", pinned=old).stored.recipients == old


def test_only_a_recipient_retires_machines(site: Site) -> None:
    backup(site, _DATA)
    machine = site.keys.machine_id
    record = Retirement(
        id=machine, repository=site.repository.config.id, last=0, successor="", retired_by=site.key.id, created="x"
    )
    put_named(site.store, f"{RETIRED}{machine}.", encode_lines(record, bytes(64)))
    other = make_site()
    put_retirement(site.store, machine, last=0, successor="", key=other.key, created="x")
    assert len(listed(site)) == 1
    problems = check_repository(site.repository).problems
    assert len([problem for problem in problems if RETIRED in problem]) == 2
    with pytest.raises(RefusedError, match="no machine"):
        retire_machine(site.repository, site.key, "0" * 32)
    with pytest.raises(RefusedError, match="no machine"):
        retire_machine(site.repository, site.key, machine, successor="0" * 32)


def test_a_removed_recipient_retires_nothing_and_what_it_retired_stays_so(site: Site) -> None:
    backup(site, _DATA)
    other = renewed(site)
    backup(other, _DATA)
    add_recipient(site.repository, site.key, "another one")
    key = unlock_with_passphrase(site.repository, "another one")
    retire_machine(site.repository, key, site.keys.machine_id, successor=other.keys.machine_id)
    remove_recipient(site.repository, site.key, key.id)
    retired = open_catalog(site.repository, site.key).retired
    assert retired == {site.keys.machine_id: Retired(2, other.keys.machine_id)}
    put_retirement(site.store, other.keys.machine_id, last=0, successor="", key=key, created="x")
    assert open_catalog(site.repository, site.key).retired == retired
    assert len(listed(site)) == 2
    with pytest.raises(RefusedError, match="counts no more"):
        retire_machine(site.repository, key, other.keys.machine_id)


@pytest.mark.parametrize("after", [False, True])
def test_a_retirement_that_is_cut_off_has_happened_or_not_and_can_be_repeated(site: Site, after: bool) -> None:
    first = backup(site, _DATA)
    for number in range(1, 5):
        store = site.copy()
        die_at(number, after=after)(store.store)
        with suppress(StoreDiedError):
            retire_machine(store.repository, site.key, site.keys.machine_id)
        store.store.before = store.store.after = lambda operation: None
        assert first.id in listed(store)
        retire_machine(store.repository, site.key, site.keys.machine_id)
        assert check_repository(store.repository, keys=site.key).problems == []


def test_a_damaged_history_is_closed_where_a_person_says(site: Site) -> None:
    first, second = backup(site, _DATA), backup(site, _DATA)
    site.store.objects[entry_name(site.keys.machine_id, 3)] = b"garbage"
    with pytest.raises(DamagedError, match="history is damaged"):
        retire_machine(site.repository, site.key, site.keys.machine_id)
    assert listed(site) == [first.id, second.id]
    for impossible in (-1, 4):
        with pytest.raises(RefusedError, match=f"has no entry {impossible}; its newest one is 3"):
            retire_machine(site.repository, site.key, site.keys.machine_id, last=impossible)
    before = set(site.store.objects)
    assert retire_machine(site.repository, site.key, site.keys.machine_id, last=1).last == 1
    assert listed(site) == [first.id]
    assert before < set(site.store.objects), "nothing is deleted"


def test_a_history_that_is_whole_is_not_cut(site: Site) -> None:
    first, second = backup(site, _DATA), backup(site, _DATA)
    before = dict(site.store.objects)
    for last in (-1, 0, 1, 2, 3):
        with pytest.raises(RefusedError, match="is whole, so all of it counts"):
            retire_machine(site.repository, site.key, site.keys.machine_id, last=last)
    assert site.store.objects == before
    assert listed(site) == [first.id, second.id]


def _flip(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.parametrize("damage", [_flip, lambda data: data[:50], lambda data: data + b"x", lambda data: b""])
def test_a_damaged_retirement_is_told(site: Site, damage: Callable[[bytes], bytes]) -> None:
    retire_machine(site.repository, site.key, site.keys.machine_id)
    (name,) = (each for each in site.store.objects if each.startswith(RETIRED))
    site.store.objects[name] = damage(site.store.objects[name])
    assert any(name in problem for problem in check_repository(site.repository).problems)


def test_the_earliest_end_counts_and_successors_have_to_agree(site: Site) -> None:
    backup(site, _DATA)
    machine = site.keys.machine_id
    for last, successor in ((1, ""), (5, "a" * 32), (3, "b" * 32)):
        put_retirement(site.store, machine, last=last, successor=successor, key=site.key, created="x")
    assert open_catalog(site.repository, site.key).retired == {machine: Retired(1, "")}


def test_a_circle_of_successors_leads_nowhere() -> None:
    retired = {"a": Retired(1, "b"), "b": Retired(1, "c"), "c": Retired(1, "b"), "d": Retired(1, "e")}
    assert [find_successors(each, retired) for each in "abcde"] == [(), (), (), ("e",), ()]


def test_a_backup_of_a_retired_machine_enrolls_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remetal.repository.repository import init_repository, unlock_with_kit
    from remetal.storage import LocalStore
    from remetal.workflows.access import list_snapshots
    from remetal.workflows.backup import BackupRequest, back_up

    monkeypatch.setenv("REMETAL_STATE", str(tmp_path / "state"))
    disk = tmp_path / "disk.img"
    disk.write_bytes(_DATA * 2)
    repository, kit = init_repository(LocalStore(tmp_path / "repo"), passphrase="x")
    request = BackupRequest(str(tmp_path / "repo"), (disk,), "web")
    first = back_up(request).snapshot
    said: list[object] = []
    retire_machine(repository, unlock_with_kit(repository, kit.text()), first.machine_id)
    second = back_up(request, said.append).snapshot
    assert second.machine_id != first.machine_id
    assert any("were retired" in str(each) for each in said)
    assert [each.id for each in list_snapshots(request.repository, None).snapshots] == [second.id]
