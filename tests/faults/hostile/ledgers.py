"""Ledgers that a recipient's key has signed: its owner was robbed of it, or is the attacker."""

from __future__ import annotations

from typing import Any

import msgspec

from tests.faults.hostile.case import NAMES, NUMBERS, Case, Lazy, made, squeeze
from tests.faults.hostile.history import lying, zeros

_WORDS = (("snapshots",), ("check",), ("prune", "--dry-run"))
_NOTHING: dict[str, Any] = {"since": 0, "waited": [], "packs": b"", "names": []}
_WITNESS: dict[str, Any] = {"time": 0.0, "host_id": "", "boot_id": "", "uptime": 0.0}
GOOD: dict[str, Any] = {
    "time": "2026-01-01T00:00:00Z",
    "version": "1",
    "gone": [],
    "condemned": [],
    "doomed": _NOTHING,
}


def raw(name: str, packed: Lazy, *, harmless: bool = False) -> Case:
    return Case(
        "ledgers",
        name,
        lambda attacker: attacker.put_ledger(made(packed)),
        _WORDS,
        frozenset({0, 3, 5}),
        refused=not harmless,
    )


def ledger(name: str, *, harmless: bool = False, **changes: Any) -> Case:
    values = GOOD | changes
    return raw(name, squeeze(msgspec.msgpack.encode(values)), harmless=harmless)


def gone(name: str, *ranges: dict[str, Any], harmless: bool = False) -> Case:
    base = {"first": 1, "last": 1, "previous": "", "id": "0" * 64}
    return ledger(f"gone: {name}", gone=[base | each for each in ranges], harmless=harmless)


def condemned(name: str, *, harmless: bool = False, **changes: Any) -> Case:
    return ledger(f"condemned: {name}", condemned=[_NOTHING | changes], harmless=harmless)


_DOOMED = b"\x81\xa6doomed\x81\xa5names\xdd"

CASES = [
    raw("a GiB of zeros", lambda: zeros(1 << 30)),
    raw("255 MiB of zeros", lambda: zeros(255 << 20)),
    raw("says 2^63", lying(1 << 63, 1000)),
    raw("arrays, 10^4 deep", squeeze(b"\x91" * 10_000 + b"\xc0")),
    raw("2^32 - 1 ranges", squeeze(b"\x81\xa4gone\xdd\xff\xff\xff\xff")),
    raw(
        "60 000 000 names",
        squeeze(b"\x81\xa6doomed\x81\xa5names\xdd" + (60_000_000).to_bytes(4, "big") + b"\xa0" * 60_000_000),
    ),
    ledger("as it should be", harmless=True),
    ledger("a time of escapes", time="\x1b[2J"),
    *(gone(f"up to {str(each)[:20]}", {"last": each}, harmless=each == 1) for each in NUMBERS if each < 1 << 64),
    *(gone(f"from {str(each)[:20]}", {"first": each}, harmless=each == 1) for each in NUMBERS if each < 1 << 64),
    gone("ranges that overlap", {}, {}),
    gone("an id of escapes", {"id": "\x1b" * 64}),
    gone("100 000 ranges", *({"first": each, "last": each} for each in range(1, 100_001))),
    *(condemned(f"name {each[:30]!r}", names=[each]) for each in NAMES),
    condemned("a name of another machine", names=[f"index/{'0' * 32}/{'0' * 64}"]),
    condemned("the keys", names=[f"keys/machines/{'0' * 64}"]),
    condemned("31 bytes of packs", packs=bytes(31)),
    condemned("a million packs", packs=bytes(32_000_000), harmless=True),
    *(condemned(f"since {str(each)[:20]}", since=each, harmless=each in {0, 1}) for each in NUMBERS if each < 1 << 64),
    *(
        condemned(f"of the age {each}", waited=[{"witness": _WITNESS, "age": each}], harmless=each > 0)
        for each in (-1.0, float("nan"), float("inf"), 1e308)
    ),
    condemned("33 witnesses", waited=[{"witness": _WITNESS, "age": 0.0}] * 33),
    condemned("10^6 witnesses", waited=[{"witness": _WITNESS, "age": 0.0}] * 1_000_000),
]
