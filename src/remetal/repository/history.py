"""A machine's history: numbered, linked, signed entries, each created once. Specification: docs/format/history.md.

    8 header, 16 repository, 16 machine, u64 sequence, 32 hash of the predecessor (zeros: none),
    u64 sequence of the newest ledger before it (0: none), 16 signer (zeros: the machine), u32 size of the body,
    the body, 64 Ed25519 signature over all before it

An entry is a snapshot, signed by the machine, or a ledger, signed by a recipient. Its name is its number, so the store
grants each number once: whoever has decided something on the strength of an older history finds the number taken.
The clear part lets anybody follow the chain.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import zstandard

from remetal.errors import RefusedError
from remetal.repository.cipher import KEY_SIZE, SIGNATURE_SIZE, CipherError, digest, sign, verify
from remetal.repository.machines import MachineRecord
from remetal.repository.objects import HISTORY, Record, RecordT, damaged, header
from remetal.repository.retired import Vouched
from remetal.repository.shape import ShapeError, check_shape
from remetal.storage import AlreadyExistsError, Store
from remetal.units import format_bytes

SNAPSHOT, LEDGER = "snapshot", "ledger"
MAX_SEQUENCE = 1 << 48
MAX_ENTRIES = 1 << 20

_CLEAR = struct.Struct("<8s16s16sQ32sQ16sI")
CLEAR_SIZE = _CLEAR.size
_NOBODY = bytes(16)
_NOTHING = bytes(KEY_SIZE)


class Gone(Record, frozen=True, kw_only=True):
    """Consecutive entries that were forgotten: first and last number, what the first followed, and the last's id."""

    first: int
    last: int
    previous: str
    id: str


@dataclass(frozen=True, slots=True)
class Envelope:
    """The clear part of an entry that was checked, and its id; `previous` is empty for a machine's first.

    `ledger` is the number of the newest ledger before it, 0 for none; `signer` the recipient that signed it, empty
    for the machine itself.
    """

    kind: str
    name: str
    id: str
    machine_id: str
    sequence: int
    previous: str
    ledger: int
    signer: str


def history_folder(machine_id: str) -> str:
    """Return the prefix of a machine's history."""
    return f"{HISTORY}{machine_id}/"


def entry_name(machine_id: str, sequence: int) -> str:
    """Return an entry's name: sixteen digits of its number, so that names sort by age."""
    return f"{history_folder(machine_id)}{sequence:016x}"


def sequence_of(name: str) -> int:
    """Return the number in an entry's name, 0 for a name that no entry has."""
    number = name.rpartition("/")[2]
    good = len(number) == 16 and all(digit in "0123456789abcdef" for digit in number)
    sequence = int(number, 16) if good else 0
    return sequence if sequence < MAX_SEQUENCE else 0


def encode_clear(
    kind: str,
    repository_id: str,
    machine_id: str,
    sequence: int,
    *,
    previous: str,
    ledger: int,
    signer: str = "",
    size: int,
) -> bytes:
    """Return the clear part of an entry whose body will have `size` bytes."""
    return _CLEAR.pack(
        header(kind),
        bytes.fromhex(repository_id),
        bytes.fromhex(machine_id),
        sequence,
        bytes.fromhex(previous) or _NOTHING,
        ledger,
        bytes.fromhex(signer) or _NOBODY,
        size,
    )


def sign_entry(kind: str, signing_seed: bytes, clear: bytes, body: bytes) -> bytes:
    """Return the bytes of an entry."""
    return clear + body + sign(signing_seed, _context(kind), clear + body)


def split_body(data: bytes) -> tuple[bytes, bytes]:
    """Return the clear part and the body of an entry whose envelope was checked."""
    return data[:CLEAR_SIZE], data[CLEAR_SIZE:-SIGNATURE_SIZE]


def pack_body(what: str, record: Record, limit: int) -> bytes:
    """Return a record as MessagePack in a Zstandard frame that tells its size.

    Raises RefusedError if it has more bytes than a reader would take.
    """
    plain = msgspec.msgpack.encode(record)
    if len(plain) > limit:
        raise RefusedError(
            f"{what} has {len(plain)} bytes, and the history of a machine takes {format_bytes(limit)} at once",
            hint="Nothing was written there. This is far beyond any real machine: please report it.",
        )
    return zstandard.ZstdCompressor(level=3).compress(plain)


def unpack_body(name: str, packed: bytes, kind: type[RecordT], limit: int) -> RecordT:
    """Decompress to at most `limit` bytes and parse strictly what `pack_body` made. Raises DamagedError."""
    try:
        size = zstandard.get_frame_parameters(packed).content_size
        if not 0 < size <= limit:
            raise damaged(name, "its body is larger than anything remetal writes")
        plain = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
        check_shape(plain)
        return msgspec.msgpack.decode(plain, type=kind)
    except (zstandard.ZstdError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ShapeError) as error:
        raise damaged(name, str(error)) from error


