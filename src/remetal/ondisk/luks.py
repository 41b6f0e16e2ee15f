"""The headers of LUKS1 and LUKS2 containers: what they hold, and how much of the device they take.

Sources: "LUKS On-Disk Format Specification" 1.2.3; "LUKS2 On-Disk Format Specification" 1.1.1 (both big-endian).
Nothing here needs a passphrase, and nothing here reads key material.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from remetal.ondisk.regions import BadStructureError, Read
from remetal.units import align_up

_MAGIC = b"LUKS\xba\xbe"
_SECOND_MAGIC = b"SKUL\xba\xbe"
_REENCRYPTING_MAGIC = b"LUKS\xde\xad"  # what cryptsetup-reencrypt leaves in LUKS1 while it works
_SECTOR = 512
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

_HEADER_1 = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT_1 = struct.Struct(">II32sII")
_SLOTS_1 = 8
_SIZE_1 = _HEADER_1.size + _SLOTS_1 * _SLOT_1.size
_ACTIVE, _INACTIVE = 0x00AC71F3, 0x0000DEAD
_MAX_KEY_SIZE = 512
_MAX_STRIPES = 1 << 16

_HEADER_2 = struct.Struct(">6sHQQ48s32s64s40s48sQ")
_BINARY_SIZE = 4096
_CHECKSUM_AT, _CHECKSUM_SIZE = 448, 64
_CHECKSUMS = {"sha256", "sha384", "sha512"}
_COPY_SIZES = tuple(0x4000 << bit for bit in range(9))
"""How large one of the two copies, its JSON included, may be: the second one lies there, behind the first."""
_SECTOR_SIZES = {512, 1024, 2048, 4096}
_MAX_NUMBER = 31


@dataclass(frozen=True, slots=True)
class Keyslot:
    """A key slot in use. `type` is luks1, luks2 or reencrypt, `kdf` pbkdf2, argon2i, argon2id or empty.

    `priority` as cryptsetup counts: 0 is asked only by number, 1 is normal, 2 is asked first.
    """

    number: int
    type: str
    kdf: str
    priority: int = 1


@dataclass(frozen=True, slots=True)
class Token:
    """How something other than a person opens a key slot: `type` such as systemd-tpm2 or clevis."""

    number: int
    type: str


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """A container's header. Sizes in bytes.

    `cipher` as cryptsetup writes it: aes-xts-plain64. `key_size` is the volume key's; 0 if no key slot tells it.
    `header_size` is where the payload begins: before it lie the headers and all key material. `payload_size` is None
    if the payload reaches to the end of the device. `damaged_copy`: one of the two copies of a LUKS2 header is damaged
    or was left behind by an update that did not end; the other was read. `problems` are short phrases for what it has
    and remetal cannot open and make again as one header and one payload behind it.
    """

    version: int
    uuid: str
    label: str
    subsystem: str
    cipher: str
    sector_size: int
    key_size: int
    header_size: int
    payload_size: int | None
    keyslots: tuple[Keyslot, ...]
    tokens: tuple[Token, ...] = ()
    damaged_copy: bool = False
    problems: tuple[str, ...] = ()


_Text = Annotated[str, Meta(max_length=256)]
_Number = Annotated[str, Meta(pattern=r"\A(0|[1-9][0-9]{0,17})\Z")]  # LUKS2 keeps 64-bit numbers as strings
_Small = Annotated[int, Meta(ge=0, le=1 << 31)]


class _Area(Struct):
    offset: _Number
    size: _Number


class _Kdf(Struct):
    type: _Text


class _Slot(Struct):
    type: _Text
    key_size: Annotated[int, Meta(ge=0, le=_MAX_KEY_SIZE)]
    area: _Area
    kdf: _Kdf | None = None
    priority: _Small = 1


class _Typed(Struct):
    type: _Text


class _Segment(Struct):
    type: _Text
    offset: _Number
    size: _Text
    encryption: _Text = ""
    sector_size: _Small = _SECTOR
    integrity: _Typed | None = None
    flags: tuple[_Text, ...] = ()


class _Digest(Struct):
    keyslots: tuple[_Text, ...]
    segments: tuple[_Text, ...]


class _Requirements(Struct):
    mandatory: tuple[_Text, ...] = ()


class _Config(Struct):
    json_size: _Number
    keyslots_size: _Number
    requirements: _Requirements | None = None


class _Metadata(Struct):
    keyslots: dict[_Number, _Slot]
    tokens: dict[_Number, _Typed]
    segments: dict[_Number, _Segment]
    digests: dict[_Number, _Digest]
    config: _Config


@dataclass(frozen=True, slots=True)
class _Copy:
    """One of the two copies of a LUKS2 header, checked."""

    size: int
    sequence: int
    label: str
    uuid: str
    subsystem: str
    metadata: _Metadata


def parse_luks(read: Read, size: int) -> LuksHeader:
    """Parse the header of the LUKS container on a device of `size` bytes.

    Of the two copies of a LUKS2 header the newer sound one counts. The second copy is found even where the first one
    was overwritten: so ask blkid first whether something else begins at byte 0. Raises BadStructureError if there is no
    sound header.
    """
    if size < _SIZE_1:
        raise BadStructureError("the device is too small for a LUKS header")
    magic, version = struct.unpack(">6sH", read(0, 8))
    if magic == _REENCRYPTING_MAGIC:
        raise BadStructureError("the LUKS container has a reencryption that did not end")
    if magic == _MAGIC and version == 1:
        return _parse_first_version(read, size)
    copy, damaged = _parse_copies(read, size)
    return _describe(copy, damaged, size)


def _parse_first_version(read: Read, size: int) -> LuksHeader:
    data = read(0, _SIZE_1)
    _, _, name, mode, _, payload, key_size, _, _, _, identity = _HEADER_1.unpack_from(data)
    keyslots = []
    end = align_up(_SIZE_1, _SECTOR)
    for number in range(_SLOTS_1):
        state, _, _, offset, stripes = _SLOT_1.unpack_from(data, _HEADER_1.size + number * _SLOT_1.size)
        if state not in {_ACTIVE, _INACTIVE} or not 0 < stripes <= _MAX_STRIPES:
            raise BadStructureError(f"key slot {number} of the LUKS header is damaged")
        if state == _ACTIVE:
            keyslots.append(Keyslot(number, "luks1", "pbkdf2"))
        end = max(end, offset * _SECTOR + align_up(key_size * stripes, _SECTOR))
    if not 0 < key_size <= _MAX_KEY_SIZE or not _text(name):
        raise BadStructureError("the LUKS header is damaged")
    header_size, problems = _place_payload(payload * _SECTOR, end, size)
    return LuksHeader(
        version=1,
        uuid=_parse_uuid(identity),
        label="",
        subsystem="",
        cipher=f"{_text(name)}-{_text(mode)}" if _text(mode) else _text(name),
        sector_size=_SECTOR,
        key_size=key_size,
        header_size=header_size,
        payload_size=None,
        keyslots=tuple(keyslots),
        problems=tuple(problems),
    )


def _place_payload(payload: int, end: int, size: int) -> tuple[int, list[str]]:
    """Return the size of the header and what is wrong with a payload that begins at byte `payload`.

    `end` is where the key material ends, `size` the device's. A header that was made for another device names a
    place there, mostly 0.
    """
    if end > size:
        raise BadStructureError("the LUKS header says that its key material goes beyond the end of the device")
    if payload < end:
        return end, ["a payload on another device (detached header)"]
    if payload >= size:
        return end, ["no payload behind its header (a detached header or a backup of one)"]
    return payload, []


def _parse_copies(read: Read, size: int) -> tuple[_Copy, bool]:
    """Return the copy of the LUKS2 header that counts, and whether the other one is damaged or older."""
    copies, reasons = [], []
    try:
        first = _parse_copy(read, size, 0)
    except BadStructureError as error:
        reasons.append(error.message)
        places = _COPY_SIZES
    else:
        copies.append(first)
        places = (first.size,)
    for place in places:
        try:
            copies.append(_parse_copy(read, size, place))
            break
        except BadStructureError as error:
            reasons.append(error.message)
    if not copies:
        raise BadStructureError(reasons[0])
    damaged = len(copies) == 1 or copies[0].sequence != copies[1].sequence
    return max(copies, key=lambda copy: copy.sequence), damaged  # the first one of equals


def _parse_copy(read: Read, size: int, place: int) -> _Copy:
    """Parse and check the copy at byte `place`: 0 for the first one, else the second."""
    if place + _BINARY_SIZE > size:
        raise BadStructureError("the device is too small for a LUKS header")
    binary = read(place, _BINARY_SIZE)
    magic, version, copy_size, sequence, label, checksum, _, identity, subsystem, offset = _HEADER_2.unpack_from(binary)
    if magic != (_SECOND_MAGIC if place else _MAGIC):
        raise BadStructureError("there is no LUKS header")
    if version != 2:
        raise BadStructureError(f"the LUKS header is of the unknown version {version}")
    if copy_size not in _COPY_SIZES or place not in {0, copy_size} or offset != place or place + copy_size > size:
        raise BadStructureError("the LUKS header is damaged: it gives an impossible size or place")
    json = read(place + _BINARY_SIZE, copy_size - _BINARY_SIZE)
    if _text(checksum) not in _CHECKSUMS:
        raise BadStructureError("the LUKS header has a checksum of an unknown kind")
    digest = hashlib.new(_text(checksum), binary[:_CHECKSUM_AT] + bytes(_CHECKSUM_SIZE))
    digest.update(binary[_CHECKSUM_AT + _CHECKSUM_SIZE :])
    digest.update(json)
    if not binary.startswith(digest.digest(), _CHECKSUM_AT):
        raise BadStructureError("the LUKS header is damaged: its checksum is wrong")
    metadata = _parse_json(json.split(b"\0", 1)[0])
    return _Copy(copy_size, sequence, _text(label), _parse_uuid(identity), _text(subsystem), metadata)


def _parse_json(text: bytes) -> _Metadata:
    try:
        metadata = msgspec.json.decode(text, type=_Metadata)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # msgspec bounds the depth by the last
        raise BadStructureError(f"the JSON part of the LUKS header is damaged: {str(error)[:200]}") from error
    if any(int(number) > _MAX_NUMBER for number in (*metadata.keyslots, *metadata.tokens)):
        raise BadStructureError("the LUKS header has a key slot or token of an impossible number")
    for segment in metadata.segments.values():
        sound = segment.size == "dynamic" or re.fullmatch("[1-9][0-9]{0,17}", segment.size)
        if not sound or int(segment.offset) % _SECTOR or segment.sector_size not in _SECTOR_SIZES:
            raise BadStructureError("the LUKS header describes an impossible payload")
    return metadata


def _describe(copy: _Copy, damaged: bool, size: int) -> LuksHeader:
    metadata = copy.metadata
    # While a container is encrypted anew, segments with these flags note what was and what will be.
    segments = {
        number: each
        for number, each in sorted(metadata.segments.items(), key=lambda item: int(item[1].offset))
        if not any(flag.startswith("backup-") for flag in each.flags)
    }
    if not segments:
        raise BadStructureError("the LUKS header describes no payload")
    number, segment = next(iter(segments.items()))
    end = 2 * copy.size + int(metadata.config.keyslots_size)
    for slot in metadata.keyslots.values():
        if not 2 * copy.size <= int(slot.area.offset) <= end - int(slot.area.size):
            raise BadStructureError("the LUKS header says that its key material lies elsewhere")
    header_size, problems = _place_payload(int(segment.offset), end, size)
    payload_size = None if segment.size == "dynamic" else int(segment.size)
    if not problems and header_size + (payload_size or 0) > size:
        problems.append("a payload that goes beyond the end of the device")
    return LuksHeader(
        version=2,
        uuid=copy.uuid,
        label=copy.label,
        subsystem=copy.subsystem,
        cipher=segment.encryption,
        sector_size=segment.sector_size,
        key_size=_find_key_size(metadata, number),
        header_size=header_size,
        payload_size=payload_size,
        keyslots=tuple(_describe_slots(metadata)),
        tokens=tuple(sorted((Token(int(n), each.type) for n, each in metadata.tokens.items()), key=lambda t: t.number)),
        damaged_copy=damaged,
        problems=(*problems, *_find_problems(metadata, tuple(segments.values()))),
    )


def _describe_slots(metadata: _Metadata) -> Iterator[Keyslot]:
    for number, slot in sorted(metadata.keyslots.items(), key=lambda item: int(item[0])):
        yield Keyslot(int(number), slot.type, slot.kdf.type if slot.kdf else "", slot.priority)


def _find_key_size(metadata: _Metadata, segment: str) -> int:
    """Return the size of the keys in the slots whose digest belongs to the segment; other slots hold other keys."""
    for digest in metadata.digests.values():
        if segment in digest.segments:
            for number in digest.keyslots:
                if number in metadata.keyslots and metadata.keyslots[number].type == "luks2":
                    return metadata.keyslots[number].key_size
    return 0


def _find_problems(metadata: _Metadata, segments: tuple[_Segment, ...]) -> Iterator[str]:
    """Yield what remetal cannot carry, in short phrases."""
    required = metadata.config.requirements.mandatory if metadata.config.requirements else ()
    reencrypting = any(slot.type == "reencrypt" for slot in metadata.keyslots.values())
    if reencrypting or any("reencrypt" in each for each in required):
        yield "a reencryption that did not end"
    elif len(segments) > 1:
        yield f"a payload of {len(segments)} segments"
    opal = any(each.type.startswith("hw-opal") for each in segments) or "opal" in required
    if opal:
        yield "a drive that encrypts it by itself (OPAL)"
    if any(each.integrity is not None for each in segments):
        yield "integrity tags (dm-integrity)"
    for kind in sorted({each.type for each in segments if not each.type.startswith("hw-opal")} - {"crypt"}):
        if not reencrypting:
            yield f"a payload of the unknown kind {kind!r}"
    for each in required:
        if "reencrypt" not in each and each != "opal":
            yield f"the unknown requirement {each!r}"


def _parse_uuid(field: bytes) -> str:
    text = _text(field)
    if not _UUID.fullmatch(text):
        raise BadStructureError("the LUKS header is damaged: it has no UUID")
    return text


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")
