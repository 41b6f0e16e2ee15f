"""Objects that are named after their content: `FOLDER/…HASH`, where HASH is the BLAKE3 of the object's bytes.

Nobody needs a key to see whether such an object is still what was written, and no reader here uses one without
looking first.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TypeVar

import msgspec

from remetal.errors import DamagedError, RemetalError
from remetal.repository.cipher import digest
from remetal.storage import AlreadyExistsError, NotFoundError, Pieces, Store, UnreadableError

CONFIG = "config"
RECIPIENTS = "keys/recipients/"
REVOKED = "keys/revoked/"
RETIRED = "keys/retired/"
SLOTS = "keys/slots/"
MACHINES = "keys/machines/"
SECRETS = "keys/secrets/"
KEYS = (RECIPIENTS, REVOKED, SLOTS, MACHINES, RETIRED, SECRETS)
PACKS = "packs/"
PARITY = "parity/"
INDEX = "index/"
MAPS = "maps/"
HISTORY = "history/"
LOCKS = "locks/"
REPAIRS = "repairs/"
ASIDE = "aside/"

MAX_KEY_OBJECT = 64 << 10
"""Size cap in bytes of everything below `keys/`, of the config, and of a lock."""

MAX_OBJECT = 128 << 20
"""Bytes that no object of any other kind comes near."""

HELP = "Run `remetal repair`; what that cannot mend has to be brought back from a copy of the repository."

_MOMENT = re.compile(r"[0-9T:Z.+ -]{0,40}")
_ENDING = re.compile(r"(?:.*[./])?([0-9a-f]{64})")
_HEADER = {
    "pack": b"RMTLP\x01\0\0",
    "parity": b"RMTLX\x01\0\0",
    "index": b"RMTLI\x01\0\0",
    "map": b"RMTLM\x01\0\0",
    "snapshot": b"RMTLS\x01\0\0",
    "ledger": b"RMTLL\x01\0\0",
}
HEADER_SIZE = 8

RecordT = TypeVar("RecordT")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all persisted records: immutable, by keyword, strict about unknown fields."""


def header(kind: str) -> bytes:
    """Return the first 8 bytes of a binary object: `RMTL`, a letter for its kind, format 1, two zeros."""
    return _HEADER[kind]


def hash_in_name(name: str) -> bytes | None:
    """Return the BLAKE3 that an object's name promises, or None for an object that is not named so."""
    match = _ENDING.fullmatch(name)
    return bytes.fromhex(match[1]) if match else None


def pack_folder(machine_id: str) -> str:
    """Return the prefix of a machine's packs."""
    return f"{PACKS}{machine_id}/"


def pack_name(machine_id: str, identity: bytes) -> str:
    """Return the name of a machine's pack with this hash: packs are spread over 256 folders."""
    return f"{pack_folder(machine_id)}{identity[:1].hex()}/{identity.hex()}"


def put_named(store: Store, prefix: str, *pieces: bytes) -> str:
    """Store pieces under `prefix` plus their hash and return the name; an equal object that is there will do."""
    name = f"{prefix}{digest(*pieces).hex()}"
    put_once(store, name, pieces)
    return name


def put_hashed(store: Store, name: str, pieces: Pieces) -> None:
    """As `put_once`, after comparing the bytes that are handed over with the hash in the name.

    Raises RemetalError if they are not what they were.
    """
    if digest(*pieces) != hash_in_name(name):
        raise miscalculated(f"the object {name}")
    put_once(store, name, pieces)


def put_once(store: Store, name: str, pieces: Pieces) -> None:
    """Create an object whose name tells its content; somebody else having done so is as good."""
    with suppress(AlreadyExistsError):
        store.put(name, pieces)


def largest(name: str) -> int:
    """Return how many bytes an object of this name may have at most, whatever is in it."""
    return MAX_KEY_OBJECT if name.startswith(("keys/", CONFIG, LOCKS)) else MAX_OBJECT


def get_object(store: Store, name: str, limit: int) -> bytes:
    """Return an object of at most `limit` bytes. Raises DamagedError if it is missing or larger."""
    try:
        data = store.get(name, size=limit + 1)
    except NotFoundError as error:
        raise DamagedError(f"{store.location} lacks the object {name}", hint=HELP) from error
    if len(data) > limit:
        raise DamagedError(f"the object {name} is larger than anything remetal writes there", hint=HELP)
    return data


def get_named(store: Store, name: str, limit: int) -> bytes:
    """Return an object after comparing it with the hash in its name. Raises DamagedError."""
    data = get_object(store, name, limit)
    if digest(data) != hash_in_name(name):
        raise DamagedError(f"the object {name} is not what was written: its hash differs", hint=HELP)
    return data


def is_there(store: Store, name: str) -> bool:
    """Whether a store has an object, be it readable or not."""
    try:
        store.get(name, size=1)
    except NotFoundError:
        return False
    except UnreadableError:
        pass
    return True


def damaged(name: str, what: str) -> DamagedError:
    """Return the error for an object whose bytes are intact in themselves but cannot be right."""
    return DamagedError(f"the object {name} cannot be right: {what}", hint=HELP)


def check_moment(name: str, text: str) -> None:
    """Raise DamagedError for a time that is none: it is shown to people, and may come from anybody."""
    if not _MOMENT.fullmatch(text):
        raise damaged(name, "a time in it is none")


def miscalculated(what: str) -> RemetalError:
    """Return the error for something that is not what it was right after it was made: nothing of it is stored."""
    return RemetalError(
        f"{what} could not be read back right after it was encoded; nothing of it was stored",
        hint="This computer miscalculates: test its memory (memtest86+) before you trust it with a backup.",
    )


_ENCODER = msgspec.json.Encoder(order="deterministic")


def encode_json(record: Record) -> bytes:
    """Return a record as JSON, the same bytes for the same record."""
    return _ENCODER.encode(record)


def decode_json(name: str, data: bytes, kind: type[RecordT]) -> RecordT:
    """Parse a record strictly. Raises DamagedError that names the object."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise damaged(name, str(error)) from error


def encode_lines(record: Record, seal: bytes) -> bytes:
    """Return a small public record: one line of JSON, one line with a hash or signature in hexadecimal."""
    return b"%b\n%b\n" % (encode_json(record), seal.hex().encode())


def split_lines(name: str, data: bytes, size: int) -> tuple[bytes, bytes]:
    """Return the JSON bytes and the `size` bytes of the second line. Raises DamagedError."""
    lines = data.split(b"\n")
    if len(lines) != 3 or lines[2] or not re.fullmatch(rb"[0-9a-f]{%d}" % (2 * size), lines[1]):
        raise damaged(name, "it does not have the two lines it should have")
    return lines[0], bytes.fromhex(lines[1].decode())
