"""Packs: encrypted chunks, some 16 MiB of them in one object. Specification: docs/format/pack.md.

    prologue  8 header, 16 repository, 16 machine, 16 random serial, u32 number of recipients
    keys      per recipient: 16 id, 1168 the pack's key sealed by HPKE
    chunks    each AES-256-GCM under the pack's key, nonce = its ordinal
    contents  40 bytes per chunk, AES-256-GCM, nonce = 2^32 - 1
    footer    u32 number of chunks, u32 size of the sealed contents

Integers are little-endian. A pack is built in memory from start to end under a key that is used for nothing else,
and forgotten: writing it again means building it again.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from remetal.errors import DamagedError, RemetalError
from remetal.repository.cipher import KEY_SIZE, TAG_SIZE, WRAPPING, CipherError, KemPublic, chunk_id
from remetal.repository.config import MAX_CHUNK
from remetal.repository.objects import HELP, damaged, header
from remetal.repository.recipients import MAX_RECIPIENTS, RecipientKey, RecipientRecord
from remetal.units import MIB

PACK_SIZE = 16 * MIB
"""A pack is closed once its chunks have this many bytes."""
MAX_PACK = 32 * MIB
MAX_CHUNKS = 1 << 14
ZSTD = 1 << 31
"""Bit of a chunk's size word: it was compressed with Zstandard before it was encrypted."""

PROLOGUE = struct.Struct("<8s16s16s16sI")
FOOTER = struct.Struct("<II")
_WRAPPED = 16 + KEY_SIZE + WRAPPING
_CHUNK = struct.Struct("<cI32sII")
_CONTENTS = struct.Struct("<cII")
_CONTENTS_ORDINAL = 0xFFFFFFFF
_LEVEL = 1
_WORTH_IT = 32
"""Compression is kept if it saves at least one part in this many."""

ENTRY = np.dtype([("id", "u1", 32), ("word", "<u4"), ("plain", "<u4")])
"""One chunk in a table of contents: id, size in the pack (with the ZSTD bit), size of its bytes."""
Entries = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Contents:
    """What an index says of a pack: name (hash), size in bytes, first byte of the first chunk, and its chunks."""

    identity: bytes
    size: int
    start: int
    entries: Entries


@dataclass(frozen=True, slots=True)
class Pack:
    """A finished pack, ready to be stored."""

    contents: Contents
    pieces: Sequence[bytes] = field(repr=False)


def check_entries(name: str, entries: Entries, start: int, end: int) -> None:
    """Raise DamagedError unless the chunks fill the bytes from `start` to at most `end` and have possible sizes."""
    stored = entries["word"] & np.uint32(ZSTD - 1)
    plain = entries["plain"]
    if not 0 < len(entries) <= MAX_CHUNKS or int(plain.min()) < 1 or int(plain.max()) > MAX_CHUNK:
        raise damaged(name, "its table of contents has impossible sizes")
    limits = plain + np.uint32(TAG_SIZE)
    if bool((stored <= TAG_SIZE).any()) or bool((stored > limits).any()):
        raise damaged(name, "its table of contents has impossible sizes")
    if start + int(stored.sum(dtype=np.uint64)) > end:
        raise damaged(name, "its table of contents promises more than it can hold")


def offsets(entries: Entries, start: int) -> npt.NDArray[np.uint32]:
    """Return each chunk's first byte in its pack, and at the end the byte behind the last one."""
    stored = (entries["word"] & np.uint32(ZSTD - 1)).astype(np.uint64)
    return np.concatenate([[start], start + np.cumsum(stored)]).astype(np.uint32)


class Codec:
    """Compresses and decompresses chunks; each thread needs its own."""

    def __init__(self, id_key: bytes) -> None:
        self._id_key = id_key
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False, write_content_size=True)
        self._decompressor = zstandard.ZstdDecompressor()

    def identify(self, data: bytes | memoryview) -> bytes:
        """Return the chunk id of these bytes."""
        return chunk_id(self._id_key, data)

    def encode(self, data: memoryview) -> tuple[bytes | memoryview, int]:
        """Return the bytes to encrypt, and ZSTD if they are compressed, else 0."""
        compressed = self._compressor.compress(data)
        if len(compressed) * _WORTH_IT <= len(data) * (_WORTH_IT - 1):
            return compressed, ZSTD
        return data, 0

    def decode(self, encoded: bytes, flag: int, plain: int) -> bytes:
        """Return the chunk's bytes, of which there must be `plain`. Raises CipherError."""
        if not flag:
            data = encoded
        else:
            try:
                if zstandard.get_frame_parameters(encoded).content_size != plain:
                    raise CipherError
                data = self._decompressor.decompress(encoded, max_output_size=plain)
            except zstandard.ZstdError as error:
                raise CipherError from error
        if len(data) != plain:
            raise CipherError
        return data


