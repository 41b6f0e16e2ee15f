"""The firmware's boot entries: UEFI variables in efivarfs, read and written as the specification lays them out.

`efibootmgr` is not asked: its output differs from version to version, and it needs the kernel to have scanned the
disk. Source: UEFI specification 2.10, 3.1.3 (load options), 3.3 (globally defined variables), 10.3 (device
paths); the kernel's Documentation/filesystems/efivarfs.rst.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from remetal.errors import RemetalError

EFIVARS = Path("/sys/firmware/efi/efivars")

_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_VARIABLE = re.compile(rf"Boot([0-9A-F]{{4}})-{_GLOBAL}", re.IGNORECASE)
_KEPT_AT_RUNTIME = struct.pack("<I", 7)  # non-volatile, boot-service access, run-time access
_ACTIVE = 1
_NODE = struct.Struct("<BBH")
_HARD_DRIVE = struct.Struct("<IQQ16sBB")
_MEDIA, _MEDIA_HARD_DRIVE, _MEDIA_FILE = 4, 1, 4
_END = _NODE.pack(0x7F, 0xFF, 4)
_MBR_FORMAT, _GPT_FORMAT = 1, 2


class NvramError(RemetalError):
    """The firmware refused a boot entry: it is full or read-only."""


@dataclass(frozen=True, slots=True)
class Place:
    """A partition as the firmware names it: number, first sector and size in sectors, and signature.

    `signature` is the partition's GUID (GPT) or the disk's 32-bit signature (`mbr`), lower-case.
    """

    number: int
    start: int
    size: int
    signature: str
    mbr: bool = False


@dataclass(frozen=True, slots=True)
class BootEntry:
    """One Boot#### variable. `place` and `loader` are None where the entry is of another kind (network, shell, …).

    `extra` is what the entry hands to its loader.
    """

    label: str
    place: Place | None
    loader: str | None
    active: bool = True
    extra: bytes = b""


def parse_entry(data: bytes) -> BootEntry:
    """Parse an EFI_LOAD_OPTION. Raises ValueError if it is cut short or malformed."""
    if len(data) < 6:
        raise ValueError("too short for a load option")
    attributes, length = struct.unpack_from("<IH", data)
    end = 6
    while data[end : end + 2] != b"\0\0":
        if end + 2 > len(data):
            raise ValueError("the description does not end")
        end += 2
    paths, extra = data[end + 2 : end + 2 + length], data[end + 2 + length :]
    if len(paths) != length:
        raise ValueError("the device path is cut short")
    place: Place | None = None
    loader = ""
    for kind, subtype, body in _parse_nodes(paths):
        if (kind, subtype) == (_MEDIA, _MEDIA_HARD_DRIVE) and len(body) == _HARD_DRIVE.size:
            place = _parse_hard_drive(body)
        elif (kind, subtype) == (_MEDIA, _MEDIA_FILE):
            loader += body.decode("utf-16-le", "replace").split("\0")[0]
    label = data[6:end].decode("utf-16-le", "replace")
    return BootEntry(label, place, loader or None, bool(attributes & _ACTIVE), extra)


def encode_entry(entry: BootEntry) -> bytes:
    """Return an EFI_LOAD_OPTION for a file on a partition, in the short form that starts at the partition."""
    if entry.place is None or entry.loader is None:
        raise ValueError("only entries for a file on a partition can be written")
    place, path = entry.place, f"{entry.loader}\0".encode("utf-16-le")
    signature = bytes.fromhex(place.signature)[::-1].ljust(16, b"\0") if place.mbr else _guid_bytes(place.signature)
    form = _MBR_FORMAT if place.mbr else _GPT_FORMAT
    nodes = (
        _NODE.pack(_MEDIA, _MEDIA_HARD_DRIVE, _NODE.size + _HARD_DRIVE.size)
        + _HARD_DRIVE.pack(place.number, place.start, place.size, signature, form, form)
        + _NODE.pack(_MEDIA, _MEDIA_FILE, _NODE.size + len(path))
        + path
        + _END
    )
    head = struct.pack("<IH", _ACTIVE if entry.active else 0, len(nodes))
    return head + f"{entry.label}\0".encode("utf-16-le") + nodes + entry.extra


def probe_entries(folder: Path = EFIVARS) -> dict[int, BootEntry]:
    """Return the firmware's boot entries by number; malformed ones are left out, their numbers stay taken."""
    entries = {}
    for number in _numbers(folder):
        try:
            entries[number] = parse_entry(_variable(folder, f"Boot{number:04X}").read_bytes()[4:])
        except (OSError, ValueError):
            continue
    return entries


