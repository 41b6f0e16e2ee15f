"""Locks, which anybody who writes to the store can put there, and a backup reads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from remetal.repository.objects import LOCKS
from tests.faults.hostile.case import NAMES, NUMBERS, Attacker, Case

_WORDS = (("backup", "--machine", "web", "--disk", "../disk.img"), ("prune", "--dry-run"), ("snapshots",))
_ENDS = frozenset({0, 3, 5, 6})


def lock(name: str, make: Callable[[Attacker, str], None]) -> Case:
    def spoil(attacker: Attacker) -> None:
        (attacker.folder / "disk.img").write_bytes(bytes(1 << 20))
        make(attacker, f"{LOCKS}{attacker.keys.machine_id}/")

    return Case("locks", name, spoil, _WORDS, _ENDS, refused=False)


def held(name: str, **changes: object) -> Case:
    """A lock that somebody elsewhere holds, with some values changed."""
    good = {
        "machine": "0" * 32,
        "host": "elsewhere",
        "host_id": "x",
        "boot_id": "y",
        "namespace": "z",
        "pid": 1,
        "started": 1,
        "token": "0" * 32,
    }

    def make(attacker: Attacker, folder: str) -> None:
        values = good | {"time": time.time()} | changes
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        values = {key: boot if value == "HERE" else value for key, value in values.items()}
        attacker.put(f"{folder}{1:016x}", json.dumps(values).encode())

    return lock(name, make)


def raw(name: str, data: bytes) -> Case:
    return lock(name, lambda attacker, folder: attacker.put(f"{folder}{1:016x}", data))


def many(count: int) -> Callable[[Attacker, str], None]:
    def make(attacker: Attacker, folder: str) -> None:
        for number in range(count):
            attacker.put(f"{folder}{number:016x}", b"{}")

    return make


CASES = [
    *(held(f"host {each[:30]!r}", host=each) for each in NAMES),
    *(held(f"process {str(each)[:20]}", pid=each) for each in NUMBERS),
    *(held(f"process {str(each)[:20]} of this start", pid=each, boot_id="HERE") for each in NUMBERS),
    *(held(f"time {each}", time=each) for each in (1e308, -1e308, 0.0, 1e15, -1.0)),
    held("host that speaks as the program does", host="x\nremetal: all is well"),
    raw(
        "time of no number",
        b'{"machine":"","host":"","host_id":"","boot_id":"","namespace":"","pid":1,"started":1,"time":NaN,"token":""}',
    ),
    raw(
        "time of 1e999",
        b'{"machine":"","host":"","host_id":"","boot_id":"","namespace":"","pid":1,"started":1,"time":1e999,"token":""}',
    ),
    raw("nothing", b""),
    raw("arrays, 10^4 deep", b"[" * 10_000),
    raw("objects, 10^4 deep", b'{"pid":' * 10_000),
    raw("no UTF-8", b'{"host":"\xff"}'),
    lock("of 70 KiB", lambda attacker, folder: attacker.put(f"{folder}{1:016x}", bytes(70 << 10))),
    lock("the last number of all", lambda attacker, folder: attacker.put(f"{folder}{'f' * 16}", b"{}")),
    lock("the number before the last", lambda attacker, folder: attacker.put(f"{folder}{'f' * 15}e", b"{}")),
    lock("99 locks", many(99)),
    lock("500 locks", many(500)),
]