def put_entry(store: Store, name: str, data: bytes) -> None:
    """Create an entry. Raises AlreadyExistsError if its number is taken by anything but these very bytes."""
    try:
        store.put(name, [data])
    except AlreadyExistsError:
        if store.get(name, size=len(data) + 1) != data:
            raise


def open_envelope(name: str, data: bytes, machine: MachineRecord, vouched: Vouched) -> Envelope:
    """Check everything about an entry that needs no key, its signature included. Raises DamagedError."""
    if len(data) < CLEAR_SIZE + SIGNATURE_SIZE:
        raise damaged(name, "it is too short for an entry of a history")
    magic, repository, owner, sequence, previous, ledger, signer, size = _CLEAR.unpack_from(data)
    kind = next((each for each in (SNAPSHOT, LEDGER) if header(each) == magic), "")
    if not kind or repository.hex() != machine.repository or owner.hex() != machine.id:
        raise damaged(name, "it is no entry of this machine and repository")
    if CLEAR_SIZE + size + SIGNATURE_SIZE != len(data):
        raise damaged(name, "it is longer or shorter than it says")
    if name != entry_name(machine.id, sequence) or not 0 <= ledger < sequence < MAX_SEQUENCE:
        raise damaged(name, "its name does not fit its content")
    _check_signature(name, data, kind, machine, "" if signer == _NOBODY else signer.hex(), vouched)
    if kind == SNAPSHOT and machine.id in vouched.retired and sequence > vouched.retired[machine.id].last:
        raise damaged(name, f"it was made with the keys of machine '{machine.name}' after they were retired")
    return Envelope(
        kind=kind,
        name=name,
        id=digest(data).hex(),
        machine_id=machine.id,
        sequence=sequence,
        previous="" if previous == _NOTHING else previous.hex(),
        ledger=ledger,
        signer="" if signer == _NOBODY else signer.hex(),
    )


def names_signer(data: bytes, vouched: Vouched) -> bool:
    """Whether it is known who is said to have signed an entry."""
    signer = _CLEAR.unpack_from(data)[6] if len(data) >= CLEAR_SIZE else _NOBODY
    return signer == _NOBODY or signer.hex() in vouched.recipients


def _check_signature(name: str, data: bytes, kind: str, machine: MachineRecord, signer: str, vouched: Vouched) -> None:
    if kind == SNAPSHOT:
        who, key = f"machine '{machine.name}'", b"" if signer else machine.verify_key
    else:
        who, recipient = "a recipient of this repository", vouched.recipients.get(signer)
        key = recipient.verify_key if recipient is not None else b""
    try:
        if not key:
            raise CipherError
        verify(key, data[-SIGNATURE_SIZE:], _context(kind), data[:-SIGNATURE_SIZE])
    except CipherError as error:
        raise damaged(name, f"it is not signed by {who}") from error


def is_gone(sequence: int, gone: Iterable[Gone]) -> bool:
    """Whether the entry with this number was forgotten."""
    return any(each.first <= sequence <= each.last for each in gone)


def check_chain(envelopes: Sequence[Envelope], gone: Sequence[Gone], machine: str) -> list[str]:
    """Return what is wrong with the links of one machine's history, given in the order of its numbers.

    `gone` is what its newest ledger says was forgotten; such entries may still be there.
    """
    links = [Gone(first=e.sequence, last=e.sequence, previous=e.previous, id=e.id) for e in envelopes]
    links = sorted([*(e for e in links if not is_gone(e.first, gone)), *gone], key=lambda each: each.first)
    problems: list[str] = []
    last, identity = 0, ""
    for each in links:
        if each.first != last + 1:
            where = "" if each.first == last + 2 else f" to {each.first - 1}"
            problems.append(f"snapshots of machine '{machine}' have vanished: numbers {last + 1}{where}")
        elif each.previous != identity:
            problems.append(f"entry {each.first} of machine '{machine}' does not follow entry {last}")
        last, identity = each.last, each.id
    return problems


def merge_gone(gone: Iterable[Gone]) -> tuple[Gone, ...]:
    """Return the same ranges with neighbours made one. They must not overlap."""
    merged: list[Gone] = []
    for each in sorted(gone, key=lambda each: each.first):
        if merged and merged[-1].last + 1 == each.first:
            before = merged.pop()
            each = Gone(first=before.first, last=each.last, previous=before.previous, id=each.id)
        merged.append(each)
    return tuple(merged)


def _context(kind: str) -> bytes:
    return f"remetal 1 {kind}\0".encode()
