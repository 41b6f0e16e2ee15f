"""Snapshots: signed, numbered, linked records of one moment of a machine. Specification: docs/format/snapshot.md.

    8 header, 16 repository, 16 machine, u64 sequence, 32 hash of the predecessor (zeros: none), u32 size of the body,
    the body (MessagePack, Zstandard, AES-SIV), 64 Ed25519 signature over all before it

The clear part lets anybody follow the chain; the rest needs the machine's catalog key.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import zstandard

from remetal.repository.cipher import (
    SIGNATURE_SIZE,
    SIV_SIZE,
    CipherError,
    digest,
    open_record,
    seal_record,
    sign,
    verify,
)
from remetal.repository.config import MAX_CHUNK, MIN_CHUNK
from remetal.repository.machines import Domain, MachineRecord
from remetal.repository.maps import ID_SIZE, map_digest, page_count
from remetal.repository.objects import SNAPSHOTS, Record, damaged, header, put_once
from remetal.storage import Store
from remetal.units import MIB

MAX_SNAPSHOT = 64 * MIB
MAX_BODY = 128 * MIB
MAX_IMAGES = 4096
MAX_SEQUENCE = 1 << 48
NO_SNAPSHOT = bytes(ID_SIZE)

_CLEAR = struct.Struct("<8s16s16sQ32sI")
_CONTEXT = b"remetal 1 snapshot\0"


class ImageRecord(Record, frozen=True, kw_only=True):
    """One volume's content in a snapshot.

    `size` is the image's length in bytes, `used` how many of them were captured, `stored` what this image added
    to the repository. `digest` identifies the content. `pages` name the map's pages in order; empty: all holes.
    """

    volume: str
    size: int
    chunk_size: int
    used: int
    stored: int
    digest: str
    pages: tuple[bytes, ...]


class Body(Record, frozen=True, kw_only=True):
    """The sealed part of a snapshot; `version` is that of the remetal that made it."""

    time: str
    hostname: str
    tags: tuple[str, ...]
    version: str
    layout: bytes
    images: tuple[ImageRecord, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A verified snapshot. `id` is the BLAKE3 of its object in hexadecimal, `time` UTC in ISO 8601."""

    id: str
    machine_id: str
    machine: str
    sequence: int
    previous: str
    time: str
    hostname: str
    tags: tuple[str, ...]
    version: str
    layout: bytes = field(repr=False)
    images: tuple[ImageRecord, ...]


@dataclass(frozen=True, slots=True)
class Envelope:
    """The clear part of a snapshot's object, and its id; `previous` is empty for a machine's first."""

    name: str
    id: str
    machine_id: str
    sequence: int
    previous: str


def snapshot_folder(machine_id: str) -> str:
    """Return the prefix of a machine's snapshots."""
    return f"{SNAPSHOTS}{machine_id}/"


def snapshot_name(machine_id: str, sequence: int, identity: str) -> str:
    """Return a snapshot's name: sixteen digits of sequence number, so that names sort by age, and its hash."""
    return f"{snapshot_folder(machine_id)}{sequence:016x}.{identity}"


def encode_snapshot(
    body: Body, repository_id: str, domain: Domain, signing_seed: bytes, sequence: int, previous: str
) -> bytes:
    """Return the bytes of a snapshot's object."""
    packed = zstandard.ZstdCompressor(level=3).compress(msgspec.msgpack.encode(body))
    clear = _CLEAR.pack(
        header("snapshot"),
        bytes.fromhex(repository_id),
        bytes.fromhex(domain.machine_id),
        sequence,
        bytes.fromhex(previous) or NO_SNAPSHOT,
        len(packed) + SIV_SIZE,
    )
    signed = clear + seal_record(domain.record_key("snapshot"), clear, packed)
    return signed + sign(signing_seed, _CONTEXT, signed)


def put_snapshot(store: Store, machine_id: str, sequence: int, data: bytes) -> str:
    """Store a snapshot's bytes and return its id."""
    identity = digest(data).hex()
    put_once(store, snapshot_name(machine_id, sequence, identity), [data])
    return identity


