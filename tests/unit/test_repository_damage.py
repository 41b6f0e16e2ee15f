"""Every kind of damage to every kind of object: a check without keys sees it, and no read returns wrong bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from remetal.errors import DamagedError, RefusedError, UnavailableError
from remetal.events import Event, Note
from remetal.repository.catalog import open_catalog
from remetal.repository.check import CheckResult, check_repository, rebuild_index
from remetal.repository.cipher import digest, sign
from remetal.repository.encoder import Encoded, Worker
from remetal.repository.machines import Head, MachineKeys
from remetal.repository.objects import encode_json, encode_lines, put_named
from remetal.repository.repository import enroll_machine, open_repository, unlock_with_passphrase
from remetal.repository.session import open_session
from remetal.repository.snapshots import Snapshot
from tests.repositories import CHUNK, PASSPHRASE, MemoryStore, Site, backup, make_site, restore, write

_DATA = os.urandom(3 * CHUNK) + bytes(2 * CHUNK) + b"text " * 20_000 + os.urandom(77)
_SITE = make_site()
_SNAPSHOTS = [backup(_SITE, _DATA), backup(_SITE, _DATA[CHUNK:]), backup(_SITE, _DATA + b"more")]
_PREFIXES = [
    "keys/recipients/",
    "keys/slots/",
    "keys/machines/",
    "keys/secrets/",
    "packs/",
    "index/",
    "maps/",
    "history/",
]
_BULK = {"packs/", "index/", "maps/", "history/"}


@pytest.fixture
def site() -> Site:
    return _SITE.copy()


def flip(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def damages(data: bytes) -> dict[str, bytes]:
    positions = {0, 7, 8, 20, 30, 45, 58, 60, 75, 100, len(data) // 2, len(data) - 70, len(data) - 9, len(data) - 1}
    flips = {f"bit {at % 8} of byte {at}": flip(data, at, at % 8) for at in positions if 0 <= at < len(data)}
    cuts = {f"cut to {size}": data[:size] for size in (0, 1, 8, 40, len(data) // 2, len(data) - 1)}
    return {**flips, **cuts, "longer": data + b"\0", "zeros": bytes(len(data)), "replaced": os.urandom(len(data))}


def check(site: Site, *, read_data: bool = False) -> CheckResult:
    return check_repository(open_repository(site.store), keys=site.key, read_data=read_data)


def read_everything(site: Site) -> list[tuple[Snapshot, bytes]]:
    """Unlock, list and restore, as an administrator would; return what that gave."""
    repository = open_repository(site.store)
    key = unlock_with_passphrase(repository, PASSPHRASE)
    catalog = open_catalog(repository, key)
    if catalog.problems:
        raise DamagedError(catalog.problems[0])
    return [(each, restore(Site(site.store, repository, site.keys, key), each)) for each in catalog.snapshots()]


def test_an_undamaged_repository_is_fine(site: Site) -> None:
    assert check(site).problems == []
    result = check(site, read_data=True)
    assert result.problems == []
    assert result.ok
    assert result.snapshots == 3
    assert result.chunks_read > 3
    assert result.objects == len(site.store.objects)
    assert check_repository(site.repository, keys=None).snapshots == 3
    assert check_repository(site.repository, keys=site.keys).ok
    assert [data for _, data in read_everything(site)] == [_DATA, _DATA[CHUNK:], _DATA + b"more"]


@pytest.mark.parametrize("prefix", _PREFIXES)
def test_changed_bytes_are_found_without_a_key(site: Site, prefix: str) -> None:
    for name in [entry.name for entry in site.store.entries(prefix)]:
        good = site.store.objects[name]
        for what, bad in damages(good).items():
            site.store.objects[name] = bad
            result = check_repository(site.repository, keys=None)
            assert any(name in problem for problem in result.problems), (name, what)
            site.store.objects[name] = good
    assert check_repository(site.repository, keys=None).ok


def test_every_byte_of_the_config_matters(site: Site) -> None:
    good = site.store.objects["config"]
    variants = [flip(good, at, bit) for at in range(len(good)) for bit in (0, 5)]
    for bad in [*variants, *damages(good).values()]:
        site.store.objects["config"] = bad
        with pytest.raises((DamagedError, RefusedError)):
            open_repository(site.store)
        assert not check_repository(site.repository, keys=None).ok


@pytest.mark.parametrize("prefix", sorted(_BULK))
def test_reads_never_return_damaged_bytes(site: Site, prefix: str) -> None:
    """Whatever is changed, a snapshot is either restored exactly or refused with DamagedError."""
    expected = {snapshot.id: data for snapshot, data in read_snapshots(site)}
    for name in [entry.name for entry in site.store.entries(prefix)]:
        good = site.store.objects[name]
        for bad in damages(good).values():
            site.store.objects[name] = bad
            assert_exact_or_damaged(site, expected)
        del site.store.objects[name]
        assert_exact_or_damaged(site, expected)
        site.store.objects[name] = good


def read_snapshots(site: Site) -> list[tuple[Snapshot, bytes]]:
    return [(each, restore(site, each)) for each in open_catalog(site.repository, site.key).snapshots()]


def assert_exact_or_damaged(site: Site, expected: dict[str, bytes]) -> None:
    catalog = open_catalog(site.repository, site.key)
    missed = 3 - len(catalog.snapshots())
    for snapshot in catalog.snapshots():
        try:
            assert restore(site, snapshot) == expected[snapshot.id]
        except DamagedError as error:
            missed += 1 if error.hint else 10
    told = catalog.problems or not check(site).ok or not check_repository(site.repository, keys=remembering(site)).ok
    assert missed == 0 or (missed <= 3 and told)


@pytest.mark.parametrize("prefix", _PREFIXES)
def test_missing_objects_are_found_with_a_key(site: Site, prefix: str) -> None:
    for name in [entry.name for entry in site.store.entries(prefix)]:
        good = site.store.objects.pop(name)
        last = name == max(each for each in _SITE.store.objects if each.startswith(prefix))
        if prefix == "keys/slots/":
            with pytest.raises(RefusedError):
                unlock_with_passphrase(site.repository, PASSPHRASE)
        elif prefix == "history/" and last:
            assert not check_repository(site.repository, keys=remembering(site)).ok
        else:
            assert not check(site).ok, name
        site.store.objects[name] = good


def remembering(site: Site) -> MachineKeys:
    newest = _SNAPSHOTS[-1]
    keys = site.keys
    keys.stored = msgspec.structs.replace(keys.stored, head=Head(sequence=newest.sequence, id=newest.id))
    return keys


@pytest.mark.parametrize("prefix", sorted(_BULK))
def test_exchanged_objects_are_found(site: Site, prefix: str) -> None:
    names = [entry.name for entry in site.store.entries(prefix)]
    assert len(names) >= 2, prefix
    one, other = names[:2]
    site.store.objects[one], site.store.objects[other] = site.store.objects[other], site.store.objects[one]
    result = check_repository(site.repository, keys=None)
    assert sum(one in each or other in each for each in result.problems) >= 2


def test_reading_data_finds_what_hashes_cannot(site: Site) -> None:
    """A pack that somebody made anew, with a fitting name, still cannot hold other chunks."""
    stranger = make_site()
    backup(stranger, _DATA)
    foreign = next(entry.name for entry in stranger.store.entries("packs/"))
    site.store.objects[foreign] = stranger.store.objects[foreign]
    notes: list[Event] = []
    assert check_repository(site.repository, keys=site.key, read_data=True, report=notes.append).ok
    assert any(isinstance(note, Note) and "in no index" in note.text for note in notes)
    names = [entry.name for entry in site.store.entries("packs/") if entry.name != foreign]
    name = max(names, key=lambda each: len(site.store.objects[each]))
    site.store.objects[name] = flip(site.store.objects[name], 5000, 3)
    result = check(site, read_data=True)
    assert any("does not decode" in problem for problem in result.problems)


def test_a_lost_pack_is_told_with_its_snapshots(site: Site) -> None:
    name = max(site.store.entries("packs/"), key=lambda entry: entry.size).name
    del site.store.objects[name]
    for entry in list(site.store.entries("parity/")):
        del site.store.objects[entry.name]
    result = check(site)
    assert any(name in problem and "missing" in problem for problem in result.problems)
    assert any("sda:1" in problem for problem in result.problems)
    with pytest.raises(DamagedError, match="missing"):
        restore(site, _SNAPSHOTS[0])


def test_a_lost_index_is_made_anew_from_the_packs(site: Site) -> None:
    for entry in list(site.store.entries("index/")):
        site.store.delete(entry.name)
    with pytest.raises(DamagedError, match="no index object"):
        restore(site, _SNAPSHOTS[0])
    packs = len(list(site.store.entries("packs/")))
    assert rebuild_index(site.repository, site.key) == packs
    assert rebuild_index(site.repository, site.key) == 0
    assert check(site, read_data=True).ok
    assert restore(site, _SNAPSHOTS[2]) == _DATA + b"more"


def test_the_next_backup_stores_again_what_a_lost_index_knew(site: Site) -> None:
    for entry in list(site.store.entries("index/")):
        site.store.delete(entry.name)
    for data in (_DATA, _DATA + b"more"):
        assert restore(site, backup(site, data)) == data
    assert check(site).ok


def test_a_damaged_index_does_not_stop_a_backup(site: Site) -> None:
    for entry in list(site.store.entries("index/")):
        site.store.objects[entry.name] = b"garbage"
    events: list[Event] = []
    with open_session(site.repository, site.keys, report=events.append) as session:
        write(session, _DATA)
        snapshot = session.commit(layout=b"{}", hostname="h")
    assert "stored again" in str(events)
    assert restore(site, snapshot) == _DATA


def test_a_repository_that_was_set_back_is_noticed_by_the_machine(site: Site) -> None:
    older = site.store.copy()
    newest = backup(site, b"new")
    site.store.objects.clear()
    site.store.objects.update(older.objects)
    assert any("set back" in problem for problem in open_catalog(site.repository, site.keys).problems)
    events: list[Event] = []
    with open_session(site.repository, site.keys, report=events.append) as session:
        write(session, b"newer")
        after = session.commit(layout=b"{}", hostname="h")
    assert "set back" in str(events)
    assert after.sequence == newest.sequence + 1
    assert after.previous == newest.id
    assert any("vanished" in problem for problem in check(site).problems)


def change_snapshot(site: Site, edit: Callable[[bytes], bytes]) -> str:
    """Replace the newest snapshot by an edited one; return its name."""
    name = [entry.name for entry in site.store.entries("history/")][-1]
    site.store.objects[name] = edit(site.store.objects[name])
    return name


def test_a_snapshot_signed_by_somebody_else_is_not_listed(site: Site) -> None:
    other = enroll_machine(site.repository, "thief").stored
    name = change_snapshot(
        site, lambda data: data[:-64] + sign(other.signing_seed, b"remetal 1 snapshot\0", data[:-64])
    )
    catalog = open_catalog(site.repository, site.key)
    assert len(catalog.snapshots()) == 2
    assert any(name in problem and "not signed" in problem for problem in catalog.problems)
    assert any(name in problem for problem in check_repository(site.repository, keys=None).problems)


def test_a_snapshot_under_another_number_is_not_listed(site: Site) -> None:
    name = [entry.name for entry in site.store.entries("history/")][-1]
    moved = name.replace("0000000000000003", "0000000000000007")
    site.store.objects[moved] = site.store.objects.pop(name)
    catalog = open_catalog(site.repository, site.key)
    assert len(catalog.snapshots()) == 2
    assert any(moved in problem for problem in catalog.problems)


def test_a_fork_of_the_history_is_told(site: Site) -> None:
    """Two computers with copies of the same keys write beside one another, and one's objects replace the other's."""
    twin = Site(MemoryStore(dict(site.store.objects)), site.repository, site.copy().keys, site.key)
    twin = Site(twin.store, open_repository(twin.store), twin.keys, twin.key)
    backup(twin, b"twin")
    original = backup(site, b"original")
    site.store.objects.update(twin.store.objects)
    assert any(
        "snapshot 4" in each and "set back" in each for each in open_catalog(site.repository, site.keys).problems
    )
    events: list[Event] = []
    with open_session(site.repository, site.keys, report=events.append) as session:
        write(session, b"newer")
        following = session.commit(layout=b"{}", hostname="h")
    assert "set back" in str(events)
    assert following.sequence == original.sequence + 1
    assert check(site).ok


def test_two_computers_with_the_same_keys_cannot_both_take_a_number(site: Site) -> None:
    twin = Site(site.store, site.repository, site.copy().keys, site.key)
    with open_session(site.repository, site.keys) as session:
        write(session, b"slow")
        for entry in list(site.store.entries("locks/")):
            site.store.delete(entry.name)
        quick = backup(twin, b"quick")
        for entry in list(_SITE.store.entries("locks/")):
            site.store.delete(entry.name)
        session._lock.check = lambda: None  # type: ignore[method-assign]  # it was asked a moment too early
        with pytest.raises(UnavailableError, match="another backup of this machine was made"):
            session.commit(layout=b"{}", hostname="h")
    assert [each.id for each in open_catalog(site.repository, site.key).snapshots()][3:] == [quick.id]
    assert check(site).ok


@pytest.mark.parametrize("prefix", ["history/", "maps/", "index/"])
def test_the_next_backup_does_not_build_on_garbage(site: Site, prefix: str) -> None:
    """What is damaged takes up a name that the next backup would use."""
    for entry in list(site.store.entries(prefix)):
        site.store.objects[entry.name] = b"garbage"
    for data in (_DATA, _DATA[CHUNK:], _DATA + b"more"):
        assert restore(site, backup(site, data)) == data


def test_a_damaged_index_is_made_anew_under_another_name(site: Site) -> None:
    for entry in list(site.store.entries("index/")):
        site.store.objects[entry.name] = b"garbage"
    assert rebuild_index(site.repository, site.key) == len(list(site.store.entries("packs/")))
    assert restore(site, _SNAPSHOTS[2]) == _DATA + b"more"


def test_strange_objects_are_noted_but_no_damage(site: Site) -> None:
    site.store.objects["backup-of-my-photos"] = b"x"
    notes: list[Event] = []
    assert check_repository(site.repository, keys=None, report=notes.append).ok
    assert "backup-of-my-photos" in str(notes)


def test_a_machine_record_with_a_hostile_name_is_not_used(site: Site) -> None:
    keys = enroll_machine(site.repository, "good")
    record = msgspec.structs.replace(keys.stored.record, name="\x1b[2Jgone")
    text = encode_json(record)
    signature = sign(keys.stored.signing_seed, b"remetal 1 machine record\0", text)
    put_named(site.store, f"keys/machines/{record.id}.", encode_lines(record, signature))
    catalog = open_catalog(site.repository, site.key)
    assert {access.machine.name for access in catalog.machines.values()} == {"web", "good"}
    assert any("cannot be the name" in problem for problem in catalog.problems)


def test_a_chunk_of_another_length_than_its_place_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Worker.encode

    def in_reverse(self: Worker, first: int, data: memoryview) -> Encoded:
        encoded = encode(self, first, data)
        ids = encoded.ids[::-1]
        return replace(encoded, ids=ids, seal=digest(*ids))

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "encode", in_reverse)
        backup(site, os.urandom(CHUNK + 77))
    assert [each for each in check(site).problems if "2 chunks are longer or shorter than their place" in each]
