"""Targets: everything that is read from a repository, in front of what seals it and behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

import msgspec
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from remetal.errors import DamagedError, RefusedError, UsageError
from remetal.layout.record import ImpossibleLayoutError, decode_layout, encode_layout
from remetal.repository import machines
from remetal.repository.cipher import CipherError, digest, sign
from remetal.repository.config import decode_config, encode_config
from remetal.repository.history import LEDGER, SNAPSHOT, Envelope, entry_name, open_envelope, sequence_of
from remetal.repository.indexes import decode_index, encode_index
from remetal.repository.journal import TOUCHED, Repair
from remetal.repository.kit import parse_kit
from remetal.repository.ledgers import open_ledger
from remetal.repository.locks import LockRecord
from remetal.repository.machines import MachineRecord, MachineSecrets, check_machine, open_secrets, read_machines
from remetal.repository.maps import PAGE_CHUNKS, PageBuilder, decode_page
from remetal.repository.objects import REPAIRS, SECRETS, Record, decode_json, hash_in_name, put_named, split_lines
from remetal.repository.packs import FOOTER, ZSTD, Codec, PackOpener, open_pack, sealed_to
from remetal.repository.parity import decode_head
from remetal.repository.recipients import RecipientRecord, Revocation, check_recipient
from remetal.repository.retired import NOBODY, Retirement
from remetal.repository.shape import MAX_DEPTH, ShapeError, check_shape
from remetal.repository.slots import Slot, check_slot
from remetal.repository.snapshots import decode_body
from remetal.storage.store import check_name, is_name
from tests.faults.hostile.sample import sample_layout
from tests.fuzz.target import Target
from tests.repositories import MemoryStore, Site, backup, make_site

_KEY = bytes(32)
_NAME = "packs/" + "0" * 32 + "/00/" + "0" * 64


@cache
def site() -> Site:
    """Return a small repository with one snapshot."""
    found = make_site()
    backup(found, b"some data " * 20_000, workers=1)
    return found


def stored(prefix: str) -> Callable[[], Iterable[bytes]]:
    """Return what gives the objects below a prefix, if they are small."""
    return lambda: [
        data for name, data in site().store.objects.items() if name.startswith(prefix) and len(data) < 1 << 16
    ]


def strict(kind: type[Record], check: Callable[[Any], None] = lambda record: None) -> Callable[[bytes], None]:
    """Return a reader of a record in JSON: what is read is written and read again."""

    def run(data: bytes) -> None:
        record = decode_json("x", data, kind)
        check(record)
        assert decode_json("x", msgspec.json.encode(record), kind) == record

    return run


def config(data: bytes) -> None:
    for each in (data, data + b"\n" + digest(data).hex().encode() + b"\n"):
        with suppress(DamagedError, RefusedError):
            found = decode_config(each)
            assert decode_config(encode_config(found)) == found


def index(data: bytes) -> None:
    assert encode_index(decode_index("x", data)) == data


def page(data: bytes) -> None:
    slots = int.from_bytes(data[:2], "little") % PAGE_CHUNKS + 1
    runs = decode_page("x", data[2:], slots)
    builder = PageBuilder(slots)
    last = -1
    for each in runs:
        assert last < each.first <= each.first + len(each.ids) <= slots
        last = each.first + len(each.ids)
        builder.set(each.first, each.ids)
    again = builder.encode()
    assert (decode_page("x", again, slots) if again else []) == runs


def pages() -> Iterable[bytes]:
    builder = PageBuilder(100)
    builder.set(10, [bytes([number]) * 32 for number in range(20)])
    builder.set(50, [bytes(32)] * 7)
    return [(99).to_bytes(2, "little") + builder.encode()]


def chunk(data: bytes) -> None:
    plain = int.from_bytes(data[:4], "little") % (1 << 22) + 1
    assert len(Codec(_KEY).decode(data[4:], ZSTD, plain)) == plain


def contents(data: bytes) -> None:
    """A table of contents as it stands in a pack, sealed here."""
    count = int.from_bytes(data[:4], "little") % (1 << 16)
    size, table, prologue = int.from_bytes(data[4:8], "little"), data[8:], b"prologue"
    context = prologue + b"T" + count.to_bytes(4, "little") + (len(table) + 16).to_bytes(4, "little")
    sealed = AESGCM(_KEY).encrypt(b"\0" * 8 + b"\xff" * 4, table, context)
    opener = PackOpener(_NAME, "0" * 32, 1212, prologue, (AESGCM(_KEY),))
    opener.open_contents(sealed + FOOTER.pack(count, len(sealed)), size)


def pack(data: bytes) -> None:
    with suppress(DamagedError):
        sealed_to(_NAME, data)
    opener = open_pack(_NAME, data, site().key)
    if len(data) >= FOOTER.size:
        opener.open_contents(data, len(data))


def envelope(data: bytes) -> None:
    """An entry, as it is and signed by the machine."""
    keys = site().keys
    machine = keys.stored.record
    kinds = {b"S": SNAPSHOT, b"L": LEDGER}
    kind = kinds.get(data[4:5], SNAPSHOT)
    signed = data[:-64] + sign(keys.stored.signing_seed, f"remetal 1 {kind}\0".encode(), data[:-64])
    for each in (data, signed):
        name = entry_name(machine.id, int.from_bytes(each[40:48], "little"))
        with suppress(DamagedError):
            found = open_envelope(name, each, machine, NOBODY)
            assert found.name == name
            assert sequence_of(name) == found.sequence > found.ledger


def squeezed(read: Callable[[bytes], Any]) -> Callable[[bytes], None]:
    """Return a reader that is given the bytes as they are, and as the content of a frame."""

    def run(data: bytes) -> None:
        for each in (data, zstandard.ZstdCompressor().compress(data)):
            with suppress(DamagedError):
                read(each)

    return run


def ledger(packed: bytes) -> None:
    found = Envelope(LEDGER, "x", "0" * 64, "0" * 32, 7, "", 0, "")
    data = bytes(124) + packed + bytes(64)
    opened = open_ledger(found, data)
    assert len(opened.packs) >= 0 <= len(opened.names)


def ledgers() -> Iterable[bytes]:
    from tests.faults.hostile.ledgers import GOOD

    return [msgspec.msgpack.encode(GOOD)]


def bodies() -> Iterable[bytes]:
    from tests.faults.hostile.case import plain_body

    (snapshot,) = _snapshots()
    left_out = [{"volume": image.volume, "path": "/tmp", "bytes": 512} for image in snapshot.images]
    return [msgspec.msgpack.encode(plain_body(snapshot) | each) for each in ({}, {"left_out": left_out})]


def _snapshots() -> Iterable[Any]:
    from remetal.repository.catalog import open_catalog

    return open_catalog(site().repository, site().key).snapshots()


def shape(data: bytes) -> None:
    """What passes is decoded by others, and no deeper than it was allowed to be."""
    check_shape(data)
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        assert depth(msgspec.msgpack.decode(data, strict=False)) <= MAX_DEPTH


def depth(value: object) -> int:
    match value:
        case list():
            return 1 + max(map(depth, value), default=0)
        case dict():
            return 1 + max(map(depth, value.values()), default=0)
    return 0


def lines(data: bytes) -> None:
    text, seal = split_lines("x", data, 64)
    assert text + b"\n" + seal.hex().encode() + b"\n" == data


def kit(data: bytes) -> None:
    repository, seed = parse_kit(data.decode("utf-8", "replace"))
    assert len(repository) == len(seed) == 32


def kits() -> Iterable[bytes]:
    from remetal.repository.repository import make_kit

    return [make_kit(site().repository, site().key).text().encode()]


def layout(data: bytes) -> None:
    found = decode_layout(data)
    assert decode_layout(encode_layout(found)) == found


def names(data: bytes) -> None:
    name = data.decode("utf-8", "surrogateescape")
    hash_in_name(name)
    sequence_of(name)
    if is_name(name):
        assert not name.startswith(("/", "."))
        assert all(word and not word.startswith(".") and word.isascii() for word in name.split("/"))
    check_name(name)


def _check_recipient(record: RecipientRecord) -> None:
    check_recipient("x", record, "0" * 32)


def machine_record(record: MachineRecord) -> None:
    check_machine("x", record, record.repository)


def machine_secrets(data: bytes) -> None:
    """What is sealed to a recipient as a machine's secrets, whatever it is."""
    store, key = MemoryStore(), site().key
    (machine,) = read_machines(site().store, key.repository_id)[0]
    sealed = key.kem.public.seal(machines._secrets_info(key.repository_id, machine.id, key.id), data)
    put_named(store, f"{SECRETS}{machine.id}.{key.id}.", sealed)
    open_secrets(store, machine, key)


