"""Index objects: which chunk lies where in which pack. Specification: docs/format/index.md.

8 header, 16 repository, 16 machine, u32 variant, then sealed (AES-SIV):
u32 number of packs; per pack 32 name, u64 size, u32 first chunk's byte, u32 number of chunks;
then 40 bytes per chunk, pack after pack, as in the packs' own tables of contents
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence

import numpy as np

from remetal.errors import DamagedError
from remetal.repository.cipher import TAG_SIZE, digest
from remetal.repository.machines import Domain
from remetal.repository.objects import INDEX, damaged, miscalculated
from remetal.repository.packs import ENTRY, FOOTER, MAX_CHUNKS, MAX_PACK, PROLOGUE, Contents, check_sizes
from remetal.repository.records import get_record, put_record
from remetal.storage import Store
from remetal.units import MIB

PACKS_PER_INDEX = 16
"""After so many packs an index object is written, so that a backup that was cut off goes on from there."""
INDEX_CHUNKS = 1 << 16
"""An index object that is large for other reasons, too, is written once it has so many chunks."""
MAX_INDEX = 32 * MIB
MAX_PACKS = 1 << 12

_COUNT = struct.Struct("<I")
_PACK = struct.Struct("<32sQII")
_PACKS = np.dtype([("id", "u1", 32), ("size", "<u8"), ("start", "<u4"), ("chunks", "<u4")])


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
    packs = np.frombuffer(body, _PACKS, count, _COUNT.size)
    sizes, starts, chunks = packs["size"], packs["start"], packs["chunks"]
    possible = (starts > PROLOGUE.size) & (starts < sizes) & (sizes <= MAX_PACK) & (chunks > 0) & (chunks <= MAX_CHUNKS)
    if not bool(possible.all()):
        raise damaged(name, "a pack in it has impossible sizes")
    ends = np.cumsum(chunks, dtype=np.int64)
    if len(body) - position != int(ends[-1]) * ENTRY.itemsize:
        raise damaged(name, "it is shorter or longer than its numbers say")
    entries = np.frombuffer(body, ENTRY, offset=position)
    stored = check_sizes(name, entries)
    filled = starts + np.add.reduceat(stored, ends - chunks)
    if bool((filled > sizes.astype(np.int64) - FOOTER.size - TAG_SIZE - chunks * ENTRY.itemsize).any()):
        raise damaged(name, "its table of contents promises more than it can hold")
    found = zip(_PACK.iter_unpack(body[_COUNT.size : position]), ends.tolist(), strict=True)
    return [Contents(identity, size, start, entries[end - own : end]) for (identity, size, start, own), end in found]


def put_index(
    store: Store,
    repository_id: str,
    domain: Domain,
    packs: Sequence[Contents],
    *,
    entry: int,
    avoid: Collection[str] = (),
) -> str:
    """Write an index object for packs that are stored, and return its name; `entry` and `avoid` as for `put_record`.

    Raises RemetalError if this computer miscalculates.
    """
    body = encode_index(packs)
    try:
        good = _facts(decode_index("of an index", body)) == _facts(packs)
        good = good and all(digest(each.entries.tobytes()) == each.seal for each in packs if each.seal)
    except DamagedError:
        good = False
    if not good:
        raise miscalculated("an index object")
    folder = index_folder(domain.machine_id)
    return put_record(store, "index", folder, repository_id, domain, body, entry=entry, avoid=avoid)


def _facts(packs: Sequence[Contents]) -> list[tuple[bytes, int, int, bytes]]:
    return [(each.identity, each.size, each.start, each.entries.tobytes()) for each in packs]


def read_index(store: Store, name: str, repository_id: str, domain: Domain) -> list[Contents]:
    """Read one index object. Raises DamagedError."""
    return decode_index(name, get_record(store, name, "index", repository_id, domain, MAX_INDEX))
