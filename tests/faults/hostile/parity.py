"""Parity objects, which anybody who writes to the store can put there, and journals of repairs that never were."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

from remetal.repository.cipher import digest
from remetal.repository.objects import ASIDE, CONFIG, HISTORY, KEYS, PACKS, PARITY, REPAIRS, header
from tests.faults.hostile.case import NAMES, NUMBERS, READ, Attacker, Case, Lazy, made
from tests.faults.hostile.sample import MAPS

_TIME = "2026-01-01T00:00:00Z"
_ENDS = frozenset({0, 3, 5})
_WORDS = (("check",), READ, ("plan", "latest", *MAPS), ("repair",))
_TAKE_BACK = (("check",), ("repair", "--undo"), ("check",))
_ACCEPT = (("repair", "--accept"), ("check",))


def head(attacker: Attacker, rows: Sequence[tuple[bytes, int]], **changes: Any) -> bytes:
    """Return what a parity object begins with, with some of it changed."""
    values = {
        "magic": header("parity"),
        "repository": bytes.fromhex(attacker.keys.repository_id),
        "machine": bytes.fromhex(attacker.keys.machine_id),
        "count": len(rows),
    } | changes
    clear = struct.pack("<8s16s16sI", *(values[each] for each in ("magic", "repository", "machine", "count")))
    return clear + b"".join(struct.pack("<32sI", *row) for row in rows)


def put(attacker: Attacker, data: bytes, count: int) -> None:
    attacker.put(f"{PARITY}{attacker.keys.machine_id}/{count & 0xFF:02x}.{digest(data).hex()}", data)


def lose_pack(attacker: Attacker) -> tuple[bytes, int]:
    """Delete the sample's pack and the true parity; return the pack's name and size, which somebody will want back."""
    for name in attacker.names(PARITY):
        (attacker.repository / name).unlink()
    (name,) = attacker.names(PACKS)
    size = len(attacker.get(name))
    (attacker.repository / name).unlink()
    return bytes.fromhex(name[-64:]), size


def lying(
    name: str,
    rows: Callable[[tuple[bytes, int]], Sequence[tuple[bytes, int]]] = lambda pack: [pack],
    body: Callable[[int], bytes] = bytes,
    times: int = 1,
    named: int | None = None,
    **changes: Any,
) -> Case:
    """A pack is lost, and parity of the attacker's says that it knows what was in it."""

    def make(attacker: Attacker) -> None:
        pack = lose_pack(attacker)
        for number in range(times):
            members = list(rows(pack))
            whole = head(attacker, members, **changes) + body(pack[1])
            whole = whole[: len(whole) - 8] + struct.pack("<Q", number) if times > 1 else whole
            put(attacker, whole, len(members) if named is None else named)

    return Case("parity", name, make, _WORDS, _ENDS)


def foreign(name: str, data: Lazy, count: int = 1) -> Case:
    """An object that is named as parity is, and is none; nothing is lost."""
    return Case("parity", name, lambda attacker: put(attacker, made(data), count), _WORDS, _ENDS, refused=False)


def _with_others(number: int) -> Callable[[tuple[bytes, int]], list[tuple[bytes, int]]]:
    return lambda pack: sorted([pack, *((digest(bytes([each])), pack[1]) for each in range(number - 1))])


def _of_size(size: int) -> Callable[[tuple[bytes, int]], list[tuple[bytes, int]]]:
    return lambda pack: [(pack[0], size)]


def journal(
    name: str,
    *steps: dict[str, Any] | bytes,
    begin: dict[str, Any] | bytes | None = None,
    words: tuple[tuple[str, ...], ...] = _TAKE_BACK,
    refused: bool = True,
    number: int = 1,
) -> Case:
    """A repair that never was, and that somebody is to take back."""

    def make(attacker: Attacker) -> None:
        first = begin if begin is not None else {"time": _TIME, "version": "0.1.0", "heads": {}}
        for at, record in enumerate((first, *steps)):
            data = record if isinstance(record, bytes) else json.dumps(record).encode()
            attacker.put(f"{REPAIRS}{number:016x}/{at:08x}.{digest(data).hex()}", data)

    return Case("parity", name, make, words, _ENDS | {6}, refused=refused)


