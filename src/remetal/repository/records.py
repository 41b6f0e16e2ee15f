"""Objects of the catalog that a machine seals: index objects and pages of maps.

A name that was deleted once is never used again, so a prune may sleep for as long as it likes before it deletes what it
has condemned: equal content gives an equal object only until the machine's history goes on.

8 header, 16 repository, 16 machine, u32 variant, then the sealed body (AES-SIV)
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from contextlib import suppress

from remetal.repository.cipher import CipherError, digest, open_record, seal_record
from remetal.repository.machines import Domain
from remetal.repository.objects import HEADER_SIZE, damaged, get_named, hash_in_name, header, miscalculated
from remetal.storage import AlreadyExistsError, NotFoundError, Store, UnreadableError

_COUNT = struct.Struct("<I")
PREFIX_SIZE = HEADER_SIZE + 32 + _COUNT.size
_VARIANTS = 1 << 10
_ALL_VARIANTS = 1 << 32


def record_prefix(kind: str, repository_id: str, machine_id: str, variant: int) -> bytes:
    """Return the 44 clear bytes that a catalog object of this kind starts with, and that its seal binds."""
    return header(kind) + bytes.fromhex(repository_id) + bytes.fromhex(machine_id) + _COUNT.pack(variant)


def put_record(
    store: Store,
    kind: str,
    folder: str,
    repository_id: str,
    domain: Domain,
    body: bytes,
    *,
    entry: int,
    avoid: Collection[str] = (),
) -> str:
    """Seal a body under the machine's catalog key, store it under its hash, and return the name.

    `entry` is the number of the newest entry of the machine's history: behind the same one equal bodies have equal
    names, behind another one they have others. So no name comes back that an entry has condemned. An object that is
    there is used if it is whole and not one of the names to `avoid`, which are about to be condemned; otherwise the
    body is stored in another variant, under another name. Raises RemetalError if this computer miscalculates.
    """
    for number in range(entry * _VARIANTS, (entry + 1) * _VARIANTS):
        variant = number % _ALL_VARIANTS
        prefix = record_prefix(kind, repository_id, domain.machine_id, variant)
        data = prefix + seal_record(domain.record_key(kind), prefix, body)
        name = f"{folder}{digest(data).hex()}"
        again = record_prefix(kind, repository_id, domain.machine_id, variant)
        _need_good(data, domain.record_key(kind), again, body)
        if name not in avoid and _put_or_compare(store, name, data):
            return name
    raise damaged(folder, f"all {_VARIANTS} variants of an object are damaged or being deleted")


def _need_good(data: bytes, key: bytes, prefix: bytes, body: bytes) -> None:
    """Raise RemetalError unless what is about to be stored opens, and is the body."""
    try:
        good = data[:PREFIX_SIZE] == prefix and open_record(key, prefix, data[PREFIX_SIZE:]) == body
    except CipherError:
        good = False
    if not good:
        raise miscalculated("an object of the catalog")


def _put_or_compare(store: Store, name: str, data: bytes) -> bool:
    """Create an object; False if its name is taken by other bytes than these."""
    if digest(data) != hash_in_name(name):
        raise miscalculated(f"the object {name}")
    try:
        store.put(name, [data])
    except AlreadyExistsError:
        with suppress(NotFoundError, UnreadableError):
            return store.get(name, size=len(data) + 1) == data
        return False
    return True


def get_record(store: Store, name: str, kind: str, repository_id: str, domain: Domain, limit: int) -> bytes:
    """Read, check and open what `put_record` wrote, of at most `limit` bytes. Raises DamagedError."""
    data = get_named(store, name, limit)
    prefix, sealed = data[:PREFIX_SIZE], data[PREFIX_SIZE:]
    expected = record_prefix(kind, repository_id, domain.machine_id, 0)
    if len(prefix) != PREFIX_SIZE or prefix[: -_COUNT.size] != expected[: -_COUNT.size]:
        raise damaged(name, f"it is no {kind} object of this machine and repository")
    try:
        return open_record(domain.record_key(kind), prefix, sealed)
    except CipherError as error:
        raise damaged(name, "its seal is not that of the machine") from error
