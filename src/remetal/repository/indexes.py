"""Index objects: which chunk lies where in which pack. Specification: docs/format/index.md.

8 header, 16 repository, 16 machine, then sealed (AES-SIV):
u32 number of packs; per pack 32 name, u64 size, u32 first chunk's byte, u32 number of chunks;
then 40 bytes per chunk, pack after pack, as in the packs' own tables of contents
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from remetal.repository.cipher import TAG_SIZE, CipherError, open_record, seal_record
from remetal.repository.machines import Domain
from remetal.repository.objects import HEADER_SIZE, INDEX, damaged, get_named, header, put_named
from remetal.repository.packs import ENTRY, FOOTER, MAX_CHUNKS, MAX_PACK, PROLOGUE, Contents, check_entries
from remetal.storage import Store
from remetal.units import MIB

PACKS_PER_INDEX = 16
"""After so many packs an index object is written, so that a backup that was cut off goes on from there."""
MAX_INDEX = 32 * MIB
MAX_PACKS = 1 << 12

_COUNT = struct.Struct("<I")
_PACK = struct.Struct("<32sQII")
PREFIX_SIZE = HEADER_SIZE + 32


def record_prefix(kind: str, repository_id: str, machine_id: str) -> bytes:
    """Return the 40 clear bytes that a catalog object of this kind starts with, and that its seal binds."""
    return header(kind) + bytes.fromhex(repository_id) + bytes.fromhex(machine_id)


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


def put_index(store: Store, repository_id: str, domain: Domain, packs: Sequence[Contents]) -> str:
    """Write an index object for packs that are stored, and return its name."""
    return put_record(store, "index", index_folder(domain.machine_id), repository_id, domain, encode_index(packs))


def read_index(store: Store, name: str, repository_id: str, domain: Domain) -> list[Contents]:
    """Read one index object. Raises DamagedError."""
    return decode_index(name, get_record(store, name, "index", repository_id, domain, MAX_INDEX))


def put_record(store: Store, kind: str, folder: str, repository_id: str, domain: Domain, body: bytes) -> str:
    """Seal a body under the machine's catalog key, store it under its hash, and return the name."""
    prefix = record_prefix(kind, repository_id, domain.machine_id)
    return put_named(store, folder, prefix, seal_record(domain.record_key(kind), prefix, body))


def get_record(store: Store, name: str, kind: str, repository_id: str, domain: Domain, limit: int) -> bytes:
    """Read, check and open what `put_record` wrote, of at most `limit` bytes. Raises DamagedError."""
    data = get_named(store, name, limit)
    prefix = record_prefix(kind, repository_id, domain.machine_id)
    if data[: len(prefix)] != prefix:
        raise damaged(name, f"it is no {kind} object of this machine and repository")
    try:
        return open_record(domain.record_key(kind), prefix, data[len(prefix) :])
    except CipherError as error:
        raise damaged(name, "its seal is not that of the machine") from error