def added(name: str) -> dict[str, Any]:
    return {"action": "added", "name": name, "parts": []}


def aside(name: str, *parts: str) -> dict[str, Any]:
    return {"action": "aside", "name": name, "parts": list(parts)}


CASES = [
    lying("nothing but zeros"),
    lying("too short", body=lambda size: bytes(size - 1)),
    lying("too long", body=lambda size: bytes(size + 1)),
    lying("no bytes", body=lambda size: b""),
    lying("a pack twice", rows=lambda pack: [pack, pack]),
    lying("packs in no order", rows=lambda pack: _with_others(8)(pack)[::-1]),
    lying("16 packs that are not there", rows=_with_others(16)),
    lying("64 packs that are not there", rows=_with_others(64)),
    lying("65 packs", rows=_with_others(65)),
    lying("255 packs", rows=_with_others(255)),
    *(lying(f"says {count} packs", count=count, named=count) for count in (0, 2, 64, 65, 1 << 16, (1 << 32) - 1)),
    lying("says more packs than its name", named=2),
    *(
        lying(f"says a pack of {size} bytes", rows=_of_size(size))
        for size in (0, 1, 8, 9, 32 << 20, (32 << 20) + 1, (1 << 32) - 1)
    ),
    lying("of another machine", machine=bytes(16)),
    lying("of another repository", repository=bytes(16)),
    lying("of format 255", magic=header("parity")[:5] + b"\xff\0\0"),
    lying("in 300 ways", times=300),
    foreign("an empty object", b""),
    foreign("a header and nothing else", header("parity")),
    foreign("an archive", b"PK\x03\x04" + bytes(1000)),
    foreign("40 MiB of zeros", lambda: bytes(40 << 20)),
    foreign("a count of 0 in its name", b"x" * 100, 0),
    *(journal(f"added {each[:30]!r}", added(each)) for each in NAMES),
    *(journal(f"set aside {each[:30]!r}", aside(each)) for each in NAMES),
    *(
        journal(f"added what is no repair's: {each}", added(f"{each}0000"))
        for each in (CONFIG, HISTORY, *KEYS, REPAIRS, ASIDE, "locks/", "maps/")
    ),
    journal("set aside the config", aside(CONFIG)),
    journal("parts that are not there", aside(f"{PACKS}{'0' * 32}/00/{'0' * 64}", f"{ASIDE}{'0' * 64}")),
    journal("parts from elsewhere", aside(f"{PACKS}{'0' * 32}/00/{'0' * 64}", CONFIG)),
    *(
        journal(f"parts named {each[:30]!r}", aside(f"{PACKS}{'0' * 32}/00/{'0' * 64}", each))
        for each in (*NAMES[:6], "x" * 100_000, "")
    ),
    journal("an action that is none", {"action": "exec", "name": "a", "parts": []}),
    journal("no first record", begin=b"{}"),
    *(
        journal(
            f"heads of {str(each)[:20]}",
            begin={"time": _TIME, "version": "1", "heads": {"0" * 32: each}},
        )
        for each in (-1, 1 << 64, 10**400, "x", None, 1.5)
    ),
    *(
        journal(f"a time of {each[:30]!r}", begin={"time": each, "version": each, "heads": {}})
        for each in NAMES
        if set(each) - set(".")  # which are no times, and nothing that a terminal obeys
    ),
    journal("10,000 levels", b"[" * 10_000 + b"]" * 10_000),
    journal("two MiB in a record", added("x" * (2 << 20))),
    journal("no JSON", b"\xff\xfe"),
    *(journal(f"number {each}", number=each, refused=False) for each in NUMBERS if 0 < each < 1 << 64),
    *(
        journal(f"accepted, {what}", record, words=_ACCEPT, refused=False)
        for what, record in (("config", added(CONFIG)), ("a way out", added("../../pwned")), ("no JSON", b"\xff"))
    ),
]
