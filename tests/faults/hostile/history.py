"""Snapshots that are validly signed: the attacker owns the machine, and its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import zstandard

from remetal.repository.history import entry_name
from remetal.repository.maps import map_digest
from tests.faults.hostile.case import ALL, NAMES, NUMBERS, SHOW, VOLUME, Attacker, Case, Lazy, made, squeeze

_GB = 1 << 30


def case(name: str, make: Callable[[Attacker], None], *ends: int) -> Case:
    return Case("history", name, make, (*ALL, SHOW), frozenset(ends or {0, 3, 5}))


def harmless(name: str, make: Callable[[Attacker], None], *, refused: bool = False) -> Case:
    return replace(case(name, make), refused=refused)


def body(name: str, plain: Lazy) -> Case:
    """A body of these bytes, compressed as it should be."""
    return case(f"body of {name}", lambda attacker: attacker.put_snapshot(squeeze(made(plain))))


def frame(name: str, packed: Lazy) -> Case:
    """A body of these bytes, which should be a frame of Zstandard."""
    return case(f"frame: {name}", lambda attacker: attacker.put_snapshot(made(packed)))


def field(name: str, value: str) -> Case:
    """A text that is only shown; a time has to be one."""
    refused = name == "time" and bool(value.strip("."))
    return harmless(f"{name} {value[:30]!r}", lambda attacker: attacker.commit(**{name: value}), refused=refused)


def image(name: str, *, told: bool = False, **changes: Any) -> Case:
    """A snapshot one of whose images has other numbers; its digest fits, if it is not among them.

    `told`: the number is only told to people.
    """

    def make(attacker: Attacker) -> None:
        images = attacker.body()["images"]
        images[0] |= changes
        numbers = (images[0]["size"], images[0]["chunk_size"])
        if "digest" not in changes and all(isinstance(each, int) and 0 <= each < 1 << 64 for each in numbers):
            images[0]["digest"] = map_digest(*numbers, images[0]["pages"])
        attacker.commit(images=images)

    return harmless(f"image with {name}", make, refused=not told)


def left_out(name: str, count: int = 1, *, refused: bool = True, **changes: Any) -> Case:
    """A snapshot that says so often that this was left out."""

    def make(attacker: Attacker) -> None:
        attacker.commit(left_out=[{"volume": VOLUME, "path": "/tmp", "bytes": 1} | changes] * count)

    return harmless(f"left out: {name}", make, refused=refused)


def zeros(size: int, level: int = 3) -> bytes:
    """Return a frame of so many zeros, which says how many they are."""
    compressor = zstandard.ZstdCompressor(level=level).compressobj(size=size)
    piece = bytes(1 << 20)
    return b"".join([*(compressor.compress(piece) for _ in range(size >> 20)), compressor.flush()])


def lying(size: int, content: int) -> bytes:
    """Return a frame of `content` zeros that says it has `size`: 4 bytes of magic, a descriptor, 8 bytes of size."""
    block = (content << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"  # the last block, of one byte again and again
    return b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + block


def window(exponent: int) -> bytes:
    """Return a frame with a window of 2^(10 + exponent) bytes, and no size."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([exponent << 3]) + (1 << 3 | 1).to_bytes(3, "little") + b"\x80"


def texts(count: int) -> bytes:
    """Return a snapshot's body with so many empty tags: one byte each, and a pointer each when it is read."""
    head = b"\x86\xa4time\xa0\xa8hostname\xa0\xa7version\xa0\xa6layout\xc4\x00\xa6images\x90\xa4tags\xdd"
    return head + count.to_bytes(4, "big") + b"\xa0" * count


def pages(count: int) -> Callable[[Attacker], None]:
    """Return what commits an image whose map has so many pages of holes, and the size for it."""

    def make(attacker: Attacker) -> None:
        images = attacker.body()["images"]
        size = count * 4096 * images[0]["chunk_size"]
        images[0] |= {"size": size, "used": 0, "pages": [b""] * count}
        images[0]["digest"] = map_digest(size, images[0]["chunk_size"], images[0]["pages"])
        attacker.commit(images=images)

    return make