def probe_order(folder: Path = EFIVARS) -> tuple[int, ...]:
    """Return the boot entries' numbers in the order in which the firmware tries them."""
    try:
        data = _variable(folder, "BootOrder").read_bytes()[4:]
    except OSError:
        return ()
    return struct.unpack(f"<{len(data) // 2}H", data[: len(data) // 2 * 2])


def apply_entries(wanted: Sequence[BootEntry], folder: Path = EFIVARS) -> str:
    """See to it that the firmware boots these entries first, in this order; return what was done, or "" for nothing.

    An entry for the same loader on the same partition is used, and corrected if it is stale; it never gets a twin.
    Raises NvramError if the firmware does not take one.
    """
    numbers: list[int] = []
    done: list[str] = []
    for entry in wanted:
        number, what = _apply_entry(entry, folder)
        if number not in numbers:
            numbers.append(number)
        done += what
    order = probe_order(folder)
    if order[: len(numbers)] != tuple(numbers):
        first = (*numbers, *(each for each in order if each not in numbers))
        _write(folder, "BootOrder", struct.pack(f"<{len(first)}H", *first))
        names = ", ".join(f"Boot{number:04X}" for number in numbers)
        done.append(f"{names} {'is' if len(numbers) == 1 else 'are'} first in the boot order")
    return ", ".join(done)


def _apply_entry(entry: BootEntry, folder: Path) -> tuple[int, list[str]]:
    """See to it that there is such an entry; return its number, and what was done."""
    entries, order = probe_entries(folder), probe_order(folder)
    number = next((each for each in (*order, *sorted(entries)) if _is_same(entries.get(each), entry)), None)
    if number is None:
        taken = set(_numbers(folder))
        number = next(each for each in range(0x10000) if each not in taken)
        _write(folder, f"Boot{number:04X}", encode_entry(entry))
        return number, [f"the entry Boot{number:04X} '{entry.label}' was made"]
    standing = entries[number]
    wanted = replace(standing, place=entry.place, active=True)
    if wanted == standing:
        return number, []
    _write(folder, f"Boot{number:04X}", encode_entry(wanted))
    return number, [f"the entry Boot{number:04X} '{standing.label}' was corrected"]


def _is_same(standing: BootEntry | None, entry: BootEntry) -> bool:
    if standing is None or standing.place is None or standing.loader is None or entry.place is None:
        return False
    same_place = (standing.place.signature, standing.place.mbr) == (entry.place.signature, entry.place.mbr)
    if entry.place.mbr and standing.place.number != entry.place.number:
        return False
    return same_place and standing.loader.lower() == (entry.loader or "").lower()


def _parse_nodes(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at + _NODE.size <= len(data):
        kind, subtype, length = _NODE.unpack_from(data, at)
        if length < _NODE.size or at + length > len(data):
            raise ValueError("a device path node is malformed")
        if kind == 0x7F:
            return
        yield kind, subtype, data[at + _NODE.size : at + length]
        at += length


def _parse_hard_drive(body: bytes) -> Place | None:
    number, start, size, signature, form, _ = _HARD_DRIVE.unpack(body)
    if form == _GPT_FORMAT:
        return Place(number, start, size, str(uuid.UUID(bytes_le=signature)))
    if form == _MBR_FORMAT:
        return Place(number, start, size, signature[3::-1].hex(), mbr=True)
    return None


def _guid_bytes(guid: str) -> bytes:
    return uuid.UUID(guid).bytes_le


def _numbers(folder: Path) -> list[int]:
    try:
        names = [each.name for each in folder.iterdir()]
    except OSError:
        return []
    return sorted(int(match[1], 16) for name in names if (match := _VARIABLE.fullmatch(name)))


def _variable(folder: Path, name: str) -> Path:
    return folder / f"{name}-{_GLOBAL}"


def _write(folder: Path, name: str, data: bytes) -> None:
    """Write a variable in one write, as efivarfs demands."""
    try:
        fd = os.open(_variable(folder, name), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, _KEPT_AT_RUNTIME + data)
        finally:
            os.close(fd)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        raise NvramError(
            f"the firmware does not take the boot variable {name}: {os.strerror(error.errno or 0)}",
            hint="Its memory is full: remove old entries in its setup."
            if full
            else "Mount efivarfs read-write, or add the entry in the firmware's setup.",
        ) from error