def open_envelope(name: str, data: bytes, machine: MachineRecord) -> Envelope:
    """Check everything about a snapshot that needs no key, its signature included. Raises DamagedError."""
    if len(data) < _CLEAR.size + SIV_SIZE + SIGNATURE_SIZE:
        raise damaged(name, "it is too short for a snapshot")
    magic, repository, owner, sequence, previous, size = _CLEAR.unpack_from(data)
    if magic != header("snapshot") or repository.hex() != machine.repository or owner.hex() != machine.id:
        raise damaged(name, "it is no snapshot of this machine and repository")
    if _CLEAR.size + size + SIGNATURE_SIZE != len(data):
        raise damaged(name, "it is longer or shorter than it says")
    try:
        verify(machine.verify_key, data[-SIGNATURE_SIZE:], _CONTEXT, data[:-SIGNATURE_SIZE])
    except CipherError as error:
        raise damaged(name, f"it is not signed by machine '{machine.name}'") from error
    identity = digest(data).hex()
    first = previous == NO_SNAPSHOT
    if name != snapshot_name(machine.id, sequence, identity) or not 1 <= sequence < MAX_SEQUENCE:
        raise damaged(name, "its name does not fit its content")
    return Envelope(name, identity, machine.id, sequence, "" if first else previous.hex())


def open_snapshot(envelope: Envelope, data: bytes, machine: MachineRecord, domain: Domain) -> Snapshot:
    """Open the sealed part of a snapshot whose envelope was checked. Raises DamagedError."""
    sealed = data[_CLEAR.size : -SIGNATURE_SIZE]
    try:
        packed = open_record(domain.record_key("snapshot"), data[: _CLEAR.size], sealed)
    except CipherError as error:
        raise damaged(envelope.name, "its seal is not that of the machine") from error
    body = decode_body(envelope.name, packed)
    return Snapshot(
        id=envelope.id,
        machine_id=machine.id,
        machine=machine.name,
        sequence=envelope.sequence,
        previous=envelope.previous,
        time=body.time,
        hostname=body.hostname,
        tags=body.tags,
        version=body.version,
        layout=body.layout,
        images=body.images,
    )


def decode_body(name: str, packed: bytes) -> Body:
    """Decompress and parse a snapshot's body strictly. Raises DamagedError."""
    try:
        size = zstandard.get_frame_parameters(packed).content_size
        if not 0 < size <= MAX_BODY:
            raise damaged(name, "its body is larger than anything remetal writes")
        plain = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
        body = msgspec.msgpack.decode(plain, type=Body)
    except (zstandard.ZstdError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise damaged(name, str(error)) from error
    if len(body.images) > MAX_IMAGES or len({image.volume for image in body.images}) != len(body.images):
        raise damaged(name, "its images are impossible")
    for image in body.images:
        check_image(name, image)
    return body


def check_image(name: str, image: ImageRecord) -> None:
    """Raise DamagedError for an image whose numbers cannot be."""
    power = image.chunk_size > 0 and image.chunk_size & (image.chunk_size - 1) == 0
    if not power or not MIN_CHUNK <= image.chunk_size <= MAX_CHUNK or not 0 <= image.size < 1 << 63:
        raise damaged(name, f"the image '{image.volume}' has impossible sizes")
    if not 0 <= image.used <= image.size or image.stored < 0:
        raise damaged(name, f"the image '{image.volume}' has impossible sizes")
    lengths = {len(page) for page in image.pages} <= {0, ID_SIZE}
    if len(image.pages) != page_count(image.size, image.chunk_size) or not lengths:
        raise damaged(name, f"the map of image '{image.volume}' does not fit its size")
    if image.digest != map_digest(image.size, image.chunk_size, list(image.pages)):
        raise damaged(name, f"the map of image '{image.volume}' is not the one it says")


def check_chain(envelopes: Sequence[Envelope], machine: str) -> list[str]:
    """Return what is wrong with the links of one machine's snapshots, given in the order of their numbers."""
    problems: list[str] = []
    before: Envelope | None = None
    for each in envelopes:
        if before is not None and before.sequence == each.sequence:
            problems.append(f"machine '{machine}' has two snapshots with the number {each.sequence}")
        elif before is not None and before.sequence + 1 != each.sequence:
            gap = f"{before.sequence + 1} to {each.sequence - 1}"
            problems.append(f"snapshots of machine '{machine}' have vanished: numbers {gap}")
        elif before is not None and each.previous != before.id:
            problems.append(
                f"snapshot {each.sequence} of machine '{machine}' does not follow snapshot {before.sequence}"
            )
        elif before is None and (each.sequence != 1 or each.previous):
            problems.append(f"snapshots of machine '{machine}' have vanished: all before number {each.sequence}")
        before = each
    return problems
