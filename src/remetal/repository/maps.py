"""Image maps: which chunk stands where in an image, in pages of 4096 chunks. Specification: docs/format/map.md.

A page's body, sealed by AES-SIV so that an equal page is an equal object:

    u32 number of slots, u32 number of runs; per run u16 length, u8 kind, u8 zero; then 32 bytes per data chunk
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby

from remetal.errors import DamagedError
from remetal.repository.cipher import derive
from remetal.repository.machines import Domain
from remetal.repository.objects import MAPS, damaged
from remetal.repository.records import PREFIX_SIZE, get_record, put_record
from remetal.storage import Store

PAGE_CHUNKS = 4096
HOLE, ZERO, DATA = range(3)
ID_SIZE = 32
ZERO_ID = bytes(ID_SIZE)
"""Stands for a chunk of nothing but zero bytes, which is stored nowhere."""

_HEAD = struct.Struct("<II")
_RUN = struct.Struct("<HBB")
MAX_PAGE = PREFIX_SIZE + 16 + _HEAD.size + PAGE_CHUNKS * (_RUN.size + ID_SIZE)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive chunks of an image: index of the first, and their ids (ZERO_ID for zeros)."""

    first: int
    ids: list[bytes]


class PageBuilder:
    """One page in the making: `slots` chunks, all of them holes until they are set."""

    def __init__(self, slots: int) -> None:
        self._kinds = bytearray(slots)
        self._ids = bytearray(slots * ID_SIZE)

    def set(self, slot: int, ids: list[bytes]) -> None:
        """Fill consecutive slots."""
        for number, identity in enumerate(ids, start=slot):
            self._kinds[number] = ZERO if identity == ZERO_ID else DATA
        self._ids[slot * ID_SIZE : (slot + len(ids)) * ID_SIZE] = b"".join(ids)

    def encode(self) -> bytes:
        """Return the plain body, or nothing at all for a page of holes."""
        if not any(self._kinds):
            return b""
        runs: list[bytes] = []
        data: list[bytes] = []
        position = 0
        for kind, slots in groupby(self._kinds):
            length = sum(1 for _ in slots)
            runs.append(_RUN.pack(length, kind, 0))
            if kind == DATA:
                data.append(bytes(self._ids[position * ID_SIZE : (position + length) * ID_SIZE]))
            position += length
        return b"".join([_HEAD.pack(len(self._kinds), len(runs)), *runs, *data])


def decode_page(name: str, body: bytes, slots: int) -> list[Run]:
    """Parse a page that must have `slots` slots; `Run.first` counts from the page's start. Raises DamagedError."""
    found, count = _HEAD.unpack_from(body) if len(body) >= _HEAD.size else (0, 0)
    if found != slots or not 0 < count <= slots or _HEAD.size + count * _RUN.size > len(body):
        raise damaged(name, "its numbers do not fit the image")
    position = _HEAD.size + count * _RUN.size
    pieces = list(_RUN.iter_unpack(body[_HEAD.size : position]))
    ids = memoryview(body)[position:]
    data = sum(length for length, kind, _ in pieces if kind == DATA)
    shapes = all(length > 0 and kind <= DATA and zero == 0 for length, kind, zero in pieces)
    shapes = shapes and any(kind != HOLE for _, kind, _ in pieces)
    if not shapes or sum(length for length, _, _ in pieces) != slots or len(ids) != data * ID_SIZE:
        raise damaged(name, "its runs do not fit its numbers")
    runs: list[Run] = []
    slot = used = 0
    for length, kind, _ in pieces:
        if kind != HOLE:
            new = [ZERO_ID] * length if kind == ZERO else _split_ids(ids[used : used + length * ID_SIZE])
            if runs and runs[-1].first + len(runs[-1].ids) == slot:
                runs[-1].ids.extend(new)
            else:
                runs.append(Run(slot, new))
        used += length * ID_SIZE if kind == DATA else 0
        slot += length
    return runs


def page_count(size: int, chunk_size: int) -> int:
    """Return how many pages the map of an image of `size` bytes has."""
    return -(-size // (chunk_size * PAGE_CHUNKS))


def page_slots(number: int, size: int, chunk_size: int) -> int:
    """Return how many chunks page `number` of an image describes."""
    return min(PAGE_CHUNKS, -(-size // chunk_size) - number * PAGE_CHUNKS)


def map_digest(size: int, chunk_size: int, pages: Iterable[bytes]) -> str:
    """Return the identity of an image's map in hexadecimal: equal only for equal content of one machine."""
    pieces = chain([struct.pack("<QQ", size, chunk_size)], (page or ZERO_ID for page in pages))
    return derive("image map", *pieces).hex()


def map_folder(machine_id: str) -> str:
    """Return the prefix of a machine's map pages."""
    return f"{MAPS}{machine_id}/"


def page_name(machine_id: str, page: bytes) -> str:
    """Return the name of a machine's map page with this hash."""
    return f"{map_folder(machine_id)}{page.hex()}"


def put_page(
    store: Store, repository_id: str, domain: Domain, body: bytes, *, entry: int, former: bytes = b""
) -> bytes:
    """Store a page and return the hash that names it; `entry` as for `put_record`.

    `former` is the hash of a page that will stay, or nothing: if it is there, whole and the same, it is the one.
    """
    if former:
        with suppress(DamagedError):
            if _read_page(store, repository_id, domain, former) == body:
                return former
    name = put_record(store, "map", map_folder(domain.machine_id), repository_id, domain, body, entry=entry)
    return bytes.fromhex(name[-64:])


def read_pages(
    store: Store, repository_id: str, domain: Domain, *, size: int, chunk_size: int, pages: tuple[bytes, ...]
) -> Iterator[Run]:
    """Yield the runs of an image's map in order, one page in memory at a time. Raises DamagedError."""
    for number, page in enumerate(pages):
        if not page:
            continue
        body = _read_page(store, repository_id, domain, page)
        for run in decode_page(page_name(domain.machine_id, page), body, page_slots(number, size, chunk_size)):
            yield Run(number * PAGE_CHUNKS + run.first, run.ids)


def _read_page(store: Store, repository_id: str, domain: Domain, page: bytes) -> bytes:
    return get_record(store, page_name(domain.machine_id, page), "map", repository_id, domain, MAX_PAGE)


def _split_ids(ids: memoryview) -> list[bytes]:
    return [bytes(ids[start : start + ID_SIZE]) for start in range(0, len(ids), ID_SIZE)]