def with_images(count: int, **changes: Any) -> Callable[[Attacker], None]:
    def make(attacker: Attacker) -> None:
        first = attacker.body()["images"][0] | {"size": 0, "used": 0, "pages": []} | changes
        first["digest"] = map_digest(0, first["chunk_size"], [])
        attacker.commit(images=[first | {"volume": f"v{number}"} for number in range(count)])

    return make


def many_entries(attacker: Attacker) -> None:
    data = attacker.get(entry_name(attacker.keys.machine_id, 1))
    for number in range(2, 3002):
        attacker.put(entry_name(attacker.keys.machine_id, number), data)


def chain(*pointers: int) -> Callable[[Attacker], None]:
    """Return what commits one good snapshot after another, each of which says that such an entry is its ledger."""

    def make(attacker: Attacker) -> None:
        packed = squeeze(msgspec.msgpack.encode(attacker.body()))
        for number, ledger in enumerate(pointers, start=2):
            attacker.put_snapshot(packed, number, ledger=ledger)

    return make


def entry(name: str, sequence: int, data: Lazy | None = None) -> Case:
    def make(attacker: Attacker) -> None:
        good = attacker.get(entry_name(attacker.keys.machine_id, 1))
        attacker.put(entry_name(attacker.keys.machine_id, sequence), good if data is None else made(data))

    words = (*ALL, ("backup", "--machine", "web", "--disk", "../passphrase"))
    return Case("history", name, make, words, frozenset({0, 3, 5, 6}))


_DEEP = b"\x91" * 10_000 + b"\xc0"
_HEAD = b"\x86\xa4time"

