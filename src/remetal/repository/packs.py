"""Packs: encrypted chunks, some 16 MiB of them in one object. Specification: docs/format/pack.md.

    prologue  8 header, 16 repository, 16 machine, 16 random serial, u32 number of sealed keys
    keys      each: 16 id of a recipient, 1168 the pack's key sealed by HPKE; two for each recipient
    chunks    each AES-256-GCM under the pack's key, nonce = its ordinal
    contents  40 bytes per chunk, AES-256-GCM, nonce = 2^32 - 1
    footer    u32 number of chunks, u32 size of the sealed contents

Integers are little-endian. A pack is built in memory from start to end under a key that is used for nothing else,
and forgotten: writing it again means building it again.
"""

from __future__ import annotations

import secrets
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from remetal.errors import DamagedError
from remetal.repository.cipher import KEY_SIZE, SEALS, TAG_SIZE, WRAPPING, CipherError, KemPublic, chunk_id, digest
from remetal.repository.config import MAX_CHUNK
from remetal.repository.objects import HELP, damaged, header, miscalculated, pack_name, put_hashed
from remetal.repository.recipients import MAX_RECIPIENTS, RecipientKey, RecipientRecord
from remetal.storage import Store
from remetal.system.blockdev import aligned_buffer
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
_MAX_WRAPPED = SEALS * MAX_RECIPIENTS
_CHUNK = struct.Struct("<cI32sII")
_CONTENTS = struct.Struct("<cII")
_CONTENTS_NONCE = (0xFFFFFFFF).to_bytes(12, "big")
_TRIAL_ORDINAL = 0xFFFFFFFE
_SIZES = struct.Struct("<II")
_LEVEL = 1
_WORTH_IT = 32
"""Compression is kept if it saves at least one part in this many."""

ENTRY = np.dtype([("id", "u1", 32), ("word", "<u4"), ("plain", "<u4")])
"""One chunk in a table of contents: id, size in the pack (with the ZSTD bit), size of its bytes."""
Entries = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Contents:
    """What an index says of a pack: name (hash), size in bytes, first byte of the first chunk, and its chunks.

    `seal` is the hash of the chunks' entries where it was taken while the pack was built.
    """

    identity: bytes
    size: int
    start: int
    entries: Entries
    seal: bytes = b""


@dataclass(frozen=True, slots=True)
class Pack:
    """A finished pack, ready to be stored: its bytes are a part of its builder's buffer."""

    contents: Contents
    data: memoryview = field(repr=False)


def pack_room() -> int:
    """Return how many bytes a pack takes at most, as long as it is closed when it is full."""
    return head_size() + PACK_SIZE + MAX_CHUNK + TAG_SIZE + MAX_CHUNKS * ENTRY.itemsize + TAG_SIZE + FOOTER.size


def check_entries(name: str, entries: Entries, start: int, end: int) -> None:
    """Raise DamagedError unless the chunks fill the bytes from `start` to at most `end` and have possible sizes."""
    if not 0 < len(entries) <= MAX_CHUNKS:
        raise damaged(name, "its table of contents has impossible sizes")
    if start + int(check_sizes(name, entries).sum()) > end:
        raise damaged(name, "its table of contents promises more than it can hold")


def check_sizes(name: str, entries: Entries) -> npt.NDArray[np.int64]:
    """Return each chunk's size in its pack. Raises DamagedError if one of them cannot be."""
    stored = entries["word"] & np.uint32(ZSTD - 1)
    plain = entries["plain"]
    if int(plain.min()) < 1 or int(plain.max()) > MAX_CHUNK:
        raise damaged(name, "its table of contents has impossible sizes")
    limits = plain + np.uint32(TAG_SIZE)
    if bool((stored <= TAG_SIZE).any()) or bool((stored > limits).any()):
        raise damaged(name, "its table of contents has impossible sizes")
    return stored.astype(np.int64)


def offsets(entries: Entries, start: int) -> npt.NDArray[np.uint32]:
    """Return each chunk's first byte in its pack, and at the end the byte behind the last one."""
    stored = (entries["word"] & np.uint32(ZSTD - 1)).astype(np.uint64)
    return np.concatenate([[start], start + np.cumsum(stored)]).astype(np.uint32)


