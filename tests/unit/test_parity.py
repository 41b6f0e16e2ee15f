"""Parity: every pack is in a group, little space is taken, gaps are closed, and what is lost comes back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise, zip_longest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remetal.errors import DamagedError, RemetalError, UnavailableError
from remetal.events import Event, Note, Warn
from remetal.repository.check import check_repository
from remetal.repository.cipher import digest
from remetal.repository.forget import forget_snapshots
from remetal.repository.groups import GroupIndex
from remetal.repository.named import NamedObjects, gather
from remetal.repository.objects import hash_in_name, pack_name
from remetal.repository.packs import ENTRY, Contents, Pack
from remetal.repository.parity import (
    GROUP,
    Group,
    Xor,
    count_in_name,
    decode_head,
    find_groups,
    folded,
    is_possible,
    put_parity,
    read_pack,
    rebuild_pack,
    size_class,
)
from remetal.repository.parity_writer import ParityWriter
from remetal.repository.protect import Fragment, Sorting, fill, in_groups
from remetal.repository.prune import prune_machine
from remetal.repository.reader import open_reader
from remetal.repository.repair import repair_repository
from remetal.repository.repository import Repository, enroll_machine, init_repository, unlock_with_kit
from remetal.repository.scrub import scrub_store
from remetal.repository.session import open_session
from remetal.storage import Entry
from tests.repositories import CHUNK, PASSPHRASE, MemoryStore, Operation, Site, backup, make_site, noise, restore, write

REPOSITORY, MACHINE = "12" * 16, "34" * 16


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make packs small: one chunk and a bit is a full one."""
    monkeypatch.setattr("remetal.repository.packs.PACK_SIZE", CHUNK)


@pytest.fixture
def site() -> Site:
    return make_site()


def packs_of(site: Site) -> dict[str, bytes]:
    return {name: data for name, data in site.store.objects.items() if name.startswith("packs/")}


def parity_of(site: Site) -> dict[str, bytes]:
    return {name: data for name, data in site.store.objects.items() if name.startswith("parity/")}


def need_protected(site: Site) -> None:
    """Every pack is in a whole group, and every group fits its packs."""
    found = scrub_store(site.store, lambda event: None)
    assert (found.problems, found.unprotected, found.bad) == ({}, 0, set())


def test_every_pack_of_a_backup_is_protected(site: Site) -> None:
    backup(site, noise("one", 40))
    assert len(packs_of(site)) == 40
    assert sorted(map(count_in_name, parity_of(site))) == [8, 16, 16]
    need_protected(site)


def test_without_parity_there_is_none() -> None:
    store = MemoryStore()
    repository, kit = init_repository(store, passphrase=PASSPHRASE, chunk_size=CHUNK, parity=False)
    site = Site(store, repository, enroll_machine(repository, "web"), unlock_with_kit(repository, kit.text()))
    data = noise("one", 3)
    snapshot = backup(site, data)
    prune_machine(repository, site.key, site.keys.machine_id)
    repair_repository(repository, site.key)
    assert parity_of(site) == {}
    assert restore(site, snapshot) == data
    assert b"parity" not in store.objects["config"]
    assert check_repository(repository).unprotected == 0


def test_many_small_backups_take_up_no_more_than_a_large_one(site: Site) -> None:
    written: list[int] = []
    site.store.after = lambda operation: (
        written.append(len(site.store.objects[operation[1]]))
        if operation[1].startswith("parity/") and operation[0] == "put"
        else None
    )
    for number in range(3 * GROUP):
        backup(site, noise(f"small {number}", 1), workers=1)
    packs, parity = sum(map(len, packs_of(site).values())), sum(map(len, parity_of(site).values()))
    assert len(packs_of(site)) == 3 * GROUP
    assert parity < 1.05 * packs / GROUP
    assert sum(written) < 1.1 * packs  # each backup writes at most once more what it has written
    need_protected(site)


