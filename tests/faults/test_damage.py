"""Damage to every kind of object, every bit of it: a check without keys sees it, and no restore gives other bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from remetal.errors import DamagedError, RefusedError, RemetalError
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.machines import MachineKeys
from remetal.repository.repository import Repository, add_recipient, open_repository, remove_recipient
from remetal.repository.repository import unlock_with_passphrase as unlock
from tests.repositories import CHUNK, MemoryStore, Site, backup, make_site, restore

_DATA = (b"the same again and again " * 6000)[:CHUNK] + b"and something else " * 2000
KINDS = (
    "config",
    "keys/recipients/",
    "keys/revoked/",
    "keys/slots/",
    "keys/machines/",
    "keys/secrets/",
    "packs/",
    "index/",
    "maps/",
    "history/",
)
_READ = {"packs/", "index/", "maps/", "history/"}
"""Kinds of which a restore reads every byte."""
_STRIDE = 41
"""Of so many bits one is flipped, unless it is the full campaign."""


@dataclass(frozen=True)
class Kept:
    """A small repository, and what its one snapshot holds. Its last entry is a ledger."""

    site: Site
    snapshot: str


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    patch = pytest.MonkeyPatch()
    patch.setattr("remetal.repository.slots.MEMORY_KIB", 1 << 10)
    site = make_site()
    add_recipient(site.repository, site.key, "other")
    remove_recipient(site.repository, site.key, unlock(site.repository, "other").id)
    old = backup(site, b"old" * 100, workers=1)
    snapshot = backup(site, _DATA, workers=1)
    forget_snapshots(site.repository, site.key, [old.id])
    assert restore(site, snapshot) == _DATA
    yield Kept(site, snapshot.id)
    patch.undo()


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
        assert found == (_DATA if snapshot.id == kept.snapshot else b"old" * 100)
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


@pytest.mark.parametrize("kind", KINDS)
def test_some_bits_of_every_kind(kept: Kept, kind: str) -> None:
    count = 0
    for name in names_of(kept, kind):
        for bad in flips(kept.site.store.objects[name], _STRIDE, phase=count):
            need_seen(kept, name, bad, read=kind in _READ and count % 5 == 0)
            count += 1
    assert count > 30


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_every_kind(kept: Kept, kind: str) -> None:
    count = 0
    for name in names_of(kept, kind):
        for bad in flips(kept.site.store.objects[name], 1, phase=0):
            need_seen(kept, name, bad, read=kind in _READ)
            count += 1
    print(f"{kind}: {count} bits flipped one by one, {count} seen without a key, 0 wrong bytes")


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_and_zeros(kept: Kept, kind: str) -> None:
    for name in names_of(kept, kind):
        for bad in cuts(kept.site.store.objects[name]):
            need_seen(kept, name, bad, read=kind in _READ)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "config"])
def test_exchange_with_every_other_object(kept: Kept, kind: str) -> None:
    objects = kept.site.store.objects
    for name in names_of(kept, kind):
        for other in objects:
            if objects[other] != objects[name]:
                need_seen(kept, name, objects[other], read=kind in _READ)


@pytest.mark.parametrize("kind", sorted(_READ))
def test_deletion(kept: Kept, kind: str) -> None:
    """If anything is missed it is told with a key; that the newest entry is gone only the machine itself can know."""
    for name in names_of(kept, kind):
        objects = dict(kept.site.store.objects)
        del objects[name]
        repository = open_repository(MemoryStore(objects))
        whole = need_exact_or_nothing(kept, repository)
        newest = kind == "history/" and name == max(names_of(kept, kind))
        assert whole or newest or check_repository(repository, keys=kept.site.key).problems, name
