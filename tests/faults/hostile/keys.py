"""What lies below `keys/`: passphrase slots, recipients, revocations, machines and their secrets.

Anybody who writes to the store can put a machine there, signed by itself and sealed to the recipients' public keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from remetal.repository.cipher import KEY_SIZE, WRAPPING, derive, sign, verify_key
from remetal.repository.machines import MachineRecord, machine_id
from remetal.repository.objects import MACHINES, RECIPIENTS, REVOKED, SECRETS, SLOTS, encode_lines
from remetal.repository.recipients import RecipientRecord, Revocation, recipient_id
from remetal.repository.slots import Slot
from tests.faults.hostile.case import ALL, ESCAPES, NAMES, NUMBERS, Attacker, Case

_KEYS = (*ALL, ("key", "list"))
_TIME = "2026-01-01T00:00:00Z"
_ANY = frozenset({0, 3, 5})


def only_slot(change: Callable[[dict[str, Any]], None]) -> Callable[[Attacker], None]:
    """Return what leaves one passphrase slot, changed."""

    def make(attacker: Attacker) -> None:
        (name,) = attacker.names(SLOTS)
        slot = msgspec.json.decode(attacker.get(name))
        (attacker.repository / name).unlink()
        change(slot)
        attacker.put_named(f"{SLOTS}{'0' * 32}.", msgspec.json.encode(slot))

    return make


def with_slot(name: str, **changes: object) -> Case:
    return Case("keys", f"slot with {name}", only_slot(lambda slot: slot.update(changes)), ends=frozenset({3, 5}))


def raw_slot(name: str, data: bytes) -> Case:
    def make(attacker: Attacker) -> None:
        (attacker.repository / attacker.names(SLOTS)[0]).unlink()
        attacker.put_named(f"{SLOTS}{'0' * 32}.", data)

    return Case("keys", f"slot of {name}", make)


def many_slots(attacker: Attacker) -> None:
    """A thousand slots that cost all that is allowed before the good one."""
    (name,) = attacker.names(SLOTS)
    slot = msgspec.json.decode(attacker.get(name), type=Slot)
    for number in range(1000):
        other = msgspec.structs.replace(slot, id=f"{number:032x}", memory=1 << 16, iterations=8)
        attacker.put_named(f"{SLOTS}{'0' * 29}{number:03x}.", msgspec.json.encode(other))


def machine(count: int = 1, secrets: int = 0, **changes: Any) -> Callable[[Attacker], None]:
    """Return what enrolls machines whose records differ in these fields; `secrets` are the bytes of their secrets."""

    def make(attacker: Attacker) -> None:
        for number in range(count):
            seed = derive("hostile machine", number.to_bytes(4, "big"))
            values: dict[str, Any] = {
                "id": machine_id(verify_key(seed)),
                "repository": attacker.keys.repository_id,
                "name": f"evil{number}",
                "verify_key": verify_key(seed),
                "commitment": bytes(32),
                "created": _TIME,
            }
            record = MachineRecord(**(values | changes))
            text = msgspec.json.encode(record, order="deterministic")
            signature = sign(seed, b"remetal 1 machine record\0", text)
            attacker.put_named(f"{MACHINES}{values['id']}.", encode_lines(record, signature))
            if secrets:
                attacker.put_named(f"{SECRETS}{values['id']}.{attacker.key.id}.", bytes(secrets))

    return make


def recipient(count: int = 1, **changes: Any) -> Callable[[Attacker], None]:
    """Return what adds recipients that nobody has certified."""

    def make(attacker: Attacker) -> None:
        for number in range(count):
            kem, key = number.to_bytes(4, "big") * 304, verify_key(derive("r", number.to_bytes(4, "big")))
            values: dict[str, Any] = {
                "id": recipient_id(kem, key),
                "repository": attacker.keys.repository_id,
                "kem_public": kem,
                "verify_key": key,
                "certified_by": attacker.key.id,
                "created": _TIME,
            }
            record = RecipientRecord(**(values | changes))
            attacker.put_named(f"{RECIPIENTS}{number:032x}.", encode_lines(record, bytes(64)))

    return make


def revocation(count: int = 1, **changes: Any) -> Callable[[Attacker], None]:
    """Return what revokes the first recipient, without its signature."""

    def make(attacker: Attacker) -> None:
        for number in range(count):
            values: dict[str, Any] = {
                "id": attacker.key.id,
                "repository": attacker.keys.repository_id,
                "revoked_by": f"{number:032x}",
                "created": _TIME,
            }
            record = Revocation(**(values | changes))
            attacker.put_named(f"{REVOKED}{number:032x}.", encode_lines(record, bytes(64)))

    return make


def lines(folder: str, text: bytes) -> Callable[[Attacker], None]:
    return lambda attacker: (attacker.put_named(f"{folder}{'0' * 32}.", text + b"\n" + b"0" * 128 + b"\n"), None)[1]


def case(name: str, make: Callable[[Attacker], None], *ends: int) -> Case:
    return Case("keys", name, make, _KEYS, frozenset(ends or _ANY))


DEEP = {"arrays, 10^4 deep": b"[" * 10_000, "objects, 10^4 deep": b'{"id":' * 10_000, "no UTF-8": b'{"id":"\xff"}'}

CASES = [
    *(with_slot(f"memory {str(each)[:20]}", memory=each) for each in (*NUMBERS, 1 << 20, 1 << 42)),
    *(with_slot(f"iterations {str(each)[:20]}", iterations=each) for each in NUMBERS if each != 1),
    *(with_slot(f"lanes {str(each)[:20]}", lanes=each) for each in NUMBERS if each != 1),
    with_slot("all that is allowed of both", memory=1 << 20, iterations=4),
    with_slot("a salt of 40 000 bytes", salt="A" * 40_000),
    with_slot("no salt", salt=""),
    with_slot("a sealed part of 40 000 bytes", sealed="A" * 40_000),
    with_slot("a recipient of escapes", recipient=ESCAPES),
    *(raw_slot(name, data) for name, data in DEEP.items()),
    Case("keys", "a thousand costly slots", many_slots, (("snapshots",),), frozenset({0, 3, 5}), seconds=12.0),
    *(
        case(f"machine named {each[:30]!r}", machine(name=each))
        for each in NAMES
        if each not in {"[/red][bold", "%s%n{0}"}
    ),
    *(case(f"machine made at {each[:30]!r}", machine(created=each, secrets=2 * KEY_SIZE + WRAPPING)) for each in NAMES),
    *(case(f"machine with the id {each[:30]!r}", machine(id=each)) for each in NAMES),
    case("machine of markup", machine(name="[/red][bold]", created="[/red][bold]")),
    case("machine with a long key", machine(verify_key=bytes(20_000))),
    case("a thousand machines", machine(1000, secrets=2 * KEY_SIZE + WRAPPING)),
    case("secrets of 60 000 bytes", machine(secrets=60_000)),
    *(case(f"recipient made at {each[:30]!r}", recipient(created=each)) for each in NAMES[:4] + NAMES[10:13]),
    *(case(f"recipient certified by {each[:30]!r}", recipient(certified_by=each)) for each in NAMES[4:10]),
    case("recipient of another repository", recipient(repository="0" * 32)),
    case("recipient with a long key", recipient(kem_public=bytes(20_000))),
    case("three thousand recipients", recipient(3000)),
    *(case(f"revoked by {each[:30]!r}", revocation(revoked_by=each)) for each in NAMES[4:12]),
    case("revoked by itself", revocation(revoked_by="0" * 32, id="0" * 32)),
    case("three thousand revocations", revocation(3000)),
    *(
        case(f"{folder} of {name}", lines(folder, data))
        for folder in (MACHINES, RECIPIENTS, REVOKED)
        for name, data in DEEP.items()
    ),
]
