"""Index objects: which chunk lies where in which pack. Specification: docs/format/index.md.

8 header, 16 repository, 16 machine, u32 variant, then sealed (AES-SIV):
u32 number of packs; per pack 32 name, u64 size, u32 first chunk's byte, u32 number of chunks;
then 40 bytes per chunk, pack after pack, as in the packs' own tables of contents
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence

import numpy as np

from remetal.repository.cipher import TAG_SIZE
from remetal.repository.machines import Domain
from remetal.repository.objects import INDEX, damaged
from remetal.repository.packs import ENTRY, FOOTER, MAX_CHUNKS, MAX_PACK, PROLOGUE, Contents, check_entries
from remetal.repository.records import get_record, put_record
from remetal.storage import Store
from remetal.units import MIB

PACKS_PER_INDEX = 16
"""After so many packs an index object is written, so that a backup that was cut off goes on from there."""
MAX_INDEX = 32 * MIB
MAX_PACKS = 1 << 12

_COUNT = struct.Struct("<I")
_PACK = struct.Struct("<32sQII")


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
