"""The cryptography of format 1, each primitive once; docs/format/README.md lists them with their sources.

BLAKE3 (names, keyed chunk ids, key derivation), AES-256-GCM (chunks, passphrase slots), AES-SIV (everything in
the catalog), HPKE with ML-KEM-768 + X25519 (sealing to recipients), Ed25519 (signatures), Argon2id (passphrases).
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

KEY_SIZE = 32
TAG_SIZE = 16
SIGNATURE_SIZE = 64
SIV_SIZE = 16
WRAPPING = 1120 + TAG_SIZE
"""What HPKE adds to a plaintext: the encapsulated key (ML-KEM-768 1088, X25519 32) and the tag."""

SEALS = 2
"""How often a key is sealed to each recipient: nobody else can look whether a sealing was done well."""

_MLKEM_PUBLIC = 1184
KEM_PUBLIC_SIZE = _MLKEM_PUBLIC + 32

_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class CipherError(Exception):
    """A seal or signature does not fit. Callers turn it into an error that names the object."""


def derive(context: str, *material: bytes, size: int = KEY_SIZE) -> bytes:
    """Return `size` bytes that only the holder of the joined `material` can compute: BLAKE3's derive_key mode."""
    hasher = blake3(derive_key_context=f"remetal 1 {context}")
    for piece in material:
        hasher.update(piece)
    return hasher.digest(size)


def digest(*pieces: bytes | memoryview) -> bytes:
    """Return the 32-byte BLAKE3 of the pieces in order: what an object is named after."""
    hasher = blake3()
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


def chunk_id(id_key: bytes, data: bytes | memoryview) -> bytes:
    """Return the keyed 32-byte BLAKE3 of a chunk's bytes."""
    return blake3(data, key=id_key).digest()


def seal_record(key: bytes, context: bytes, data: bytes) -> bytes:
    """Return `data` sealed with AES-SIV (RFC 5297): the same bytes for the same input, 16 bytes longer.

    `key` has 64 bytes; `context` is authenticated and not stored.
    """
    return AESSIV(key).encrypt(data, [context])


def open_record(key: bytes, context: bytes, sealed: bytes) -> bytes:
    """Return what `seal_record` sealed. Raises CipherError."""
    if len(sealed) <= SIV_SIZE:
        raise CipherError
    try:
        return AESSIV(key).decrypt(sealed, [context])
    except InvalidTag as error:
        raise CipherError from error


@dataclass(frozen=True, slots=True)
class KemPublic:
    """The public half to which packs and machines' secrets are sealed, as 1216 raw bytes (ML-KEM-768, X25519)."""

    raw: bytes

    def seal(self, info: bytes, data: bytes) -> bytes:
        """Return `data` sealed by HPKE base mode (RFC 9180), `WRAPPING` bytes longer; `info` is bound to it.

        Raises CipherError if the raw bytes are no public key.
        """
        try:
            key = hpke.MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(self.raw[:_MLKEM_PUBLIC]),
                X25519PublicKey.from_public_bytes(self.raw[_MLKEM_PUBLIC:]),
            )
            return _SUITE.encrypt(data, key, info)
        except ValueError as error:
            raise CipherError from error


class KemPrivate:
    """The private half, made from a 32-byte seed as X-Wing does: SHAKE-256 gives 64 + 32 bytes for the two keys."""

    def __init__(self, seed: bytes) -> None:
        expanded = hashlib.shake_256(seed).digest(96)
        mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
        x25519 = X25519PrivateKey.from_private_bytes(expanded[64:])
        self._key = hpke.MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = KemPublic(mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw())

    def open(self, info: bytes, sealed: bytes) -> bytes:
        """Return what was sealed to this key with the same `info`. Raises CipherError."""
        try:
            return _SUITE.decrypt(sealed, self._key, info)
        except (InvalidTag, ValueError) as error:
            raise CipherError from error


def verify_key(seed: bytes) -> bytes:
    """Return the 32-byte Ed25519 public key of a 32-byte seed."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def sign(seed: bytes, *pieces: bytes) -> bytes:
    """Return the 64-byte Ed25519 signature of the joined pieces."""
    return Ed25519PrivateKey.from_private_bytes(seed).sign(b"".join(pieces))


def verify(public: bytes, signature: bytes, *pieces: bytes) -> None:
    """Raise CipherError unless `signature` is that of the joined pieces under this public key."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, b"".join(pieces))
    except (InvalidSignature, ValueError) as error:
        raise CipherError from error


def stretch(passphrase: str, salt: bytes, *, memory_kib: int, iterations: int, lanes: int) -> bytes:
    """Return the 32-byte key of a passphrase: Argon2id (RFC 9106) over its NFC form in UTF-8."""
    text = unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogateescape")
    kdf = Argon2id(salt=salt, length=KEY_SIZE, iterations=iterations, lanes=lanes, memory_cost=memory_kib)
    return kdf.derive(text)