def parity_head(data: bytes) -> None:
    size, head = int.from_bytes(data[:8], "little"), data[8:]
    (name,) = _named("parity/")
    group = decode_head(name, head, size)
    assert group.size == size >= group.head_size
    assert list(group.packs) == sorted(group.packs)


def parity_heads() -> Iterable[bytes]:
    (name,) = _named("parity/")
    data = site().store.objects[name]
    return [len(data).to_bytes(8, "little") + data[:400]]


def journal(data: bytes) -> None:
    """The records of a repair, a line each: whatever they say, nothing is touched but what a repair touches."""
    store = MemoryStore()
    for number, record in enumerate(data.split(b"\n")[:9]):
        put_named(store, f"{REPAIRS}{3:016x}/{number:08x}.", record)
    store.put(_NAME, [b"a pack"])
    kept = dict(store.objects)
    found = Repair(store, 3)
    for number, step in found.steps:
        assert step.name.startswith(TOUCHED)
        with suppress(DamagedError, UsageError):
            found.undo_step(number, step)
    found.forget()
    assert {name for name in kept if name.startswith(REPAIRS)}.isdisjoint(store.objects)


_LOCK = b'{"machine":"0","host":"h","host_id":"","boot_id":"","namespace":"","pid":1,"started":2,"time":3.5,"token":""}'
_RETIREMENT = b'{"id":"0","repository":"0","last":7,"successor":"","retired_by":"0","created":"2026-01-01T00:00:00Z"}'
_JOURNAL = b"\n".join(
    (
        b'{"time":"2026-01-01T00:00:00.000000Z","version":"1","heads":{"0":7}}',
        b'{"action":"added","name":"%s"}' % _NAME.encode(),
        b'{"action":"aside","name":"%s","parts":["aside/%016x/%064x"]}' % (_NAME.encode(), 3, 0),
    )
)
_REVOCATION = ("id", "repository", "revoked_by", "created")
_DAMAGED = (DamagedError,)