CASES = [
    frame("a GiB of zeros", lambda: zeros(_GB)),
    frame("127 MiB of zeros", lambda: zeros(127 << 20)),
    frame("8 MiB of zeros", lambda: zeros(8 << 20)),
    frame("zeros in zeros", lambda: squeeze(zeros(_GB))),
    frame("says 2^40", lying(1 << 40, 1000)),
    frame("says 2^63", lying(1 << 63, 1000)),
    frame("says 2^64 - 1", lying((1 << 64) - 1, 1000)),
    frame("says 127 MiB and has 1000 bytes", lying(127 << 20, 1000)),
    frame("says 10 and has 100 000 bytes", lying(10, 100_000)),
    frame("says nothing, and has a window of 2 GiB", window(21)),
    frame("says nothing, and has a window of 3 TiB", window(31)),
    frame("can be skipped", b"\x50\x2a\x4d\x18\xff\xff\xff\xff"),
    frame("of nothing", b"\x28\xb5\x2f\xfd"),
    frame("needs a dictionary", b"\x28\xb5\x2f\xfd\x23\xff\xff\xff\xff\x04\x01\0\0"),
    frame("is none", b"PK\x03\x04" + bytes(100)),
    frame("two of them", squeeze(b"\x80") * 2),
    body("arrays, 10^4 deep", _DEEP),
    body("maps, 10^4 deep", b"\x81\xa1a" * 10_000 + b"\xc0"),
    body("arrays in a known field, 10^4 deep", _HEAD + _DEEP),
    body("arrays in an unknown field, 10^4 deep", b"\x81\xa3xyz" + _DEEP),
    body("a map of 2^32 - 1", b"\xdf\xff\xff\xff\xff"),
    body("an array of 2^32 - 1", b"\xdd\xff\xff\xff\xff"),
    body("2^32 - 1 tags", b"\x81\xa4tags\xdd\xff\xff\xff\xff"),
    body("2^32 - 1 images", b"\x81\xa6images\xdd\xff\xff\xff\xff"),
    body("a text of 2^32 - 1", b"\x81\xa4time\xdb\xff\xff\xff\xff"),
    body("bytes of 2^32 - 1", b"\x81\xa6layout\xc6\xff\xff\xff\xff"),
    body("an extension of 2^32 - 1", b"\x81\xa4time\xc9\xff\xff\xff\xff\x01"),
    body("no UTF-8", b"\x81\xa4time\xa2\xff\xfe"),
    body("a name that is no UTF-8", b"\x81\xa2\xff\xfe\xa0"),
    body("the reserved byte", b"\xc1"),
    body("nothing but nil", b"\xc0" * 1000),
    body("30 000 000 tags of no letter", lambda: texts(30_000_000)),
    body("120 000 000 tags of no letter", lambda: texts(120_000_000)),
    body("a layout of 60 MiB", lambda: msgspec.msgpack.encode({"layout": bytes(60 << 20)})),
    *(field("time", each) for each in NAMES),
    *(field("hostname", each) for each in NAMES),
    *(field("version", each) for each in NAMES),
    *(harmless(f"tag {each[:30]!r}", lambda attacker, each=each: attacker.commit(tags=[each])) for each in NAMES),  # type: ignore[misc]
    *(image(f"volume {each[:30]!r}", volume=each) for each in NAMES),
    *(image(f"size {str(each)[:20]}", size=each) for each in NUMBERS if each < 1 << 64),
    *(image(f"chunks of {str(each)[:20]}", chunk_size=each) for each in NUMBERS if each < 1 << 64),
    *(image(f"used {str(each)[:20]}", used=each, told=0 <= each < 512) for each in NUMBERS if each < 1 << 64),
    *(image(f"stored {str(each)[:20]}", stored=each, told=each >= 0) for each in NUMBERS if each < 1 << 64),
    image("a page of 31 bytes", pages=[bytes(31)]),
    image("a page of 33 bytes", pages=[bytes(33)]),
    image("a page that is nowhere", pages=[bytes(range(32))]),
    image("no page", pages=[]),
    image("1000 pages", pages=[bytes(32)] * 1000),
    image("a digest of escapes", digest="\x1b[2J"),
    case("a sparse image of 250 TiB", pages(1_000_000)),
    case("a sparse image of 1 PiB", pages(4_000_000)),
    case("4096 images", with_images(4096)),
    case("4097 images", with_images(4097)),
    case("100 000 images", with_images(100_000)),
    case("two images of one name", lambda attacker: attacker.commit(images=attacker.body()["images"] * 2)),
    *(left_out(f"path {each[:30]!r}", path=each, refused=not 0 < len(each) <= 4096) for each in NAMES),
    *(left_out(f"{str(each)[:20]} bytes", bytes=each, refused=not 0 <= each < 1 << 63) for each in NUMBERS[:-2]),
    *(left_out(f"of volume {each[:30]!r}", volume=each) for each in NAMES),
    left_out("4096 paths of 4000 letters", 4096, refused=False, path="/" + "x" * 3999),
    left_out("4097 paths", 4097),
    left_out("1 000 000 paths", 1_000_000),
    case("a layout of nothing", lambda attacker: attacker.commit(layout=b"")),
    case("an unknown field", lambda attacker: attacker.commit(extra=1)),
    case("3000 copies of one entry", many_entries),
    case("says that it is its own ledger", chain(2)),
    case("says that a later one is its ledger", chain(3, 0)),
    case("snapshots that call one another a ledger", chain(1, 2, 3, 4)),
    case("says that the ledger is 2^63", chain(1 << 63)),
    case("is its own predecessor", lambda attacker: attacker.put_snapshot(squeeze(b"\x80"), previous="f" * 64)),
    case("a size of 2^32 - 1", lambda attacker: attacker.put_snapshot(squeeze(b"\x80"), size=(1 << 32) - 1)),
    case("a size of 0", lambda attacker: attacker.put_snapshot(squeeze(b"\x80"), size=0)),
    case("no body", lambda attacker: attacker.put_snapshot(b"")),
    case("a recipient's snapshot", lambda attacker: attacker.put_snapshot(squeeze(b"\x80"), signer=attacker.key.id)),
    *(
        case(f"number {number}", lambda attacker, number=number: attacker.put_snapshot(b"\0", number))  # type: ignore[misc]
        for number in (3, 1 << 32, (1 << 48) - 1)
    ),
    *(
        harmless(f"number {number}", lambda attacker, number=number: attacker.put_snapshot(b"\0", number))  # type: ignore[misc]
        for number in (0, 1 << 48, 1 << 63, (1 << 64) - 1)  # these are no names of entries
    ),
    entry("an object in the last place of all", (1 << 64) - 1),
    entry("an object in the last place that counts", (1 << 48) - 1),
    entry("an entry of nothing", 2, b""),
    entry("an entry of 64 MiB of zeros", 2, lambda: bytes(65 << 20)),
]
