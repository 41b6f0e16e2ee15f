"""Packs that a hijacked machine has sealed to the recipients: what is in them is all the attacker's."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from remetal.repository.cipher import chunk_id, digest
from remetal.repository.indexes import encode_index, index_folder
from remetal.repository.maps import map_digest
from remetal.repository.objects import header, pack_name
from remetal.repository.packs import ENTRY, FOOTER, PROLOGUE, ZSTD, Contents
from tests.faults.hostile.case import READ, VOLUME, Attacker, Case, Lazy, made
from tests.faults.hostile.history import lying, window, zeros
from tests.faults.hostile.sample import MAPS
from tests.repositories import CHUNK

_KEY = bytes(range(32))
_WORDS = (READ, ("plan", "latest", *MAPS))
_ENDS = frozenset({0, 3, 5})

Stored = tuple[bytes, int, int]
"""A chunk as it stands in the pack before it is encrypted, its flag, and how long it says it is."""


def build(
    attacker: Attacker, chunks: Sequence[Stored], names: Sequence[bytes], *, recipients: int = 1, magic: bytes = b""
) -> tuple[bytes, Contents]:
    """Return a pack's bytes, sealed to the recipient, and what an index object says of it."""
    machine, repository = bytes.fromhex(attacker.keys.machine_id), bytes.fromhex(attacker.keys.repository_id)
    prologue = PROLOGUE.pack(magic or header("pack"), repository, machine, bytes(16), recipients)
    info = b"remetal 1 pack key\0" + prologue + bytes.fromhex(attacker.key.id)
    wrapped = bytes.fromhex(attacker.key.id) + attacker.key.kem.public.seal(info, _KEY)
    data, rows, cipher = [prologue, wrapped], [], AESGCM(_KEY)
    for number, ((encoded, flag, plain), name) in enumerate(zip(chunks, names, strict=True)):
        word = (len(encoded) + 16) | flag
        context = prologue + struct.pack("<cI32sII", b"C", number, name, plain, word)
        data.append(cipher.encrypt(number.to_bytes(12, "big"), encoded, context))
        rows.append(name + struct.pack("<II", word, plain))
    table = b"".join(rows)
    context = prologue + struct.pack("<cII", b"T", len(rows), len(table) + 16)
    data += [cipher.encrypt(b"\0" * 8 + b"\xff" * 4, table, context), FOOTER.pack(len(rows), len(table) + 16)]
    whole = b"".join(data)
    return whole, Contents(digest(whole), len(whole), PROLOGUE.size + len(wrapped), np.frombuffer(table, ENTRY))


