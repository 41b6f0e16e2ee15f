"""Index objects: which chunk lies where in which pack. Specification: docs/format/index.md.

8 header, 16 repository, 16 machine, u32 variant, then sealed (AES-SIV):
u32 number of packs; per pack 32 name, u64 size, u32 first chunk's byte, u32 number of chunks;
then 40 bytes per chunk, pack after pack, as in the packs' own tables of contents
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from contextlib import suppress

import numpy as np

from remetal.repository.cipher import TAG_SIZE, CipherError, digest, open_record, seal_record
from remetal.repository.machines import Domain
from remetal.repository.objects import HEADER_SIZE, INDEX, damaged, get_named, header
from remetal.repository.packs import ENTRY, FOOTER, MAX_CHUNKS, MAX_PACK, PROLOGUE, Contents, check_entries
from remetal.storage import AlreadyExistsError, NotFoundError, Store
from remetal.units import MIB

PACKS_PER_INDEX = 16
"""After so many packs an index object is written, so that a backup that was cut off goes on from there."""
MAX_INDEX = 32 * MIB
MAX_PACKS = 1 << 12

_COUNT = struct.Struct("<I")
_PACK = struct.Struct("<32sQII")
PREFIX_SIZE = HEADER_SIZE + 32 + 4
_MAX_VARIANTS = 1 << 10


def record_prefix(kind: str, repository_id: str, machine_id: str, variant: int) -> bytes:
    """Return the 44 clear bytes that a catalog object of this kind starts with, and that its seal binds."""
    return header(kind) + bytes.fromhex(repository_id) + bytes.fromhex(machine_id) + _COUNT.pack(variant)


def index_folder(machine_id: str) -> str:
    """Return the prefix of a machine's index objects."""
    return f"{INDEX}{machine_id}/"


def encode_index(packs: Sequence[Contents]) -> bytes:
    """Return the plain body of an index object."""
    rows = [_PACK.pack(each.identity, each.size, each.start, len(each.entries)) for each in packs]
    return b"".join([_COUNT.pack(len(packs)), *rows, *(each.entries.tobytes() for each in packs)])


def decode_index(name: str, body: bytes) -> list[Contents]:
    """Parse a body; every number is checked before it is used. Raises DamagedError."""
    count = _COUNT.unpack_from(body)[0] if len(body) >= _COUNT.size else 0
    position = _COUNT.size + count * _PACK.size
    if not 0 < count <= MAX_PACKS or position > len(body):
        raise damaged(name, "its number of packs is impossible")
    packs: list[Contents] = []
    for identity, size, start, chunks in _PACK.iter_unpack(body[_COUNT.size : position]):
        if not PROLOGUE.size < start < size <= MAX_PACK or not 0 < chunks <= MAX_CHUNKS:
            raise damaged(name, "a pack in it has impossible sizes")
        if position + chunks * ENTRY.itemsize > len(body):
            raise damaged(name, "it is shorter than its numbers say")
        entries = np.frombuffer(body, ENTRY, chunks, position)
        check_entries(name, entries, start, size - FOOTER.size - TAG_SIZE - chunks * ENTRY.itemsize)
        packs.append(Contents(identity, size, start, entries))
        position += chunks * ENTRY.itemsize
    if position != len(body):
        raise damaged(name, "it is longer than its numbers say")
    return packs


def put_index(
    store: Store, repository_id: str, domain: Domain, packs: Sequence[Contents], *, avoid: Collection[str] = ()
) -> str:
    """Write an index object for packs that are stored, and return its name; `avoid` as for `put_record`."""
    body = encode_index(packs)
    return put_record(store, "index", index_folder(domain.machine_id), repository_id, domain, body, avoid=avoid)


def read_index(store: Store, name: str, repository_id: str, domain: Domain) -> list[Contents]:
    """Read one index object. Raises DamagedError."""
    return decode_index(name, get_record(store, name, "index", repository_id, domain, MAX_INDEX))


def put_record(
    store: Store,
    kind: str,
    folder: str,
    repository_id: str,
    domain: Domain,
    body: bytes,
    *,
    avoid: Collection[str] = (),
) -> str:
    """Seal a body under the machine's catalog key, store it under its hash, and return the name.

    Equal bodies have equal names. An object that is there is used if it is whole and not one of the names to
    `avoid`, which are about to be deleted; otherwise the body is stored in another variant, under another name.
    """
    for variant in range(_MAX_VARIANTS):
        prefix = record_prefix(kind, repository_id, domain.machine_id, variant)
        sealed = seal_record(domain.record_key(kind), prefix, body)
        name = f"{folder}{digest(prefix, sealed).hex()}"
        if name not in avoid and _put_or_compare(store, name, prefix + sealed):
            return name
    raise damaged(folder, f"all {_MAX_VARIANTS} variants of an object are damaged or being deleted")


def _put_or_compare(store: Store, name: str, data: bytes) -> bool:
    """Create an object; False if its name is taken by other bytes than these."""
    try:
        store.put(name, [data])
    except AlreadyExistsError:
        with suppress(NotFoundError):
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