@dataclass(frozen=True, slots=True)
class Encoding:
    """The bytes of a chunk that are to be encrypted, and ZSTD if they are compressed, else 0."""

    data: bytes | memoryview = field(repr=False)
    flag: int


class Codec:
    """Compresses and decompresses chunks; each thread needs its own."""

    def __init__(self, id_key: bytes) -> None:
        self._id_key = id_key
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False, write_content_size=True)
        self._decompressor = zstandard.ZstdDecompressor()

    def identify(self, data: bytes | memoryview) -> bytes:
        """Return the chunk id of these bytes."""
        return chunk_id(self._id_key, data)

    def encode(self, data: memoryview) -> Encoding:
        """Return the chunk compressed, or as it is where that is not worth it."""
        compressed = self._compressor.compress(data)
        if len(compressed) * _WORTH_IT <= len(data) * (_WORTH_IT - 1):
            return Encoding(compressed, ZSTD)
        return Encoding(data, 0)

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


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one chunk in a pack: its ordinal, its first byte, and its size with the tag."""

    ordinal: int
    start: int
    size: int


class PackBuilder:
    """One pack in the making, in a buffer of its own that several threads fill at once.

    A thread reserves room, fills it, and leaves; the last one to leave a closed pack finishes it. A finished pack is
    hashed first and then read back whole, as a restore would: so memory that changes by itself is noticed. A change
    before the hash makes the pack unreadable, one after it differs from the hash.
    """

    def __init__(
        self,
        repository_id: str,
        machine_id: str,
        recipients: Sequence[RecipientRecord],
        buffer: memoryview | None = None,
    ) -> None:
        """Begin a pack in `buffer`, which has `pack_room()` bytes; by default in new memory."""
        key = secrets.token_bytes(KEY_SIZE)
        self._cipher = AESGCM(key)
        serial = secrets.token_bytes(16)
        ids = bytes.fromhex(repository_id), bytes.fromhex(machine_id)
        self._expected = (header("pack"), *ids, serial, SEALS * len(recipients))
        self._prologue = PROLOGUE.pack(*self._expected)
        sealed = (_wrap(key, each.kem, self._prologue, each.id) for each in recipients for _ in range(SEALS))
        start = b"".join([self._prologue, *sealed])
        _need_same_key(key, self._cipher)
        self.buffer = aligned_buffer(pack_room()) if buffer is None else buffer
        self.buffer[: len(start)] = start
        self._start = self._end = len(start)
        self._head = digest(start)
        self._rows = bytearray()
        self._count = self._filled = 0
        self._at_work = 0
        self._closed = False
        self._guard = threading.Lock()

    @property
    def full(self) -> bool:
        """Whether the pack should be closed."""
        return self._end >= PACK_SIZE or self._count >= MAX_CHUNKS

    @property
    def whole(self) -> bool:
        """Whether every slot was filled."""
        return self._filled == self._count

    def reserve(self, encoded: int) -> Slot:
        """Take room for a chunk of `encoded` bytes, which the caller then has to fill and to leave."""
        with self._guard:
            assert not self._closed, "the pack is closed"
            slot = Slot(self._count, self._end, encoded + TAG_SIZE)
            self._end += slot.size
            self._count += 1
            self._at_work += 1
            self._rows += bytes(ENTRY.itemsize)
            return slot

    def fill(self, slot: Slot, identity: bytes, chunk: memoryview, encoded: Encoding) -> None:
        """Encrypt a chunk into its slot."""
        word = slot.size | encoded.flag
        nonce, context = _chunk_context(self._prologue, slot.ordinal, identity, len(chunk), word)
        self._cipher.encrypt_into(nonce, encoded.data, context, self.buffer[slot.start : slot.start + slot.size])
        place = slot.ordinal * ENTRY.itemsize
        with self._guard:
            self._rows[place : place + ENTRY.itemsize] = identity + _SIZES.pack(word, len(chunk))
            self._filled += 1

    def leave(self) -> bool:
        """Tell that a slot is done with; True if the pack is closed and nobody is left at work on it."""
        with self._guard:
            self._at_work -= 1
            return self._closed and self._at_work == 0

    def close(self) -> bool:
        """Let nobody reserve room any more; True if nobody is at work on it."""
        with self._guard:
            self._closed = True
            return self._at_work == 0

    def add(self, identity: bytes, chunk: memoryview, codec: Codec) -> int:
        """Add a chunk where one thread alone fills the pack, and return the bytes it takes there."""
        encoded = codec.encode(chunk)
        slot = self.reserve(len(encoded.data))
        self.fill(slot, identity, chunk, encoded)
        self.leave()
        return slot.size

    def finish(self, codec: Codec) -> Pack:
        """Return the pack, when nobody is at work on it; the builder is used up, its buffer belongs to the pack.

        Raises RemetalError if the pack cannot be read back: then this computer's memory or processor is at fault.
        """
        context, sealed_size = _contents_context(self._prologue, self._count)
        ending = self._cipher.encrypt(_CONTENTS_NONCE, self._rows, context) + FOOTER.pack(self._count, sealed_size)
        data = self.buffer[: self._end + len(ending)]
        data[self._end :] = ending
        identity = digest(data)
        try:
            return Pack(self._read_back(identity.hex(), data, codec), data)
        except DamagedError as error:
            raise miscalculated("a pack") from error

    def _read_back(self, name: str, data: memoryview, codec: Codec) -> Contents:
        """Return what the index will say of a pack, after opening all of it as a restore would. Raises DamagedError."""
        opener = PackOpener(name, "", self._start, self._prologue, (self._cipher,))
        contents = opener.open_contents(data, len(data))
        seal = digest(contents.entries.tobytes())
        if digest(data[: self._start]) != self._head or PROLOGUE.unpack(data[: PROLOGUE.size]) != self._expected:
            raise damaged(name, "it does not begin as it did")
        starts = offsets(contents.entries, self._start).tolist()
        for ordinal, (raw, word, plain) in enumerate(contents.entries.tolist()):
            sealed = data[starts[ordinal] : starts[ordinal + 1]]
            opener.open_chunk(sealed, ordinal, bytes(raw), word, plain, codec)
        if len(contents.entries) != self._count:
            raise damaged(name, "it does not have all of its chunks")
        return replace(contents, seal=seal)


def put_pack(store: Store, machine_id: str, pack: Pack) -> None:
    """Store a finished pack. Raises RemetalError if its bytes are not what they were when it was finished."""
    put_hashed(store, pack_name(machine_id, pack.contents.identity), [pack.data])


class NotSealedError(DamagedError):
    """A pack that is whole, but was not written for this recipient."""


@dataclass(frozen=True, slots=True)
class PackOpener:
    """What opens the chunks of one pack: its prologue and its key.

    There are several keys only where the machine that sealed it has miscalculated: then one of them is the right one.
    """

    name: str
    machine_id: str
    start: int
    _prologue: bytes = field(repr=False)
    _ciphers: tuple[AESGCM, ...] = field(repr=False)

    def open_chunk(
        self, sealed: bytes | memoryview, ordinal: int, identity: bytes, word: int, plain: int, codec: Codec
    ) -> bytes:
        """Return a chunk's bytes after every check there is. Raises DamagedError."""
        nonce, context = _chunk_context(self._prologue, ordinal, identity, plain, word)
        try:
            data = codec.decode(self._decrypt(nonce, sealed, context), word & ZSTD, plain)
        except (InvalidTag, CipherError) as error:
            raise damaged(self.name, f"its chunk {ordinal} does not decode") from error
        if codec.identify(data) != identity:
            raise damaged(self.name, f"its chunk {ordinal} has other bytes than it should")
        return data

    def open_contents(self, tail: bytes | memoryview, size: int) -> Contents:
        """Return the table of contents from the last bytes of a pack of `size` bytes. Raises DamagedError."""
        count, sealed_size = FOOTER.unpack(tail[-FOOTER.size :])
        if not 0 < count <= MAX_CHUNKS or sealed_size != count * ENTRY.itemsize + TAG_SIZE:
            raise damaged(self.name, "its footer is impossible")
        sealed = tail[-FOOTER.size - sealed_size : -FOOTER.size]
        context, _ = _contents_context(self._prologue, count)
        try:
            plain = self._decrypt(_CONTENTS_NONCE, sealed, context)
        except InvalidTag as error:
            raise damaged(self.name, "its table of contents does not decode") from error
        entries = np.frombuffer(plain, ENTRY)
        end = size - FOOTER.size - sealed_size
        check_entries(self.name, entries, self.start, end)
        if int(offsets(entries, self.start)[-1]) != end:
            raise damaged(self.name, "its table of contents does not cover its chunks")
        return Contents(bytes.fromhex(self.name[-64:]), size, self.start, entries)

    def _decrypt(self, nonce: bytes, sealed: bytes | memoryview, context: bytes) -> bytes:
        """Return what is sealed under the pack's key. Raises InvalidTag."""
        for cipher in self._ciphers[:-1]:
            with suppress(InvalidTag):
                return cipher.decrypt(nonce, sealed, context)
        return self._ciphers[-1].decrypt(nonce, sealed, context)


