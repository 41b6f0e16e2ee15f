"""Hardware addresses of network cards, in all the ways in which configuration files write them. Pure.

Ethernet has 6 bytes, InfiniBand 20. Sources: systemd.network(5), udev(7), ifcfg(5), nm-settings-keyfile(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from remetal.layout.model import Nic

_BYTE = r"[0-9A-Fa-f]{2}"
_PAIRS = rf"{_BYTE}(?:([:-]){_BYTE})(?:\1{_BYTE}){{4}}(?:(?:\1{_BYTE}){{14}})?"
_DOTTED = r"[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}"
_DECIMAL = r"(?:[0-9]{1,3};){5}[0-9]{1,3};?"
_IN_TEXT = re.compile(rf"(?<![0-9A-Za-z:.-])(?:{_PAIRS}|{_DOTTED})(?![0-9A-Za-z:.-])")
_WHOLE = re.compile(rf"{_PAIRS}|{_DOTTED}|{_DECIMAL}")


def parse_address(text: str) -> str:
    """Return an address as `52:54:00:12:34:56`; empty for anything else, and for addresses of no card."""
    if _WHOLE.fullmatch(text) is None:
        return ""
    if ";" in text:
        numbers = [int(each) for each in text.rstrip(";").split(";")]
        digits = "".join(f"{each:02x}" for each in numbers) if max(numbers) < 256 else ""
    else:
        digits = re.sub(r"[^0-9a-f]", "", text.lower())
    known = digits.strip("0") and digits.strip("f")
    return ":".join(digits[at : at + 2] for at in range(0, len(digits), 2)) if known else ""


def find_addresses(text: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, str]]:
    """Yield where addresses stand in a part of a text, and what they are as `parse_address` returns them."""
    for match in _IN_TEXT.finditer(text, start, len(text) if end is None else end):
        address = parse_address(match[0])
        if address:
            yield *match.span(), address


def spell_address(address: str, like: str) -> str:
    """Return an address as another one is written: its letters, what stands between them, or decimal numbers."""
    if ";" in like:
        return ";".join(str(int(each, 16)) for each in address.split(":")) + (";" if like.endswith(";") else "")
    text = address.upper() if like.upper() == like and like.lower() != like else address
    if "." in like:
        digits = text.replace(":", "")
        return ".".join(digits[at : at + 4] for at in range(0, len(digits), 4))
    return text.replace(":", "-" if "-" in like else ":")


def address_of(nic: Nic) -> str:
    """Return the address that a card is known by, checked: what is recorded may be anything. Empty if it has none."""
    return parse_address(nic.permanent) or parse_address(nic.mac)
