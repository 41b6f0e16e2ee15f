"""Whether two disks are one, seen at another time, behind another controller or through another cable. Pure.

Sources: SPC-4 (NAA and EUI-64 designators), SAT-4 (serial numbers of ATA disks), scsi_id(8), and what udev's rules
name disks by.
"""

from __future__ import annotations

import re
from typing import Protocol

_UDEV_PREFIX = re.compile(r"\A(?:dm-uuid-)?(?:mpath-|scsi-|wwn-|nvme-)+")
_TYPED = re.compile(r"\A(?:naa\.|eui\.|uuid\.|0x|3(?=[2356][0-9a-f]{15}(?:[0-9a-f]{16})?$)|2(?=[0-9a-f]{16}$))")
_PLACEHOLDER = re.compile(
    r"(.)\1*|qm\d{5}|0123456789(?:ab|abcdef)?|123456789(?:0|01|012|abc|abcdef)?|none|n/a|unknown|\(null\)"
)
_HEX_TEXT = re.compile(r"(?:[2-7][0-9a-f]){8,32}")
_SEVERAL_PATHS = frozenset({"scsi", "nvme"})


class Identified(Protocol):
    """What has an identity: a disk of a snapshot, a disk of this machine, a target."""

    @property
    def size(self) -> int: ...
    @property
    def model(self) -> str: ...
    @property
    def serial(self) -> str: ...
    @property
    def wwn(self) -> str: ...
    @property
    def bus(self) -> str: ...


def plain_wwn(text: str) -> str:
    """Return a world-wide name without what differs between those who print it; empty if it tells nothing.

    `naa.5000C500A1B2C3D4`, `0x5000c500a1b2c3d4`, `wwn-0x5000c500a1b2c3d4` and scsi_id's `35000c500a1b2c3d4` are one.
    """
    plain = "".join(text.lower().split())
    plain = _TYPED.sub("", _UDEV_PREFIX.sub("", plain))
    digits = plain.replace("-", "")
    return plain if len(set(digits[1:])) > 1 else ""


def plain_serial(text: str) -> str:
    """Return a serial number without what controllers add to it; empty if it tells nothing.

    ATA pads serial numbers to 20 characters, left or right. Some USB bridges (Western Digital's) print the disk's
    own serial number as the hexadecimal digits of its characters. What manufacturers and hypervisors put where no
    number is (`0`, `QM00001`, `0123456789ABCDEF`) tells nothing.
    """
    plain = "".join(text.lower().replace("\0", " ").split())
    if _HEX_TEXT.fullmatch(plain):
        inside = bytes.fromhex(plain).decode("ascii")
        if inside.replace("-", "").isalnum():
            plain = inside.lower()
    return "" if _PLACEHOLDER.fullmatch(plain) else plain


def is_same_disk_by_wwn(one: Identified, other: Identified) -> bool:
    """Whether the world-wide names say that these are one disk.

    Cheap disks share one: where the same bus shows two other serial numbers, they are two.
    """
    wwn = plain_wwn(one.wwn)
    if not wwn or wwn != plain_wwn(other.wwn):
        return False
    serials = {plain_serial(one.serial), plain_serial(other.serial)} - {""}
    return len(serials) < 2 or one.bus != other.bus


def is_same_disk_by_serial(one: Identified, other: Identified) -> bool:
    """Whether the serial numbers say that these are one disk: equal, and so is the size, or else model and bus.

    A serial number is unique for its manufacturer only; a virtual disk keeps its own when it is made larger. A
    world-wide name that is another one speaks against it, unless the bus, and so who answers for the disk, is another.
    """
    serial = plain_serial(one.serial)
    if not serial or serial != plain_serial(other.serial):
        return False
    names = {plain_wwn(one.wwn), plain_wwn(other.wwn)} - {""}
    if len(names) > 1 and one.bus == other.bus:
        return False
    kinds = [(_plain_model(each.model), each.bus) for each in (one, other)]
    return one.size == other.size or kinds[0] == kinds[1] != ("", "")


def are_paths(one: Identified, other: Identified) -> bool:
    """Whether two devices lead to one disk: world-wide name, size and bus are the same, serial numbers do not differ.

    Only SCSI (Fibre Channel, SAS, iSCSI) and NVMe have disks with several paths.
    """
    known = one.bus in _SEVERAL_PATHS and one.bus == other.bus and one.size == other.size
    return known and is_same_disk_by_wwn(one, other)


def _plain_model(text: str) -> str:
    return "".join(text.lower().split())
