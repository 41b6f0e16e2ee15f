"""The object `config`, which anybody who writes to the store can change: it bears a checksum, and no signature."""

from __future__ import annotations

import json

from remetal.repository.cipher import digest
from tests.faults.hostile.case import ESCAPES, NAMES, NUMBERS, Attacker, Case


def spoiled(name: str, data: bytes, *ends: int) -> Case:
    return Case("config", name, lambda attacker: attacker.put("config", data), ends=frozenset(ends or {5}))


def sealed(name: str, text: bytes, *ends: int) -> Case:
    return spoiled(name, text + b"\n" + digest(text).hex().encode() + b"\n", *ends)


def with_values(name: str, *ends: int, **changes: object) -> Case:
    good = {"format": 1, "id": "0" * 32, "chunk_size": 65536, "created": "2026-01-01T00:00:00Z"}
    return sealed(name, json.dumps(good | changes).encode(), *ends)


def sparse(attacker: Attacker) -> None:
    with (attacker.repository / "config").open("wb") as file:
        file.truncate(1 << 40)


CASES = [
    *(with_values(f"id {each[:40]!r}", id=each) for each in NAMES),
    *(with_values(f"created {each[:40]!r}", created=each) for each in (ESCAPES, "x" * 100_000, "two\nlines", "[/x]")),
    *(with_values(f"chunk size {str(each)[:20]}", chunk_size=each) for each in NUMBERS if each),
    *(with_values(f"format {str(each)[:20]}", 3, 5, format=each) for each in NUMBERS if each != 1),
    with_values("format as text", format="1"),
    with_values("format as a fraction", format=1.5),
    with_values("an unknown field", extra=1),
    spoiled("nothing", b""),
    spoiled("a wrong checksum", b"{}\n" + b"0" * 64 + b"\n"),
    spoiled("no UTF-8", b"\xff\xfe" * 100),
    spoiled("arrays, 10^4 deep", b"[" * 10_000 + b"]" * 10_000),
    spoiled("objects, 10^4 deep", b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    sealed("objects in a value, 10^4 deep", b'{"format":' + b'{"a":' * 9_000 + b"1" + b"}" * 9_001),
    sealed("the same field twice", b'{"format": 1, "format": 2}', 3, 5),
    sealed("a number of 60 000 digits", b'{"format": ' + b"9" * 60_000 + b"}", 3, 5),
    sealed("terminal escapes in a field", b'{"format": 1, "\\u001b[2J\\u009b": 1}'),
    Case("config", "a sparse object of a TiB", sparse),
]
