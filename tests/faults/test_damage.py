"""Damage to every kind of object, every bit of it: a check without keys sees it, and no restore gives other bytes.

What a check without keys cannot see is that something is not there at all: the names of packs, index objects and pages
are in sealed records, and the newest entry of a history is named by none. A check with a key sees that packs, index
objects, pages and secrets are missing, and the machine that has made it misses its newest snapshot.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from remetal.errors import DamagedError, RefusedError, RemetalError
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.machines import MachineKeys
from remetal.repository.remove import remove_recipient
from remetal.repository.repair import repair_repository
from remetal.repository.repository import Repository, add_recipient, enroll_machine, open_repository
from remetal.repository.repository import unlock_with_passphrase as unlock
from remetal.repository.retire import retire_machine
from remetal.repository.session import open_session
from tests.faults.counting import Count, StartCount
from tests.repositories import CHUNK, MemoryStore, Site, backup, make_site, restore, write

_DATA = (b"the same again and again " * 6000)[:CHUNK] + b"and something else " * 2000
KINDS = (
    "config",
    "keys/recipients/",
    "keys/revoked/",
    "keys/slots/",
    "keys/machines/",
    "keys/retired/",
    "keys/secrets/",
    "packs/",
    "parity/",
    "index/",
    "maps/",
    "history/",
    "repairs/",
    "aside/",
)
_READ = {"packs/", "index/", "maps/", "history/"}
"""Kinds of which a restore reads every byte."""
_UNMISSED = {"keys/slots/", "keys/revoked/", "keys/retired/", "repairs/", "aside/"}
"""Kinds of which an object is missed by no snapshot: a passphrase, a revocation, what takes a repair back."""
_STRIDE = 41
"""Of so many bits one is flipped, unless it is the full campaign."""


_LARGE = 64 << 10
"""Of objects larger than this, random bits are flipped."""


@dataclass(frozen=True)
class Kept:
    """A repository, what its one snapshot holds, and its objects from before that.

    Its last entry is a ledger, and it was repaired.
    """

    site: Site
    snapshot: str
    data: bytes
    older: dict[str, bytes]


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    patch = pytest.MonkeyPatch()
    patch.setattr("remetal.repository.slots.MEMORY_KIB", 1 << 10)
    site = make_site()
    add_recipient(site.repository, site.key, "other")
    remove_recipient(site.repository, site.key, unlock(site.repository, "other").id)
    retire_machine(site.repository, site.key, enroll_machine(site.repository, "gone").machine_id)
    old = backup(site, b"old" * 100, workers=1)
    older = dict(site.store.objects)
    snapshot = backup(site, _DATA, workers=1)
    forget_snapshots(site.repository, site.key, [old.id])
    spoil_and_repair(site)
    assert restore(site, snapshot) == _DATA
    yield Kept(site, snapshot.id, _DATA, older)
    patch.undo()


@pytest.fixture(scope="module")
def large() -> Kept:
    """A repository whose pack, parity, index object, page and snapshot are larger than 64 KiB; it was repaired."""
    site = make_site()
    older = dict(site.store.objects)
    data = b"".join(b"%-32d" % number * (CHUNK // 32) for number in range(2200))
    with open_session(site.repository, site.keys, workers=1) as session:
        write(session, data)
        layout = random.Random(1).randbytes(_LARGE + 4096)
        snapshot = session.commit(layout=layout, hostname="h")
    forget_snapshots(site.repository, site.key, [backup(site, b"old" * 100, workers=1).id])
    spoil_and_repair(site)
    return Kept(site, snapshot.id, data, older)


def spoil_and_repair(site: Site) -> None:
    """Cut the largest parity object; the repair sets it aside."""
    spoilt = max(site.store.entries("parity/"), key=lambda entry: entry.size or 0).name
    site.store.objects[spoilt] = site.store.objects[spoilt][:-1]
    assert repair_repository(site.repository, site.key).aside == 1


def names_of(kept: Kept, kind: str) -> list[str]:
    found = [name for name in kept.site.store.objects if name.startswith(kind)]
    assert found
    return found


def need_seen(kept: Kept, name: str, bad: bytes, *, read: bool) -> None:
    """A check without keys names the object, or says that there is no repository; no restore gives wrong bytes."""
    site = kept.site
    store = MemoryStore(site.store.objects | {name: bad})
    try:
        repository = open_repository(store)
    except (DamagedError, RefusedError):
        assert name == "config"
        return
    assert any(name in each for each in check_repository(repository, keys=None).problems)
    if read:
        need_exact_or_nothing(kept, repository)


def need_exact_or_nothing(kept: Kept, repository: Repository) -> bool:
    """Restore what is listed; return whether the snapshot that is kept came back."""
    whole = False
    store = repository.store
    assert isinstance(store, MemoryStore)
    site = Site(store, repository, MachineKeys(kept.site.keys.stored), kept.site.key)
    for snapshot in open_catalog(repository, site.key).snapshots():
        try:
            found = restore(site, snapshot)
        except RemetalError:
            continue
        assert found == (kept.data if snapshot.id == kept.snapshot else b"old" * 100)
        whole = whole or snapshot.id == kept.snapshot
    return whole


def flips(data: bytes, stride: int, phase: int) -> Iterator[bytes]:
    for bit in range(phase % stride, 8 * len(data), stride):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def cuts(data: bytes) -> Iterator[bytes]:
    """Yield what is cut off, zeroed by sectors, and made longer."""
    yield from (data[:length] for length in sorted({0, 1, 7, 8, len(data) // 2, len(data) - 1}))
    for start in range(0, len(data), 512):
        zeroed = data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :]
        if zeroed != data:
            yield zeroed
    yield from (data + b"\0", data + b"\n", data + data, data + bytes(4096))


def count_seen(count: Count, kept: Kept, name: str, bad: bytes, *, read: bool) -> None:
    with count.case(name):
        need_seen(kept, name, bad, read=read)
    count.told()


@pytest.mark.parametrize("kind", KINDS)
def test_some_bits_of_every_kind(kept: Kept, kind: str, counts: StartCount) -> None:
    count = counts("damage, bit flips")
    for name in names_of(kept, kind):
        for bad in flips(kept.site.store.objects[name], _STRIDE, phase=count.cases):
            count_seen(count, kept, name, bad, read=kind in _READ and count.cases % 5 == 0)
    assert count.cases > 30


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_every_kind(kept: Kept, kind: str, counts: StartCount) -> None:
    count = counts("damage, bit flips")
    for name in names_of(kept, kind):
        data = kept.site.store.objects[name]
        assert len(data) <= _LARGE
        for bad in flips(data, 1, phase=0):
            count_seen(count, kept, name, bad, read=kind in _READ)


@pytest.mark.parametrize(
    "bits", [30, pytest.param(10_000, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])], ids=["some", "all"]
)
@pytest.mark.parametrize("kind", [*sorted(_READ), "parity/", "aside/"])
def test_random_bits_of_large_objects(large: Kept, kind: str, bits: int, counts: StartCount) -> None:
    count = counts("damage, bit flips of large objects")
    name = max(names_of(large, kind), key=lambda each: len(large.site.store.objects[each]))
    data = large.site.store.objects[name]
    assert len(data) > _LARGE
    chance = random.Random(kind)
    for number in range(bits):
        bad = bytearray(data)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        count_seen(count, large, name, bytes(bad), read=kind in _READ and number % 200 == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_and_zeros(kept: Kept, kind: str, counts: StartCount) -> None:
    count = counts("damage, truncation, extension, zeroed sectors")
    for name in names_of(kept, kind):
        for bad in cuts(kept.site.store.objects[name]):
            count_seen(count, kept, name, bad, read=kind in _READ)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "config"])
def test_exchange_with_every_other_object(kept: Kept, kind: str, counts: StartCount) -> None:
    count = counts("damage, swap with another")
    objects = kept.site.store.objects
    for name in names_of(kept, kind):
        for other in objects:
            if objects[other] != objects[name]:
                count_seen(count, kept, name, objects[other], read=kind in _READ)


@pytest.mark.parametrize("kind", KINDS)
def test_deletion(kept: Kept, kind: str, counts: StartCount) -> None:
    """If anything is missed somebody is told; that packs have no parity any more, too."""
    count = counts("damage, deletion")
    for name in names_of(kept, kind):
        objects = dict(kept.site.store.objects)
        del objects[name]
        with count.case(name):
            told = _tells(kept, objects)
            assert told or kind in _UNMISSED or _is_escrow(kept, name) or _is_useless(kept, name)
        if told:
            count.told()


def _tells(kept: Kept, objects: dict[str, bytes]) -> bool:
    """Whether a check by anybody tells that something is wrong; no restore gives wrong bytes all the same."""
    try:
        repository = open_repository(MemoryStore(dict(objects)))
    except (DamagedError, RefusedError):
        return True
    whole = need_exact_or_nothing(kept, repository)
    every = (None, kept.site.key, MachineKeys(kept.site.keys.stored))
    results = [check_repository(repository, keys=keys) for keys in every]
    told = any(each.problems or each.unprotected for each in results)
    assert whole or told
    return told


def _is_escrow(kept: Kept, name: str) -> bool:
    """Whether an object is of the recipient that was removed."""
    return name.startswith("keys/recipients/") and kept.site.key.id not in name


def _is_useless(kept: Kept, name: str) -> bool:
    """Whether only the snapshot that was forgotten needed an object."""
    return name in kept.older and name.startswith(("packs/", "index/", "maps/"))


@pytest.mark.parametrize("kind", [*KINDS, ""])
def test_roll_back_to_an_older_version(kept: Kept, kind: str, counts: StartCount) -> None:
    """All objects of a kind, or the whole repository, are what they were before the newest snapshot."""
    count = counts("damage, roll back to an older version")
    now = kept.site.store.objects
    objects = {name: data for name, data in now.items() if not name.startswith(kind)}
    objects |= {name: data for name, data in kept.older.items() if name.startswith(kind)}
    with count.case(kind):
        told = _tells(kept, objects)
        assert told or objects == now or kind in _UNMISSED
    if told:
        count.told()