class PackBuilder:
    """One pack in the making. Every chunk is decoded and hashed again before it counts as stored."""

    def __init__(self, repository_id: str, machine_id: str, recipients: Sequence[RecipientRecord], codec: Codec):
        self._codec = codec
        key = secrets.token_bytes(KEY_SIZE)
        self._cipher = AESGCM(key)
        serial = secrets.token_bytes(16)
        ids = bytes.fromhex(repository_id), bytes.fromhex(machine_id)
        self._prologue = PROLOGUE.pack(header("pack"), *ids, serial, len(recipients))
        wrapped = [_wrap(key, each.kem, self._prologue, each.id) for each in recipients]
        self._pieces = [self._prologue, *wrapped]
        self._start = sum(len(piece) for piece in self._pieces)
        self._hasher = blake3(b"".join(self._pieces))
        self._entries = bytearray()
        self._count = 0
        self._size = self._start

    @property
    def full(self) -> bool:
        """Whether the pack should be finished."""
        return self._size >= PACK_SIZE or self._count >= MAX_CHUNKS

    @property
    def empty(self) -> bool:
        """Whether no chunk is in it."""
        return self._count == 0

    def add(self, identity: bytes, data: memoryview) -> int:
        """Add a chunk and return how many bytes it takes in the pack.

        Raises RemetalError if decoding gives other bytes: then this computer's memory or processor is at fault.
        """
        encoded, flag = self._codec.encode(data)
        word = (len(encoded) + TAG_SIZE) | flag
        nonce, context = _chunk_context(self._prologue, self._count, identity, len(data), word)
        sealed = self._cipher.encrypt(nonce, encoded, context)
        try:
            decoded = self._codec.decode(self._cipher.decrypt(nonce, sealed, context), flag, len(data))
            good = self._codec.identify(decoded) == identity
        except (InvalidTag, CipherError):
            good = False
        if not good:
            raise RemetalError(
                "a chunk could not be read back right after it was encoded; nothing of it was stored",
                hint="This computer miscalculates: test its memory (memtest86+) before you trust it with a backup.",
            )
        self._pieces.append(sealed)
        self._hasher.update(sealed)
        self._entries += identity + struct.pack("<II", word, len(data))
        self._count += 1
        self._size += len(sealed)
        return len(sealed)

    def finish(self) -> Pack:
        """Close the pack; the builder is used up."""
        nonce = _CONTENTS_ORDINAL.to_bytes(12, "big")
        sealed_size = len(self._entries) + TAG_SIZE
        context = self._prologue + _CONTENTS.pack(b"T", self._count, sealed_size)
        sealed = self._cipher.encrypt(nonce, self._entries, context)
        ending = [sealed, FOOTER.pack(self._count, sealed_size)]
        for piece in ending:
            self._hasher.update(piece)
        self._pieces += ending
        entries = np.frombuffer(bytes(self._entries), ENTRY)
        size = self._size + sum(len(piece) for piece in ending)
        return Pack(Contents(self._hasher.digest(), size, self._start, entries), self._pieces)


class NotSealedError(DamagedError):
    """A pack that is whole, but was not written for this recipient."""


