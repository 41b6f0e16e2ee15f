"""Index objects and pages of maps, sealed with the machine's own catalog key."""

from __future__ import annotations

import struct
from collections.abc import Callable

from remetal.repository.indexes import index_folder
from remetal.repository.maps import map_digest
from remetal.repository.objects import INDEX, MAPS
from tests.faults.hostile.case import NUMBERS, PLAN, READ, VOLUME, Attacker, Case

_WORDS = (PLAN, ("check",), READ, ("repair",))
_ENDS = frozenset({0, 3, 5})


_HARMLESS = {"chunks from 511", "a chunk of 511", "the same pack 4096 times", "200 000 chunks"}
"""Index objects that are possible, and tell of packs that are not there: so nobody relies on them."""


def index(name: str, body: bytes) -> Case:
    def make(attacker: Attacker) -> None:
        attacker.put_record("index", index_folder(attacker.keys.machine_id), body)

    return Case("records", f"index: {name}", make, _WORDS, _ENDS, refused=name not in _HARMLESS)


def only_index(name: str, *rows: tuple[bytes, int, int, int], entries: bytes = b"", count: int = -1) -> Case:
    head = struct.pack("<I", len(rows) if count < 0 else count) + b"".join(struct.pack("<32sQII", *row) for row in rows)
    return index(name, head + entries)


def entry(word: int, plain: int) -> bytes:
    return bytes(32) + struct.pack("<II", word & 0xFFFFFFFF, plain & 0xFFFFFFFF)


def refer_to(attacker: Attacker, page: bytes) -> None:
    """Commit a snapshot whose first volume has one page in its map, with this hash."""
    images = attacker.body()["images"]
    (place,) = [each for each in images if each["volume"] == VOLUME]
    place["pages"] = [page]
    place["digest"] = map_digest(place["size"], place["chunk_size"], place["pages"])
    attacker.commit(images=images)


def page(name: str, body: bytes) -> Case:
    """A snapshot whose first volume has this page as its map."""

    def make(attacker: Attacker) -> None:
        refer_to(attacker, attacker.put_page(body))

    return Case("records", f"map: {name}", make, _WORDS, _ENDS)


def runs(*each: tuple[int, int, int], slots: int = 144, ids: bytes = b"", count: int = -1) -> bytes:
    head = struct.pack("<II", slots, len(each) if count < 0 else count)
    return head + b"".join(struct.pack("<HBB", *run) for run in each) + ids


def damaged(folder: str, name: str, change: Callable[[bytes], bytes]) -> Case:
    """One object of a folder under the hash of other bytes, without any key."""

    def make(attacker: Attacker) -> None:
        data = attacker.get(attacker.names(folder)[0])
        name = attacker.put_named(f"{folder}{attacker.keys.machine_id}/", change(data))
        if folder == MAPS:
            refer_to(attacker, bytes.fromhex(name[-64:]))

    return Case("records", f"{folder}{name}", make, _WORDS, _ENDS)


_U32 = (1 << 32) - 1
_NAME = bytes(range(32))

_SMALL = [each for each in NUMBERS if 0 <= each <= _U32]
_ENTRY = entry(100, 100)

CASES = [
    index("nothing", b"\0"),
    only_index("2^32 - 1 packs", count=_U32),
    only_index("no pack", count=0),
    only_index("4097 packs", count=4097),
    *(
        only_index(f"a pack of {each}", (_NAME, each, 1212, 1), entries=entry(100, 100))
        for each in NUMBERS
        if 0 <= each < 1 << 64
    ),
    *(
        only_index(f"chunks from {each}", (_NAME, 5000, each, 1), entries=entry(100, 100))
        for each in NUMBERS
        if 0 <= each <= _U32
    ),
    *(
        only_index(f"{each} chunks", (_NAME, 5000, 1212, each), entries=entry(100, 100))
        for each in NUMBERS
        if 0 <= each <= _U32 and each != 1
    ),
    *(
        only_index(f"a chunk stored as {each}", (_NAME, 5000, 1212, 1), entries=entry(each, 100))
        for each in NUMBERS
        if 0 <= each <= _U32
    ),
    *(
        only_index(f"a chunk of {each}", (_NAME, 5000, 1212, 1), entries=entry(100, each))
        for each in NUMBERS
        if 0 <= each <= _U32
    ),
    only_index("sizes that add up to 2^32", (_NAME, 5000, 1212, 4), entries=entry(1 << 30, 1 << 22) * 4),
    only_index("the same pack 4096 times", *[(_NAME, 5000, 1212, 1)] * 4096, entries=entry(100, 100) * 4096),
    only_index("200 000 chunks", *[(_NAME, 32 << 20, 1212, 16384)] * 12, entries=entry(17, 1) * 16384 * 12),
    page("nothing", b"\0"),
    page("no run", runs()),
    page("2^32 - 1 runs", runs(count=_U32)),
    page("2^32 - 1 slots", runs((144, 0, 0), slots=_U32)),
    page("0 slots", runs((0, 0, 0), slots=0)),
    page("a run of nothing", runs((0, 1, 0), (144, 0, 0))),
    page("a run of 65535", runs((65535, 1, 0))),
    page("an unknown kind", runs((144, 3, 0))),
    page("a byte that is not zero", runs((144, 1, 1))),
    page("chunks without ids", runs((144, 2, 0))),
    page("ids without chunks", runs((144, 0, 0), ids=bytes(32))),
    page("chunks that nobody knows", runs((144, 2, 0), ids=_NAME * 144)),
    page("chunks named zero", runs((144, 2, 0), ids=bytes(32 * 144))),
    page("all zeros", runs((144, 1, 0))),
    *(
        damaged(folder, name, change)
        for folder in (INDEX, MAPS)
        for name, change in {
            "cut": lambda data: data[:60],
            "of another kind": lambda data: b"RMTLX\x01\0\0" + data[8:],
            "of another format": lambda data: data[:5] + b"\xff\0\0" + data[8:],
            "of the variant 2^32 - 1": lambda data: data[:40] + b"\xff" * 4 + data[44:],
            "of another repository": lambda data: data[:8] + bytes(16) + data[24:],
            "of another machine": lambda data: data[:24] + bytes(16) + data[40:],
            "of 40 MiB": lambda data: data + bytes(40 << 20),
        }.items()
    ),
]
