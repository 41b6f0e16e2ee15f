"""Format 1 as docs/format/ tells it: a second reader, from passphrase to image, that uses nothing of remetal's."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

_GOLDEN = json.loads((Path(__file__).parents[1] / "golden/format-1-left-out.json").read_text(encoding="utf-8"))
_OBJECTS = {name: base64.b64decode(data) for name, data in _GOLDEN["objects"].items()}
_CONFIG = json.loads(_OBJECTS["config"].split(b"\n")[0])
_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def derive(context: str, material: bytes, size: int = 32) -> bytes:
    return blake3(material, derive_key_context="remetal 1 " + context).digest(size)


def named(prefix: str) -> list[tuple[str, bytes]]:
    return sorted((name, data) for name, data in _OBJECTS.items() if name.startswith(prefix))


def unlock() -> bytes:
    text = unicodedata.normalize("NFC", _GOLDEN["passphrase"]).encode()
    for _, data in named("keys/slots/"):
        slot = json.loads(data)
        sealed = base64.b64decode(slot["sealed"])
        kdf = Argon2id(
            salt=base64.b64decode(slot["salt"]),
            length=32,
            iterations=slot["iterations"],
            lanes=slot["lanes"],
            memory_cost=slot["memory"],
        )
        if slot["recipient"] == _CONFIG["id"]:
            aad = json.dumps({**slot, "sealed": ""}, separators=(",", ":")).encode()
            return AESGCM(derive("passphrase slot", kdf.derive(text))).decrypt(bytes(12), sealed, aad)
    raise AssertionError("the founder has no passphrase")


class Keys:
    """What a seed gives."""

    def __init__(self, seed: bytes) -> None:
        expanded = hashlib.shake_256(seed).digest(96)
        mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
        x25519 = X25519PrivateKey.from_private_bytes(expanded[64:])
        self.kem = hpke.MLKEM768X25519PrivateKey(mlkem, x25519)
        self.kem_public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        signing = Ed25519PrivateKey.from_private_bytes(derive("recipient signing key", seed))
        self.verify_key = signing.public_key().public_bytes_raw()
        self.id = derive("recipient id", self.kem_public + self.verify_key, 16).hex()


def machine_secrets(keys: Keys, machine: dict[str, Any]) -> tuple[bytes, bytes]:
    info = f"remetal 1 machine secrets {_CONFIG['id']} {machine['id']} {keys.id}".encode()
    ((_, sealed),) = named(f"keys/secrets/{machine['id']}.{keys.id}.")
    (plain,) = {_SUITE.decrypt(sealed[at : at + 1200], keys.kem, info) for at in range(0, len(sealed), 1200)}
    assert derive("machine secrets commitment", plain) == base64.b64decode(machine["commitment"])
    return plain[:32], plain[32:]


def read_packs(keys: Keys, id_key: bytes) -> dict[bytes, bytes]:
    chunks: dict[bytes, bytes] = {}
    for _, data in named("packs/"):
        assert data[:8] == b"RMTLP\x01\0\0"
        prologue = data[:60]
        (recipients,) = struct.unpack("<I", data[56:60])
        wrapped = [data[at : at + 1184] for at in range(60, 60 + recipients * 1184, 1184)]
        info = b"remetal 1 pack key\0" + prologue + bytes.fromhex(keys.id)
        opened = [_SUITE.decrypt(each[16:], keys.kem, info) for each in wrapped if each[:16].hex() == keys.id]
        assert len(set(opened)) == 1
        cipher = AESGCM(opened[0])
        count, size = struct.unpack("<II", data[-8:])
        aad = prologue + b"T" + struct.pack("<II", count, size)
        contents = cipher.decrypt((2**32 - 1).to_bytes(12, "big"), data[-8 - size : -8], aad)
        position = 60 + recipients * 1184
        for number, (identity, word, plain) in enumerate(struct.iter_unpack("<32sII", contents)):
            stored = word & 0x7FFFFFFF
            aad = prologue + b"C" + struct.pack("<I32sII", number, identity, plain, word)
            chunk = cipher.decrypt(number.to_bytes(12, "big"), data[position : position + stored], aad)
            chunk = zstandard.ZstdDecompressor().decompress(chunk) if word >> 31 else chunk
            assert len(chunk) == plain
            assert blake3(chunk, key=id_key).digest() == identity
            chunks[identity] = chunk
            position += stored
        assert position == len(data) - 8 - size
    return chunks


def check_parity(machine: str) -> set[str]:
    """Compute every parity object anew from the packs that it names, and return the names of those."""
    found: set[str] = set()
    for name, data in named(f"parity/{machine}/"):
        magic, repository, owner, count = struct.unpack("<8s16s16sI", data[:44])
        assert (magic, repository.hex(), owner.hex()) == (b"RMTLX\x01\0\0", _CONFIG["id"], machine)
        assert name.split("/")[2].startswith(f"{count:02x}.")
        rest = data[44 + 36 * count :]
        packs = list(struct.iter_unpack("<32sI", data[44 : 44 + 36 * count]))
        assert len(rest) == max(size for _, size in packs)
        total = 0
        for identity, size in packs:
            pack = f"packs/{machine}/{identity[:1].hex()}/{identity.hex()}"
            assert len(_OBJECTS[pack]) == size
            total ^= int.from_bytes(_OBJECTS[pack], "little")
            found.add(pack)
        assert total == int.from_bytes(rest, "little")
    return found


def read_indexed(catalog_key: bytes, machine: str) -> set[bytes]:
    found: set[bytes] = set()
    for _, data in named(f"index/{machine}/"):
        body = AESSIV(derive("catalog index", catalog_key, 64)).decrypt(data[44:], [data[:44]])
        (packs,) = struct.unpack("<I", body[:4])
        position = 4 + 48 * packs
        for name, size, _, count in struct.iter_unpack("<32sQII", body[4:position]):
            assert len(_OBJECTS[f"packs/{machine}/{name[:1].hex()}/{name.hex()}"]) == size
            found |= {body[at : at + 32] for at in range(position, position + 40 * count, 40)}
            position += 40 * count
        assert position == len(body)
    return found


def read_image(image: dict[str, Any], catalog_key: bytes, machine: str, chunks: dict[bytes, bytes]) -> bytes:
    result = bytearray(image["size"])
    slot = 0
    pages = b"".join(page or bytes(32) for page in image["pages"])
    numbers = struct.pack("<QQ", image["size"], image["chunk_size"])
    assert derive("image map", numbers + pages).hex() == image["digest"]
    for page in image["pages"]:
        data = _OBJECTS[f"maps/{machine}/{page.hex()}"]
        body = AESSIV(derive("catalog map", catalog_key, 64)).decrypt(data[44:], [data[:44]])
        _, runs = struct.unpack("<II", body[:8])
        position = 8 + 4 * runs
        for length, kind, _ in struct.iter_unpack("<HBB", body[8:position]):
            for number in range(slot, slot + length if kind == 2 else slot):
                chunk = chunks[body[position : position + 32]]
                start = number * image["chunk_size"]
                result[start : start + len(chunk)] = chunk
                position += 32
            slot += length
        assert position == len(body)
    return bytes(result)


def test_the_specification_is_enough_to_read_a_repository() -> None:
    for name, data in _OBJECTS.items():
        assert name == "config" or name.startswith("history/") or name.endswith(blake3(data).hexdigest())
    keys = Keys(unlock())
    assert keys.id == _CONFIG["id"]
    for _, data in named("keys/recipients/"):
        text, signature, _ = data.split(b"\n")
        Ed25519PublicKey.from_public_bytes(keys.verify_key).verify(
            bytes.fromhex(signature.decode()), b"remetal 1 recipient record\0" + text
        )
    ((_, data),) = named("keys/machines/")
    text, signature, _ = data.split(b"\n")
    machine = json.loads(text)
    verify_key = Ed25519PublicKey.from_public_bytes(base64.b64decode(machine["verify_key"]))
    verify_key.verify(bytes.fromhex(signature.decode()), b"remetal 1 machine record\0" + text)
    assert derive("machine id", verify_key.public_bytes_raw(), 16).hex() == machine["id"]
    id_key, catalog_key = machine_secrets(keys, machine)
    chunks = read_packs(keys, id_key)
    assert set(chunks) == read_indexed(catalog_key, machine["id"])
    assert check_parity(machine["id"]) == {name for name, _ in named("packs/")}
    previous = bytes(32)
    snapshots = named(f"history/{machine['id']}/")
    assert len(snapshots) == len(_GOLDEN["images"])
    for number, (name, data) in enumerate(snapshots, start=1):
        magic, _, _, sequence, before, ledger, signer, size = struct.unpack("<8s16s16sQ32sQ16sI", data[:108])
        assert (magic, sequence, before) == (b"RMTLS\x01\0\0", number, previous)
        assert (ledger, signer) == (0, bytes(16))
        assert name == f"history/{machine['id']}/{sequence:016x}"
        verify_key.verify(data[108 + size :], b"remetal 1 snapshot\0" + data[: 108 + size])
        body = AESSIV(derive("catalog snapshot", catalog_key, 64)).decrypt(data[108 : 108 + size], [data[:108]])
        record = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(body))
        image = read_image(record["images"][0], catalog_key, machine["id"], chunks)
        assert hashlib.sha256(image).hexdigest() == _GOLDEN["images"][number - 1]
        assert ("left_out" in record) == (number == 2)
        for each in record.get("left_out", ()):
            assert each["volume"] in {image["volume"] for image in record["images"]}
            assert each["path"].startswith("/")
            assert each["bytes"] in {0, 123_456_789}
        previous = blake3(data).digest()


def test_the_kit_is_what_its_page_says() -> None:
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    payload = b""
    for number, line in enumerate(_GOLDEN["kit"], start=1):
        assert line.startswith(f"{number}  ")
        value = 0
        for symbol in line[3:].replace(" ", ""):
            value = value << 5 | alphabet.index(symbol)
        piece = (value >> 20).to_bytes(10, "big")
        assert value & 0xFFFFF == int.from_bytes(derive("recovery kit line", bytes([number]) + piece, 3), "big") >> 4
        payload += piece
    assert payload[:2] == b"\x01\0"
    assert payload[2:18].hex() == _CONFIG["id"]
    assert payload[18:] == unlock()