def head_size() -> int:
    """Return how many bytes from a pack's start are enough to open it."""
    return PROLOGUE.size + _MAX_WRAPPED * _WRAPPED


def open_pack(name: str, head: bytes, key: RecipientKey) -> PackOpener:
    """Open a pack from its first bytes with a recipient's key.

    Raises DamagedError if they are not those of a pack of this repository, or not sealed to this key.
    """
    if len(head) < PROLOGUE.size:
        raise damaged(name, "it is too short for a pack")
    prologue = head[: PROLOGUE.size]
    magic, repository, machine, _, count = PROLOGUE.unpack(prologue)
    if magic != header("pack") or repository.hex() != key.repository_id or not 1 <= count <= _MAX_WRAPPED:
        raise damaged(name, "it is no pack of this repository")
    start = PROLOGUE.size + count * _WRAPPED
    sealed = [head[position : position + _WRAPPED] for position in range(PROLOGUE.size, start, _WRAPPED)]
    own = [each[16:] for each in sealed if each[:16].hex() == key.id]
    if not own:
        raise NotSealedError(
            f"the object {name} is not sealed to the key {key.id}: it was written before that key was accepted",
            hint=HELP,
        )
    keys: dict[bytes, None] = {}
    for each in own:
        with suppress(CipherError):
            keys[key.kem.open(_key_info(prologue, key.id), each)] = None
    ciphers = tuple(AESGCM(each) for each in keys if len(each) == KEY_SIZE)
    if not ciphers:
        raise damaged(name, "its key does not open")
    return PackOpener(name, machine.hex(), start, prologue, ciphers)