def chunked(
    name: str,
    *chunks: Stored,
    content: bytes | None = None,
    spoil: Callable[[bytes], bytes] = bytes,
    recipients: int = 1,
) -> Case:
    """A snapshot whose first volume begins with these chunks; `content` is what their ids promise.

    With such content they are as good as any but for their length, which a restore looks at before it writes.
    """

    def make(attacker: Attacker) -> None:
        plain = bytes(CHUNK) if content is None else content
        good = [chunk_id(attacker.keys.domain.id_key, bytes([number]) + plain) for number in range(len(chunks))]
        if content is not None:
            good = [chunk_id(attacker.keys.domain.id_key, content)] * len(chunks)
        whole, contents = build(attacker, chunks, good, recipients=recipients)
        whole = spoil(whole)
        contents = Contents(digest(whole), len(whole), contents.start, contents.entries)
        attacker.put(pack_name(attacker.keys.machine_id, contents.identity), whole)
        attacker.put_record("index", index_folder(attacker.keys.machine_id), encode_index([contents]))
        images = attacker.body()["images"]
        (place,) = [each for each in images if each["volume"] == VOLUME]
        slots = -(-place["size"] // CHUNK)
        rest = slots - len(chunks)
        body = struct.pack("<II", slots, 2) + struct.pack("<HBBHBB", len(chunks), 2, 0, rest, 0, 0) + b"".join(good)
        place["pages"] = [attacker.put_page(body)]
        place["digest"] = map_digest(place["size"], place["chunk_size"], place["pages"])
        attacker.commit(images=images)

    return Case("packs", name, make, _WORDS, _ENDS, refused=content is None)


def foreign(name: str, data: Lazy) -> Case:
    """An object that is named as a pack is, and is none: no index tells of it, so nobody needs it."""

    def make(attacker: Attacker) -> None:
        whole = made(data)
        attacker.put(pack_name(attacker.keys.machine_id, digest(whole)), whole)

    return Case("packs", name, make, (*_WORDS, ("repair",)), _ENDS, refused=False)


def zstd(data: bytes, plain: int = CHUNK) -> Stored:
    return data, ZSTD, plain


_GB = zeros(1 << 30)
_NESTED = zstandard.ZstdCompressor().compress(_GB)
_LONG = b"longer than its place " * 20000

_MANY = struct.pack("<II", 16384, 16384 * 40 + 16)

CASES = [
    chunked("a chunk of a GiB of zeros", zstd(_GB)),
    chunked("a chunk of 4 MiB that says 64 KiB", zstd(zeros(4 << 20))),
    chunked("a chunk of zeros in zeros", zstd(_NESTED[: 64 << 10])),
    chunked("a frame that says 2^63", zstd(lying(1 << 63, 1000))),
    chunked("a frame that says 64 KiB and has 1000 bytes", zstd(lying(CHUNK, 1000))),
    chunked("a frame that says 64 KiB and has 128", zstd(lying(CHUNK, 2 * CHUNK))),
    chunked("a frame with a window of 2 GiB", zstd(window(21))),
    chunked("a frame with a window of 3 TiB", zstd(window(31))),
    chunked("a frame of nothing", zstd(b"\x28\xb5\x2f\xfd")),
    chunked("no frame", zstd(b"x" * 100)),
    chunked("a frame that needs a dictionary", zstd(b"\x28\xb5\x2f\xfd\x23\xff\xff\xff\xff\x04\x01\0\0")),
    chunked("a plain chunk of other bytes", (b"x" * CHUNK, 0, CHUNK)),
    chunked("a plain chunk that is shorter than it says", (b"x" * 100, 0, CHUNK)),
    chunked("a plain chunk that is longer than it says", (b"x" * CHUNK, 0, 100)),
    chunked("a chunk that is longer than its place", (_LONG, 0, len(_LONG)), content=_LONG),
    chunked("a chunk that is shorter than its place", (b"short", 0, 5), content=b"short"),
    *(
        chunked(f"{count} recipients", zstd(zeros(1 << 20)), recipients=count)
        for count in (0, 2, 16, 17, 1 << 16, (1 << 32) - 1)
    ),
    chunked("cut behind its keys", zstd(b"x" * 100), spoil=lambda data: data[:1300]),
    chunked("cut in its prologue", zstd(b"x" * 100), spoil=lambda data: data[:30]),
    chunked("of nothing", zstd(b"x" * 100), spoil=lambda data: data[:1]),
    chunked("a footer of 2^32 - 1", zstd(b"x" * 100), spoil=lambda data: data[:-8] + b"\xff" * 8),
    chunked("a footer of 0", zstd(b"x" * 100), spoil=lambda data: data[:-8] + bytes(8)),
    chunked(
        "a footer of 16384 chunks",
        zstd(b"x" * 100),
        spoil=lambda data: data[:-8] + struct.pack("<II", 16384, 16384 * 40 + 16),
    ),
    foreign("a pack of 30 MiB of zeros", lambda: bytes(30 << 20)),
    foreign("a pack of zeros beyond all packs", lambda: bytes(40 << 20)),
    foreign("a pack that is an archive", b"PK\x03\x04" + bytes(1000)),
    foreign("a pack with nothing but a header", header("pack")),
    foreign("a pack of format 255", header("pack")[:5] + b"\xff\0\0" + bytes(5000)),
]