def test_packs_of_all_sizes_waste_little(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remetal.repository.packs.PACK_SIZE", 1 << 30)
    for number in range(100):
        backup(site, noise(f"sizes {number}", 1 + number % 13), workers=1)
    packs, parity = sum(map(len, packs_of(site).values())), sum(map(len, parity_of(site).values()))
    assert parity < packs / 7
    need_protected(site)


@pytest.mark.parametrize("after", [False, True])
def test_parity_that_cannot_be_stored_fails_no_backup_and_is_made_up_for(site: Site, *, after: bool) -> None:
    def refuse(operation: Operation) -> None:
        if operation[1].startswith("parity/"):
            raise UnavailableError("no room for parity")

    events: list[Event] = []
    site.store.before, site.store.after = (lambda _: None, refuse) if after else (refuse, lambda _: None)
    data = noise("one", 3)
    with open_session(site.repository, site.keys, report=events.append) as session:
        write(session, data)
        snapshot = session.commit(layout=b"{}", hostname="h")
    assert any(isinstance(each, Warn) and "no room for parity" in each.text for each in events)
    site.store.before = site.store.after = lambda operation: None
    assert restore(site, snapshot) == data
    notes: list[Event] = []
    found = check_repository(site.repository, keys=site.key, report=notes.append)
    assert (found.problems, found.unprotected) == ([], 0 if after else 3)
    assert any(isinstance(each, Note) and "have no parity" in each.text for each in notes) != after
    backup(site, noise("two", 1))
    need_protected(site)


def test_a_large_gap_is_told_and_left_to_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remetal.repository.parity_writer.MAX_GAP", 5)
    backup(site, noise("one", 6))
    for name in parity_of(site):
        del site.store.objects[name]
    events: list[Event] = []
    with open_session(site.repository, site.keys, report=events.append) as session:
        session.commit(layout=b"{}", hostname="h")
    assert any(isinstance(each, Note) and "6 packs have no parity yet" in each.text for each in events)
    assert parity_of(site) == {}
    other = site.copy()
    prune_machine(other.repository, other.key, other.keys.machine_id)
    need_protected(other)
    assert repair_repository(site.repository, None).parity == 1
    need_protected(site)


def test_an_open_group_that_is_damaged_is_left_alone(site: Site) -> None:
    backup(site, noise("one", 3), workers=1)
    (name,) = parity_of(site)
    good = site.store.objects[name]
    damaged = site.store.objects[name] = good[:-1] + bytes([good[-1] ^ 1])
    backup(site, noise("two", 2), workers=1)
    assert site.store.objects[name] == damaged
    assert sorted(map(count_in_name, parity_of(site))) == [2, 3]


def test_a_restore_goes_through_a_pack_that_is_gone_or_wrong(site: Site) -> None:
    data = noise("one", 20)
    snapshot = backup(site, data)
    for name, good in packs_of(site).items():
        for bad in (None, good[:-1], good + b"x", bytes(len(good)), good[:100] + bytes(1000) + good[1100:]):
            if bad is None:
                del site.store.objects[name]
            else:
                site.store.objects[name] = bad
            assert restore(site, snapshot) == data
        site.store.objects[name] = good


def test_a_restore_says_what_it_rebuilds_and_writes_nothing(site: Site) -> None:
    data = noise("one", 4)
    snapshot = backup(site, data)
    name = next(iter(packs_of(site)))
    del site.store.objects[name]

    def refuse(operation: Operation) -> None:
        raise UnavailableError("read-only")

    site.store.before = refuse
    events: list[Event] = []
    reader = open_reader(site.repository, site.key, snapshot, report=events.append)
    reader.verify_present(snapshot.images)
    for run in reader.runs(snapshot.images[0]):
        assert b"".join(map(reader.read_chunk, run.ids)) == data
    (told,) = events
    assert isinstance(told, Warn)
    assert name in told.text
    assert "remetal repair" in told.hint


def test_two_packs_of_one_group_are_beyond_it(site: Site) -> None:
    snapshot = backup(site, noise("one", 6))
    first, second = list(packs_of(site))[:2]
    good = site.store.objects[first]
    site.store.objects[first] = site.store.objects[second] = b"gone"
    with pytest.raises(DamagedError):
        restore(site, snapshot)
    result = repair_repository(site.repository, site.key)
    assert (result.rebuilt, len(result.lost)) == (0, 2)
    assert site.store.objects[first] == b"gone"  # what cannot be mended is left where it is
    site.store.objects[first] = good  # one of them comes back from a copy
    assert repair_repository(site.repository, site.key).rebuilt == 1
    assert check_repository(site.repository, keys=site.key, read_data=True).problems == []


def test_parity_that_does_not_fit_is_found_without_a_key_and_made_anew(site: Site) -> None:
    """As a computer whose memory flips bits would write it: whole in itself, and wrong."""
    backup(site, noise("one", 5))
    (name,) = parity_of(site)
    (group,) = find_groups(site.store, site.keys.machine_id, [])
    xor = Xor()
    for identity in group.packs:
        xor.add([read_pack(site.store, site.keys.machine_id, identity)])
    xor.add_at(12345, b"\x01")
    del site.store.objects[name]
    wrong = put_parity(site.store, site.repository.config.id, site.keys.machine_id, group.packs, xor).name
    result = check_repository(site.repository)
    assert result.problems == [f"the parity in {wrong} does not fit its packs, which are whole"]
    with pytest.raises(DamagedError, match="does not fit"):
        rebuild_pack(site.store, next(find_groups(site.store, site.keys.machine_id, [])), min(group.packs))
    assert repair_repository(site.repository, None).parity == 1
    need_protected(site)
    assert name in site.store.objects


@pytest.fixture
def pruned(site: Site) -> Site:
    """Two groups of which some packs are no longer needed."""
    old = backup(site, noise("old", 3) + noise("kept", 17) + noise("older", 8), workers=1)
    backup(site, noise("kept", 17), workers=1)
    forget_snapshots(site.repository, site.key, [old.id])
    return site


def test_what_a_prune_leaves_is_protected_at_every_moment(pruned: Site) -> None:
    staying: set[str] = set()
    checked: list[str] = []

    def look(operation: Operation) -> None:
        if operation[0] == "delete" and operation[1].startswith(("packs/", "parity/")):
            after = MemoryStore({name: data for name, data in pruned.store.objects.items() if name != operation[1]})
            found = scrub_store(after, lambda event: None)
            assert not {name for name in staying if not found.helpers(name)}, operation
            checked.append(operation[1])

    plan = pruned.copy()
    prune_machine(plan.repository, plan.key, plan.keys.machine_id, grace=0)
    staying = set(packs_of(plan)) & set(packs_of(pruned))
    assert len(staying) == 17
    pruned.store.before = look
    prune_machine(pruned.repository, pruned.key, pruned.keys.machine_id, grace=0)
    assert sum(name.startswith("packs/") for name in checked) == 11
    need_protected(pruned)
    assert (len(parity_of(pruned)), sum(map(count_in_name, parity_of(pruned)))) == (2, 17)
    assert check_repository(pruned.repository, keys=pruned.key, read_data=True).problems == []


def test_a_prune_on_a_full_disk_protects_what_stays_afterwards(pruned: Site) -> None:
    room = sum(map(len, pruned.store.objects.values())) + 30_000

    def need_room(operation: Operation) -> None:
        if operation[0] == "put" and sum(map(len, pruned.store.objects.values())) > room:
            del pruned.store.objects[operation[1]]
            raise UnavailableError("the disk is full")

    pruned.store.after = need_room
    prune_machine(pruned.repository, pruned.key, pruned.keys.machine_id, grace=0)
    pruned.store.after = lambda operation: None
    assert len(packs_of(pruned)) == 17
    need_protected(pruned)


def test_a_prune_reads_no_more_packs_than_it_has_to(pruned: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []

    def counted(store: MemoryStore, machine_id: str, identity: bytes) -> bytes:
        read.append(identity)
        return read_pack(store, machine_id, identity)

    monkeypatch.setattr("remetal.repository.protect.read_pack", counted)
    prune_machine(pruned.repository, pruned.key, pruned.keys.machine_id, grace=0)
    assert 0 < len(read) < 17
    need_protected(pruned)


def test_small_groups_are_made_one_without_reading_packs(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        backup(site, noise(f"g{number}", 3), workers=1)
    everything = parity_of(site)
    for number, each in enumerate(packs_of(site)):
        identity = hash_in_name(each)
        assert identity is not None
        xor = Xor()
        xor.add([packs_of(site)[each]])
        if number < 4:
            put_parity(
                site.store, site.repository.config.id, site.keys.machine_id, {identity: len(packs_of(site)[each])}, xor
            )
    assert len(parity_of(site)) == len(everything) + 4
    monkeypatch.setattr("remetal.repository.protect.read_pack", lambda *_: pytest.fail("a pack was read"))
    prune_machine(site.repository, site.key, site.keys.machine_id)
    assert parity_of(site) == everything
    need_protected(site)


def test_a_damaged_pack_stays_rebuildable_through_a_prune(pruned: Site) -> None:
    """Parity of what stays is computed from what was written, not from what is there."""
    plan = pruned.copy()
    prune_machine(plan.repository, plan.key, plan.keys.machine_id, grace=0)
    for name in set(packs_of(plan)) & set(packs_of(pruned)):
        each = pruned.copy()
        good = each.store.objects[name]
        each.store.objects[name] = bytes(len(good))
        prune_machine(each.repository, each.key, each.keys.machine_id, grace=0, max_unused=1)
        assert repair_repository(each.repository, None).rebuilt == 1
        assert each.store.objects[name] == good


def hostile_heads() -> Iterator[tuple[str, bytes, int]]:
    name = f"parity/{MACHINE}/02.{'00' * 32}"
    clear = struct.Struct("<8s16s16sI")
    ids = bytes.fromhex(REPOSITORY), bytes.fromhex(MACHINE)
    rows = struct.pack("<32sI32sI", b"\1" * 32, 100, b"\2" * 32, 200)
    good = clear.pack(b"RMTLX\1\0\0", *ids, 2) + rows
    assert decode_head(name, good, len(good) + 200).packs == {b"\1" * 32: 100, b"\2" * 32: 200}
    yield name, b"", 0
    yield name, good[:40], 40
    yield name, good[:-1], len(good) - 1 + 200
    yield name, good, len(good) + 199
    yield name, good, 1 << 40
    yield name, b"RMTLP" + good[5:], len(good) + 200
    yield name.replace("/02.", "/03."), good, len(good) + 200
    yield name.replace("34", "35"), good, len(good) + 200
    for number in (0, 1, 3, 65, 1 << 31, (1 << 32) - 1):
        bad = clear.pack(b"RMTLX\1\0\0", *ids, number) + rows
        yield name.replace("/02.", f"/{number & 255:02x}."), bad, len(bad) + 200
    for first, second, size, other in [
        (1, 1, 9, 9),
        (2, 1, 9, 9),
        (1, 2, 0, 9),
        (1, 2, 9, 8),
        (1, 2, 9, (32 << 20) + 1),
    ]:
        rows = struct.pack("<32sI32sI", bytes([first]) * 32, size, bytes([second]) * 32, other)
        yield name, clear.pack(b"RMTLX\1\0\0", *ids, 2) + rows, clear.size + len(rows) + max(size, other)


def test_heads_that_cannot_be_are_refused() -> None:
    for name, data, size in hostile_heads():
        with pytest.raises(DamagedError):
            decode_head(name, data, size)


@given(st.binary(max_size=300), st.integers(0, 1 << 40))
def test_any_bytes_are_a_head_or_refused(data: bytes, size: int) -> None:
    with pytest.raises(DamagedError):
        decode_head(f"parity/{MACHINE}/02.{'00' * 32}", data, size)


@given(st.lists(st.binary(min_size=9, max_size=3000), min_size=1, max_size=GROUP, unique=True))
def test_any_one_of_any_packs_comes_back(packs: list[bytes]) -> None:
    store = MemoryStore({pack_name(MACHINE, digest(each)): each for each in packs})
    xor = Xor()
    for each in packs:
        xor.add([each[:7], memoryview(each)[7:]])
    put_parity(store, REPOSITORY, MACHINE, {digest(each): len(each) for each in packs}, xor)
    (group,) = find_groups(store, MACHINE, [])
    for each in packs:
        del store.objects[pack_name(MACHINE, digest(each))]
        assert rebuild_pack(store, group, digest(each)) == each
        store.objects[pack_name(MACHINE, digest(each))] = each


@given(st.lists(st.integers(1, 32 << 20), max_size=200), st.data())
def test_whatever_there_is_groups_are_full_and_even(sizes: list[int], data: st.DataObject) -> None:
    packs = {number.to_bytes(32): size for number, size in enumerate(sizes)}
    groups: list[Group] = []
    for number in range(data.draw(st.integers(0, 6))):
        members = data.draw(
            st.dictionaries(st.sampled_from([*packs, b"gone" * 8]), st.just(0), min_size=1, max_size=GROUP)
        )
        groups.append(Group(str(number), REPOSITORY, MACHINE, {each: packs.get(each, 99) for each in members}))
    present = gather(packs.items())
    sorting = Sorting(present, groups)
    fragments = list(sorting.fragments())
    kept = [each for each in groups if each.name not in sorting.obsolete and each.whole(present)]
    covered = {each for group in kept for each in group.packs} | {each for part in fragments for each in part.packs}
    assert {each for each, size in packs.items() if is_possible(size)} <= covered <= packs.keys()
    bins = fill(fragments)
    assert sorted(id(each) for part in bins for each in part) == sorted(map(id, fragments))
    counts: dict[int, list[int]] = {}
    for part in bins:
        classes = {size_class(max(each.packs.values())) for each in part}
        assert len(classes) == 1
        counts.setdefault(classes.pop(), []).append(sum(len(each.packs) for each in part))
    for each in counts.values():
        assert max(each) <= GROUP
        assert all(one + other > GROUP for one, other in pairwise(sorted(each)))  # no two of them fit into one


def test_fragments_of_a_kind_fill_up() -> None:
    parts = [Fragment({number.to_bytes(32): 1 << 20}) for number in range(40)]
    assert sorted(len(each) for each in fill(parts)) == [8, 16, 16]


def test_of_very_many_fragments_some_are_put_together_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remetal.repository.protect.FRAGMENTS", 40)
    sizes = [15] * 100 + [9] * 100 + [1] * 500
    names = iter(range(10**6))
    parts = [Fragment({next(names).to_bytes(32): 1 << 20 for _ in range(size)}) for size in sizes]
    bins = list(in_groups(parts))
    assert sorted(id(each) for part in bins for each in part) == sorted(map(id, parts))
    counts = [sum(len(each.packs) for each in part) for part in bins]
    assert max(counts) <= GROUP
    assert sum(counts) / len(counts) > GROUP * 0.75


@given(st.binary(max_size=20_000), st.binary(max_size=20_000), st.integers(0, 9000))
def test_what_is_folded_adds_up(one: bytes, other: bytes, cut: int) -> None:
    both = bytes(a ^ b for a, b in zip_longest(one, other, fillvalue=0))
    assert (folded(both) == folded(one) ^ folded(other)).all()
    assert (folded(one) == folded(one[:cut]) ^ folded(one[cut:], cut)).all()
    if one:
        changed = bytearray(one)
        changed[cut % len(one)] ^= 8
        assert (folded(bytes(changed)) != folded(one)).any()


def test_parity_that_changed_in_memory_is_not_stored() -> None:
    store, pack = MemoryStore(), noise("a pack", 1)
    xor = Xor()
    xor.add([pack])
    xor.first(len(pack))[777] ^= 4
    with pytest.raises(RemetalError, match="could not be read back"):
        put_parity(store, REPOSITORY, MACHINE, {digest(pack): len(pack)}, xor)
    assert store.objects == {}
    xor.clear()
    xor.add([pack])
    put_parity(store, REPOSITORY, MACHINE, {digest(pack): len(pack)}, xor)
    assert len(store.objects) == 1


def test_a_pack_in_several_groups_is_found_in_each(site: Site) -> None:
    backup(site, noise("one", 3), workers=1)
    store, machine = site.store, site.keys.machine_id
    whole = next(find_groups(store, machine, []))
    for identity, size in whole.packs.items():
        xor = Xor()
        xor.add([read_pack(store, machine, identity)])
        put_parity(store, whole.repository_id, machine, {identity: size}, xor)
    index = GroupIndex(store, machine, [])
    for identity in whole.packs:
        assert [len(each.packs) for each in index.of(identity)] == [1, 3]
    assert list(index.of(bytes(32))) == []
    store.delete(whole.name)  # by a prune meanwhile
    assert [len(each.packs) for each in index.of(identity)] == [1]


def test_packs_of_another_size_store_the_open_group_which_is_added_to_later(site: Site) -> None:
    """A backup takes memory for one group at a time, whatever sizes come."""
    writer = ParityWriter(site.repository, site.keys.machine_id, NamedObjects(), lambda event: None)
    packs = [noise(f"size {number}", 1 + number % 2 * 3) for number in range(7)]
    for each in packs:
        site.store.put(pack_name(site.keys.machine_id, digest(each)), [each])
        contents = Contents(digest(each), len(each), 0, np.empty(0, ENTRY))
        writer.add(Pack(contents, memoryview(each)), folded(each))
    writer.finish()
    assert sorted(map(count_in_name, parity_of(site))) == [3, 4]
    need_protected(site)


def test_a_sparse_object_in_place_of_parity_is_not_read_to_its_end(site: Site) -> None:
    backup(site, noise("one", 3), workers=1)
    (sparse,) = parity_of(site)

    class Endless(MemoryStore):
        def entries(self, prefix: str) -> Iterator[Entry]:
            for entry in super().entries(prefix):
                yield Entry(sparse, 1 << 60) if entry.name == sparse else entry

        def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
            assert start < 1 << 28, "it is read on and on"
            found = super().get(name, start=start, size=size)
            return found or bytes(size or 0) if name == sparse else found

    found = scrub_store(Endless(site.store.objects), lambda event: None)
    assert found.bad == {sparse}


def test_a_repository_on_another_machine_knows_the_groups_by_their_names(site: Site) -> None:
    """The next backup reads only the groups that are not full, however many there are."""
    backup(site, noise("one", 5 * GROUP + 3), workers=1)
    read: list[str] = []

    class Counting(MemoryStore):
        def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
            read.append(name)
            return super().get(name, start=start, size=size)

    store = Counting(site.store.objects)
    other = Site(store, Repository(store, site.repository.config), site.keys, site.key)
    backup(other, noise("two", 1), workers=1)
    assert [count_in_name(name) for name in read if name.startswith("parity/")] == [3, 3]
    need_protected(site)
