"""Snapshots: signed, numbered, linked records of one moment of a machine. Specification: docs/format/snapshot.md.

Each is an entry of the machine's history (`remetal.repository.history`). Its body, MessagePack in Zstandard in AES-SIV,
needs the machine's catalog key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from remetal.repository.cipher import SIV_SIZE, CipherError, open_record, seal_record
from remetal.repository.config import MAX_CHUNK, MIN_CHUNK
from remetal.repository.history import SNAPSHOT, Envelope, encode_clear, pack_body, sign_entry, split_body, unpack_body
from remetal.repository.machines import Domain, MachineRecord
from remetal.repository.maps import ID_SIZE, map_digest, page_count
from remetal.repository.objects import Record, check_moment, damaged
from remetal.units import MIB, format_bytes

MAX_SNAPSHOT = 32 * MIB
MAX_BODY = 32 * MIB
MAX_IMAGES = 4096
MAX_LEFT_OUT = 4096
MAX_PATH = 4096
"""Letters of a path that was left out; the kernel takes so many bytes."""
_TOLD = 20
"""So many paths of a volume are told to people."""


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


class LeftOut(Record, frozen=True, kw_only=True):
    """A file, or the files in a folder, of whose content `bytes` are not in the image of the volume.

    `path` is as the machine knew it; bytes of it that are not UTF-8 are told as `\\xff`.
    """

    volume: str
    path: str
    bytes: int


class Body(Record, frozen=True, kw_only=True, omit_defaults=True):
    """The sealed part of a snapshot; `version` is that of the remetal that made it."""

    time: str
    hostname: str
    tags: tuple[str, ...]
    version: str
    layout: bytes
    images: tuple[ImageRecord, ...]
    left_out: tuple[LeftOut, ...] = ()


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
    left_out: tuple[LeftOut, ...] = ()


def encode_snapshot(
    body: Body,
    repository_id: str,
    domain: Domain,
    signing_seed: bytes,
    sequence: int,
    *,
    previous: str,
    ledger: int,
) -> bytes:
    """Return the bytes of a snapshot's object."""
    packed = pack_body("the description of the machine and its images", body, MAX_BODY)
    clear = encode_clear(
        SNAPSHOT,
        repository_id,
        domain.machine_id,
        sequence,
        previous=previous,
        ledger=ledger,
        size=len(packed) + SIV_SIZE,
    )
    return sign_entry(SNAPSHOT, signing_seed, clear, seal_record(domain.record_key(SNAPSHOT), clear, packed))


def open_snapshot(envelope: Envelope, data: bytes, machine: MachineRecord, domain: Domain) -> Snapshot:
    """Open the sealed part of a snapshot whose envelope was checked. Raises DamagedError."""
    clear, sealed = split_body(data)
    try:
        packed = open_record(domain.record_key(SNAPSHOT), clear, sealed)
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
        left_out=body.left_out,
    )


def decode_body(name: str, packed: bytes) -> Body:
    """Decompress and parse a snapshot's body strictly. Raises DamagedError."""
    body = unpack_body(name, packed, Body, MAX_BODY)
    if len(body.images) > MAX_IMAGES or len({image.volume for image in body.images}) != len(body.images):
        raise damaged(name, "its images are impossible")
    check_moment(name, body.time)
    for image in body.images:
        check_image(name, image)
    _check_left_out(name, body)
    return body


def _check_left_out(name: str, body: Body) -> None:
    """Raise DamagedError unless what was left out was left out of the images, and can be told."""
    volumes = {image.volume for image in body.images}
    good = all(
        each.volume in volumes and 0 < len(each.path) <= MAX_PATH and 0 <= each.bytes < 1 << 63
        for each in body.left_out
    )
    if len(body.left_out) > MAX_LEFT_OUT or not good:
        raise damaged(name, "what it says was left out is impossible")


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
    if image.digest != map_digest(image.size, image.chunk_size, image.pages):
        raise damaged(name, f"the map of image '{image.volume}' is not the one it says")


def describe_left_out(left_out: Iterable[LeftOut]) -> Iterator[str]:
    """Yield what was left out of each volume, as people read it."""
    found: dict[str, list[LeftOut]] = {}
    for each in left_out:
        found.setdefault(each.volume, []).append(each)
    for volume, paths in found.items():
        told = [f"{each.path} ({format_bytes(each.bytes)})".replace("\n", r"\x0a") for each in paths[:_TOLD]]
        rest = [f"and {len(paths) - _TOLD} more"] if len(paths) > _TOLD else []
        yield f"left out of {volume}: {', '.join([*told, *rest])}"