TARGETS = [
    Target("config", config, (), stored("config")),
    Target("index", index, _DAMAGED, lambda: [encode_index(list(_contents()))]),
    Target("map-page", page, _DAMAGED, pages),
    Target("chunk", chunk, (CipherError,), lambda: [(999).to_bytes(4, "little") + zstandard.compress(bytes(1000))]),
    Target("pack-contents", contents, _DAMAGED, lambda: [_table()]),
    Target("pack", pack, _DAMAGED, stored("packs/")),
    Target("entry", envelope, (), stored("history/")),
    Target("snapshot-body", squeezed(lambda data: decode_body("x", data)), (), bodies),
    Target("ledger-body", squeezed(ledger), (), ledgers),
    Target("shape", shape, (ShapeError,), bodies),
    Target("slot", strict(Slot, lambda slot: check_slot("x", slot, slot.repository)), _DAMAGED, stored("keys/slots/")),
    Target("machine", strict(MachineRecord, machine_record), _DAMAGED, lambda: _first_lines("keys/machines/")),
    Target("machine-keys", strict(MachineSecrets), _DAMAGED, lambda: [msgspec.json.encode(site().keys.stored)]),
    Target("recipient", strict(RecipientRecord, _check_recipient), _DAMAGED, lambda: _first_lines("keys/recipients/")),
    Target("revocation", strict(Revocation), _DAMAGED, lambda: [json.dumps(dict.fromkeys(_REVOCATION, "0")).encode()]),
    Target("lines", lines, _DAMAGED, stored("keys/machines/")),
    Target("retirement", strict(Retirement), _DAMAGED, lambda: [_RETIREMENT]),
    Target("secrets", machine_secrets, _DAMAGED, lambda: [site().keys.domain.id_key + site().keys.domain.catalog_key]),
    Target("parity-head", parity_head, _DAMAGED, parity_heads),
    Target("repair-journal", journal, _DAMAGED, lambda: [_JOURNAL]),
    Target("lock", strict(LockRecord), _DAMAGED, lambda: [_LOCK]),
    Target("kit", kit, (RefusedError,), kits),
    Target("layout", layout, (ImpossibleLayoutError,), lambda: [sample_layout()]),
    Target("names", names, (UsageError,), lambda: [_NAME.encode(), b"../x", b"history/" + b"0" * 16]),
]


def _named(prefix: str) -> list[str]:
    return [name for name in site().store.objects if name.startswith(prefix)]


def _first_lines(prefix: str) -> list[bytes]:
    return [each.split(b"\n")[0] for each in stored(prefix)()]


def _contents() -> Iterable[Any]:
    from remetal.repository.chunks import read_contents

    for _, found in read_contents(site().repository, site().keys.domain, None):
        yield from found


def _table() -> bytes:
    (found,) = _contents()
    count = len(found.entries)
    return b"".join([count.to_bytes(4, "little"), found.size.to_bytes(4, "little"), found.entries.tobytes()])
