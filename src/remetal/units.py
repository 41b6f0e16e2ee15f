"""Sizes and times, as people read and type them."""

from __future__ import annotations

import re
from fractions import Fraction

from remetal.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_BINARY = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": 1 << 50}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([smhdw]?)\s*", re.IGNORECASE | re.ASCII)
_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([kmgtp]?)(?:i?b)?\s*", re.IGNORECASE | re.ASCII)


def align_down(value: int, alignment: int) -> int:
    """Return the largest multiple of `alignment` that is not above `value`."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


def format_bytes(count: int) -> str:
    """Return a byte count with three significant digits and a binary unit: `1.46 GiB`.

    Counts below 1 KiB are exact: `512 bytes`.
    """
    if abs(count) < KIB:
        return f"{count} byte{'' if abs(count) == 1 else 's'}"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        value /= 1024
        if abs(value) < 999.5 or unit == "EiB":
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("the loop returns at the largest unit")


def parse_bytes(text: str) -> int:
    """Return the byte count of `500`, `64K`, `1.5 GiB`; units are binary, as in the output.

    Raises UsageError for anything else.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"'{text}' is not a size", hint="Write a number and a unit, such as 512M or 1.5GiB.")
    return int(Fraction(match[1]) * _BINARY[match[2].lower()])


def format_duration(seconds: float) -> str:
    """Return a duration as `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min` or `6 d 04 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def parse_duration(text: str) -> float:
    """Return the seconds of `90`, `45m`, `12h`, `7d`, `2w`. Raises UsageError for anything else."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f"'{text}' is not a duration", hint="Write a number and a unit, such as 12h or 7d.")
    return float(Fraction(match[1]) * _SECONDS[match[2].lower()])


def format_rate(count: int, seconds: float) -> str:
    """Return bytes per second, in a binary unit: `310 MiB/s`."""
    return f"{format_bytes(int(count / seconds))}/s" if seconds > 0 else "-"