def sealed_to(name: str, head: bytes) -> list[str]:
    """Return the ids of the recipients that a pack is sealed to, from its first bytes. Raises DamagedError."""
    count = PROLOGUE.unpack(head[: PROLOGUE.size])[4] if len(head) >= PROLOGUE.size else 0
    end = PROLOGUE.size + count * _WRAPPED
    if not 1 <= count <= _MAX_WRAPPED or len(head) < end:
        raise damaged(name, "it is no pack of this repository")
    return list(dict.fromkeys(head[at : at + 16].hex() for at in range(PROLOGUE.size, end, _WRAPPED)))


def _need_same_key(key: bytes, cipher: AESGCM) -> None:
    """Raise RemetalError unless the key that was sealed is the one that the cipher has."""
    nonce = _TRIAL_ORDINAL.to_bytes(12, "big")
    try:
        cipher.decrypt(nonce, AESGCM(key).encrypt(nonce, b"", b"key"), b"key")
    except InvalidTag as error:
        raise miscalculated("a pack's key") from error


def _wrap(key: bytes, kem: KemPublic, prologue: bytes, recipient: str) -> bytes:
    return bytes.fromhex(recipient) + kem.seal(_key_info(prologue, recipient), key)


def _key_info(prologue: bytes, recipient: str) -> bytes:
    return b"remetal 1 pack key\0" + prologue + bytes.fromhex(recipient)


def _contents_context(prologue: bytes, count: int) -> tuple[bytes, int]:
    """Return what the table of contents of so many chunks is bound to, and its size when it is sealed."""
    sealed_size = count * ENTRY.itemsize + TAG_SIZE
    return prologue + _CONTENTS.pack(b"T", count, sealed_size), sealed_size


def _chunk_context(prologue: bytes, ordinal: int, identity: bytes, plain: int, word: int) -> tuple[bytes, bytes]:
    return ordinal.to_bytes(12, "big"), prologue + _CHUNK.pack(b"C", ordinal, identity, plain, word)