@dataclass(frozen=True, slots=True)
class PackOpener:
    """What opens the chunks of one pack: its prologue and its key."""

    name: str
    machine_id: str
    start: int
    _prologue: bytes = field(repr=False)
    _cipher: AESGCM = field(repr=False)

    def open_chunk(self, sealed: bytes, ordinal: int, identity: bytes, word: int, plain: int, codec: Codec) -> bytes:
        """Return a chunk's bytes after every check there is. Raises DamagedError."""
        nonce, context = _chunk_context(self._prologue, ordinal, identity, plain, word)
        try:
            data = codec.decode(self._cipher.decrypt(nonce, sealed, context), word & ZSTD, plain)
        except (InvalidTag, CipherError) as error:
            raise damaged(self.name, f"its chunk {ordinal} does not decode") from error
        if codec.identify(data) != identity:
            raise damaged(self.name, f"its chunk {ordinal} has other bytes than it should")
        return data

    def open_contents(self, tail: bytes, size: int) -> Contents:
        """Return the table of contents from the last bytes of a pack of `size` bytes. Raises DamagedError."""
        count, sealed_size = FOOTER.unpack(tail[-FOOTER.size :])
        if not 0 < count <= MAX_CHUNKS or sealed_size != count * ENTRY.itemsize + TAG_SIZE:
            raise damaged(self.name, "its footer is impossible")
        sealed = tail[-FOOTER.size - sealed_size : -FOOTER.size]
        context = self._prologue + _CONTENTS.pack(b"T", count, sealed_size)
        try:
            plain = self._cipher.decrypt(_CONTENTS_ORDINAL.to_bytes(12, "big"), sealed, context)
        except InvalidTag as error:
            raise damaged(self.name, "its table of contents does not decode") from error
        entries = np.frombuffer(plain, ENTRY)
        end = size - FOOTER.size - sealed_size
        check_entries(self.name, entries, self.start, end)
        if int(offsets(entries, self.start)[-1]) != end:
            raise damaged(self.name, "its table of contents does not cover its chunks")
        return Contents(bytes.fromhex(self.name[-64:]), size, self.start, entries)


def head_size() -> int:
    """Return how many bytes from a pack's start are enough to open it."""
    return PROLOGUE.size + MAX_RECIPIENTS * _WRAPPED


def open_pack(name: str, head: bytes, key: RecipientKey) -> PackOpener:
    """Open a pack from its first bytes with a recipient's key.

    Raises DamagedError if they are not those of a pack of this repository, or not sealed to this key.
    """
    if len(head) < PROLOGUE.size:
        raise damaged(name, "it is too short for a pack")
    prologue = head[: PROLOGUE.size]
    magic, repository, machine, _, count = PROLOGUE.unpack(prologue)
    if magic != header("pack") or repository.hex() != key.repository_id or not 1 <= count <= MAX_RECIPIENTS:
        raise damaged(name, "it is no pack of this repository")
    start = PROLOGUE.size + count * _WRAPPED
    for position in range(PROLOGUE.size, start, _WRAPPED):
        wrapped = head[position : position + _WRAPPED]
        if wrapped[:16].hex() == key.id:
            try:
                pack_key = key.kem.open(_key_info(prologue, key.id), wrapped[16:])
            except CipherError as error:
                raise damaged(name, "its key does not open") from error
            if len(pack_key) != KEY_SIZE:
                raise damaged(name, "its key has the wrong length")
            return PackOpener(name, machine.hex(), start, prologue, AESGCM(pack_key))
    raise NotSealedError(
        f"the object {name} is not sealed to the key {key.id}: it was written before that key was accepted", hint=HELP
    )


def sealed_to(name: str, head: bytes) -> list[str]:
    """Return the ids of the recipients that a pack is sealed to, from its first bytes. Raises DamagedError."""
    count = PROLOGUE.unpack(head[: PROLOGUE.size])[4] if len(head) >= PROLOGUE.size else 0
    end = PROLOGUE.size + count * _WRAPPED
    if not 1 <= count <= MAX_RECIPIENTS or len(head) < end:
        raise damaged(name, "it is no pack of this repository")
    return [head[position : position + 16].hex() for position in range(PROLOGUE.size, end, _WRAPPED)]


def _wrap(key: bytes, kem: KemPublic, prologue: bytes, recipient: str) -> bytes:
    return bytes.fromhex(recipient) + kem.seal(_key_info(prologue, recipient), key)


def _key_info(prologue: bytes, recipient: str) -> bytes:
    return b"remetal 1 pack key\0" + prologue + bytes.fromhex(recipient)


def _chunk_context(prologue: bytes, ordinal: int, identity: bytes, plain: int, word: int) -> tuple[bytes, bytes]:
    return ordinal.to_bytes(12, "big"), prologue + _CHUNK.pack(b"C", ordinal, identity, plain, word)
