"""Layout records inside of validly signed snapshots: names and numbers that reach programs which run as root."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from tests.faults.hostile.case import NAMES, NUMBERS, PLAN, SHOW, Attacker, Case, Lazy, made
from tests.faults.hostile.sample import changed, leaves, sample_layout

_WORDS = (SHOW, (*SHOW, "--json"), PLAN)
_FREE = {"label", "model", "serial", "wwn", "bus", "tokens", "mount_text", "path", "transport"}
"""Fields of any text, which is shown and goes to no program but as one argument; so is all that tells of hardware."""
_SHORT = [each for each in NAMES if 0 < len(each) < 100]


def record(name: str, data: Lazy, *, refused: bool = True) -> Case:
    def make(attacker: Attacker) -> None:
        attacker.commit(layout=made(data))

    return Case("layouts", name, make, _WORDS, frozenset({3} if refused else {0, 3}), refused=refused)


def everywhere() -> Iterator[Case]:
    """Yield a hostile name for every text of the record, and a hostile number for every number."""
    whole = json.loads(sample_layout())
    for number, (path, value) in enumerate(leaves(whole)):
        way = ".".join(map(str, path))
        field = path[-1] if isinstance(path[-1], str) else path[-2]
        if isinstance(value, str) and field not in {"metadata", "boot_code", "protective_mbr"}:
            each = _SHORT[number % len(_SHORT)]
            free = field in _FREE or path[0] == "inventory" or (field == "name" and path[0] != "disks")
            yield record(f"{way} is {each!r}", changed(path, each), refused=not free)
        elif isinstance(value, int) and not isinstance(value, bool):
            bad = NUMBERS[number % len(NUMBERS)]
            yield record(f"{way} is {str(bad)[:20]}", changed(path, bad), refused=False)


def deep(opening: bytes, closing: bytes) -> bytes:
    good = sample_layout()
    return good[:-1] + b',"extra":' + opening * 10_000 + b"1" + closing * 10_000 + b"}"


def long(key: str, value: Any, count: int) -> Callable[[], bytes]:
    """Return what makes a record of which one list is very long."""

    def make() -> bytes:
        row = json.dumps(value).encode()
        head = json.dumps({each: [] for each in ("disks", "layers") if each != key}).encode()[:-1]
        return head + b',"' + key.encode() + b'":[' + b",".join([row] * count) + b"]}"

    return make


CASES = [
    *everywhere(),
    *(record(f"disk named {each[:30]!r}", changed(("disks", 0, "name"), each)) for each in NAMES),
    *(record(f"group named {each[:30]!r}", changed(("layers", 11, "name"), each)) for each in NAMES),
    *(record(f"array named md/{each[:30]!r}", changed(("layers", 8, "device"), f"md/{each}")) for each in NAMES),
    *(record(f"label {each[:30]!r}", changed(("layers", 2, "label"), each), refused=False) for each in NAMES),
    record("arrays, 10^4 deep", lambda: deep(b"[", b"]")),
    record("objects, 10^4 deep", lambda: deep(b'{"a":', b"}")),
    record("nothing but arrays, 10^5 deep", b"[" * 100_000),
    record("no UTF-8", b'{"disks": "\xff\xfe"}'),
    record("nothing", b""),
    record("nul", bytes(1000)),
    record("of 30 MiB of space", lambda: b" " * (30 << 20)),
    record("600 000 disks", long("disks", {"name": "a", "size": 512}, 600_000)),
    record("800 000 layers", long("layers", {"layer": "raw", "on": "a", "size": 1}, 400_000)),
    record(
        "of 2 000 000 modaliases",
        lambda: (
            b'{"disks":[],"layers":[],"inventory":{"firmware":"b","architecture":"x","modaliases":['
            + b'"",' * 2_000_000
            + b'""]}}'
        ),
    ),
    record("a number of 100 000 digits", b'{"version": ' + b"9" * 100_000 + b"}"),
    record("the same key twice", b'{"disks":[],"disks":[{"name":"../x","size":1}],"layers":[]}'),
]
