"""The object `config`: what makes a folder a repository. Specification: docs/format/config.md."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from remetal.errors import DamagedError, RefusedError, UsageError
from remetal.repository.cipher import digest
from remetal.repository.objects import (
    CONFIG,
    HISTORY,
    MACHINES,
    MAX_KEY_OBJECT,
    PACKS,
    Record,
    check_moment,
    damaged,
    decode_json,
    encode_json,
    get_object,
)
from remetal.storage import NotFoundError, Store
from remetal.units import KIB, MIB, format_bytes

FORMAT = 1
MIN_CHUNK = 64 * KIB
MAX_CHUNK = 4 * MIB
DEFAULT_CHUNK_SIZE = 256 * KIB

_ID = re.compile(r"[0-9a-f]{32}")


class Config(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Format number, the repository's id (the id of its first recipient), chunk size in bytes, and birthday.

    `parity` says whether packs are to be protected by parity; without it the field is not written.
    """

    format: int
    id: str
    chunk_size: int
    created: str
    parity: bool = False


def check_chunk_size(chunk_size: int) -> None:
    """Raise UsageError unless the size is a power of two that format 1 knows."""
    if chunk_size & (chunk_size - 1) or not MIN_CHUNK <= chunk_size <= MAX_CHUNK:
        raise UsageError(
            f"a chunk cannot have {chunk_size} bytes",
            hint=f"Choose a power of two from {format_bytes(MIN_CHUNK)} to {format_bytes(MAX_CHUNK)}.",
        )


def encode_config(config: Config) -> bytes:
    """Return the object's bytes: a line of JSON, and a line with the BLAKE3 of that JSON."""
    text = encode_json(config)
    return b"%b\n%b\n" % (text, digest(text).hex().encode())


def decode_config(data: bytes) -> Config:
    """Parse the object `config`.

    The first line of every format to come is JSON with the field `format`, so that a newer one is told as that
    (RefusedError), whatever else has changed in it. Raises DamagedError for all that format 1 does not allow.
    """
    lines = data.split(b"\n")
    _check_format(lines[0])
    if len(lines) != 3 or lines[2] or lines[1] != digest(lines[0]).hex().encode():
        raise damaged(CONFIG, "its checksum is wrong")
    config = decode_json(CONFIG, lines[0], Config)
    try:
        check_chunk_size(config.chunk_size)
    except UsageError as error:
        raise damaged(CONFIG, error.message) from error
    check_moment(CONFIG, config.created)
    if config.format != FORMAT or not _ID.fullmatch(config.id):
        raise damaged(CONFIG, "its values are impossible")
    return config


def _check_format(text: bytes) -> None:
    found: Any = decode_json(CONFIG, text, dict[str, msgspec.Raw]).get("format")
    number = decode_json(CONFIG, bytes(found), int) if found is not None else 0
    if number > FORMAT:
        raise RefusedError(
            f"the repository has format {number}, this remetal knows formats up to {FORMAT}",
            hint="Update remetal on this machine; the repository is fine.",
        )


def read_config(store: Store) -> Config:
    """Read and check a store's config.

    Raises RefusedError if there is no repository, or a newer one, DamagedError if only its config is missing.
    """
    try:
        store.get(CONFIG, size=1)
    except NotFoundError as error:
        if any(next(store.entries(prefix), None) is not None for prefix in (PACKS, HISTORY, MACHINES)):
            raise DamagedError(
                f"{store.location} holds a repository whose config is missing",
                hint="Bring the object 'config' back from a copy of the repository.",
            ) from error
        raise RefusedError(
            f"there is no repository at {store.location}",
            hint="Is the disk mounted, and the location right? `remetal init` makes a new repository there.",
        ) from error
    return decode_config(get_object(store, CONFIG, MAX_KEY_OBJECT))
