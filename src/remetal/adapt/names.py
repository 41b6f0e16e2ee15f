"""The forms in which configuration files name a device: lasting names, and names made of hardware. Pure.

Sources: fstab(5), blkid(8), udev's 60-persistent-storage.rules, Linux Documentation/admin-guide/devices.txt.
"""

from __future__ import annotations

import re

_OCTAL = re.compile(rb"\\([0-7]{3})")
_HEX = re.compile(rb"\\x([0-9A-Fa-f]{2})")
_BY_NAME = re.compile(r"/dev/disk/by-(uuid|label|partuuid|partlabel|id|path)/(.+)")
_TAGS = {"UUID", "LABEL", "PARTUUID", "PARTLABEL"}
_KERNEL_NAME = re.compile(
    r"/dev/(?:(?:[shv]d|xvd|ubd)[a-z]+\d*|(?:nvme\d+n|mmcblk|pmem|md|dm-|loop|sr|bcache|nbd)\d+(?:p\d+)?)"
)
_LASTING_IDS = ("dm-name-", "dm-uuid-", "md-name-", "md-uuid-", "lvm-pv-uuid-")


def parse_tag(spec: str) -> tuple[str, str] | None:
    """Return a lasting name's kind and value: ("uuid", …), ("label", …), ("partuuid", …), ("partlabel", …).

    `UUID=…` and `/dev/disk/by-uuid/…` are one; None for every other name.
    """
    if match := _BY_NAME.fullmatch(spec):
        if match[1] in {"id", "path"}:
            return None
        return match[1], decode(match[2], _HEX, 16)
    name, equals, value = spec.partition("=")
    if equals and name in _TAGS:
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        return name.lower(), value[1:-1] if quoted else value
    return None


def parse_udev_link(spec: str) -> tuple[str, str] | None:
    """Return kind (`id`, `path`, `uuid`, …) and name of a link in /dev/disk, or None."""
    match = _BY_NAME.fullmatch(spec)
    return (match[1], match[2]) if match else None


def is_hardware_name(spec: str) -> bool:
    """Whether a name may mean another device tomorrow: one that the kernel counts, or one made of a disk or a slot."""
    link = parse_udev_link(spec)
    if link is not None:
        return link[0] == "path" or (link[0] == "id" and not link[1].startswith(_LASTING_IDS))
    return _KERNEL_NAME.fullmatch(spec) is not None


def as_path(name: str) -> str:
    """Return `UUID=…` and its like as the path that udev makes of it; every other name as it is."""
    tag = parse_tag(name)
    return name if tag is None or name.startswith("/") else f"/dev/disk/by-{tag[0]}/{tag[1]}"


def unescape(field: str) -> str:
    """Return a field of fstab or crypttab without its octal escapes."""
    return decode(field, _OCTAL, 8)


def decode(field: str, escape: re.Pattern[bytes], base: int) -> str:
    """Replace the escapes by the bytes that they stand for; several may make up one character."""
    plain = escape.sub(lambda match: bytes([int(match[1], base) & 0xFF]), field.encode("utf-8", "surrogateescape"))
    return plain.decode("utf-8", "surrogateescape")
