"""The recovery kit: a recipient's private key on paper, typed or scanned back in years later.

Five lines of five groups. Each line carries 10 bytes and its own checksum, so that a slip of the pen is found
where it is. Letters and digits are Crockford's base 32: case does not matter, O reads as 0, I and L as 1.
Specification: docs/format/kit.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape

from remetal.errors import RefusedError
from remetal.repository.cipher import derive

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_VALUES = {**{letter: value for value, letter in enumerate(_ALPHABET)}, "O": 0, "I": 1, "L": 1}
_LINES = 5
_LINE_BYTES = 10
_VERSION = 1
_LINE = re.compile(r"\s*([1-9])\s*[.:)\]]?[ \t]+(\S.*)")
_HINT = "Compare it with the paper, letter by letter; each line is checked for itself."


@dataclass(frozen=True, slots=True)
class RecoveryKit:
    """What has to be kept on paper: the repository's id (32 hexadecimal digits), and a recipient's 32-byte seed."""

    repository_id: str
    recipient_id: str
    location: str
    created: str
    seed: bytes = field(repr=False)

    def lines(self) -> list[str]:
        """Return the five lines of the key."""
        payload = bytes([_VERSION, 0]) + bytes.fromhex(self.repository_id) + self.seed
        pieces = [payload[start : start + _LINE_BYTES] for start in range(0, len(payload), _LINE_BYTES)]
        return [_encode_line(number, piece) for number, piece in enumerate(pieces, start=1)]

    def text(self) -> str:
        """Return the kit as plain text, ready to print; `parse_kit` reads it back."""
        return "\n".join(
            [
                "REMETAL RECOVERY KIT",
                "",
                f"Repository  {self.location}",
                f"Id          {self.repository_id}",
                f"Key         {self.recipient_id}",
                f"Made        {self.created}",
                "",
                *self.lines(),
                "",
                "Whoever has these five lines and the repository can restore every machine in it.",
                "Without them and without the passphrase nobody can. Keep this paper in a safe place,",
                "away from the machines it is for.",
                "To use it, type the five lines into a file and give that to remetal as --kit-file FILE.",
                "",
            ]
        )

    def page(self) -> str:
        """Return the kit as one HTML page that needs nothing else and prints on one sheet, with a QR code."""
        import segno  # it takes its time to load, and few commands print a kit

        code = segno.make("\n".join(self.lines()), error="q", micro=False)
        return _PAGE.format(
            location=escape(self.location),
            repository=escape(self.repository_id),
            recipient=escape(self.recipient_id),
            created=escape(self.created),
            lines=escape("\n".join(self.lines())),
            code=code.svg_inline(border=4, omitsize=True),
        )


def parse_kit(text: str) -> tuple[str, bytes]:
    """Return repository id and seed from a kit's five lines; other lines may stand around them.

    Raises RefusedError that names the line with the error, or the lines that are missing.
    """
    found: dict[int, bytes] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        number = int(match[1])
        if number > _LINES:
            raise RefusedError(f"a recovery kit has {_LINES} lines, there is no line {number}", hint=_HINT)
        piece = _decode_line(number, match[2])
        if found.setdefault(number, piece) != piece:
            raise RefusedError(f"line {number} of the recovery kit is there twice, and differs", hint=_HINT)
    missing = [str(number) for number in range(1, _LINES + 1) if number not in found]
    if missing:
        raise RefusedError(
            f"the recovery kit lacks line {', '.join(missing)}",
            hint="Each of the five lines starts with its number and a space.",
        )
    payload = b"".join(found[number] for number in sorted(found))
    if payload[0] != _VERSION or payload[1] != 0:
        raise RefusedError("the recovery kit is of a newer kind", hint="Update remetal on this machine.")
    return payload[2:18].hex(), payload[18:]


def _encode_line(number: int, piece: bytes) -> str:
    value = int.from_bytes(piece, "big") << 20 | _checksum(number, piece)
    symbols = "".join(_ALPHABET[value >> shift & 31] for shift in range(95, -1, -5))
    return f"{number}  " + " ".join(symbols[start : start + 4] for start in range(0, 20, 4))


def _decode_line(number: int, text: str) -> bytes:
    symbols = re.sub(r"[\s-]", "", text).upper()
    strange = next((symbol for symbol in symbols if symbol not in _VALUES), None)
    if strange is not None:
        raise RefusedError(f"line {number} of the recovery kit has a {strange!r}, which no kit has", hint=_HINT)
    if len(symbols) != 20:
        raise RefusedError(
            f"line {number} of the recovery kit has {len(symbols)} letters and digits instead of 20", hint=_HINT
        )
    value = 0
    for symbol in symbols:
        value = value << 5 | _VALUES[symbol]
    piece = (value >> 20).to_bytes(_LINE_BYTES, "big")
    if value & 0xFFFFF != _checksum(number, piece):
        raise RefusedError(f"line {number} of the recovery kit has a typing error", hint=_HINT)
    return piece


def _checksum(number: int, piece: bytes) -> int:
    return int.from_bytes(derive("recovery kit line", bytes([number]) + piece, size=4), "big") >> 12


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>remetal recovery kit</title>
<style>
@page {{ size: A4; margin: 18mm; }}
body {{ font: 11pt/1.45 sans-serif; max-width: 174mm; margin: 10mm auto; color: #000; background: #fff; }}
h1 {{ font-size: 20pt; margin: 0 0 4mm; }}
table {{ border-collapse: collapse; margin: 0 0 6mm; }}
td {{ padding: 0 6mm 1mm 0; vertical-align: top; overflow-wrap: anywhere; }}
td:first-child {{ white-space: nowrap; }}
pre {{ font: bold 14pt/1.7 monospace; border: 0.4mm solid #000; padding: 3mm 5mm; margin: 0 0 6mm; }}
svg {{ width: 55mm; height: 55mm; float: right; margin: 0 0 4mm 6mm; }}
@media print {{ body {{ margin: 0; }} }}
</style>
</head>
<body>
{code}
<h1>remetal recovery kit</h1>
<table>
<tr><td>Repository</td><td>{location}</td></tr>
<tr><td>Id</td><td><code>{repository}</code></td></tr>
<tr><td>Key</td><td><code>{recipient}</code></td></tr>
<tr><td>Made</td><td>{created}</td></tr>
</table>
<p>Whoever has the five lines below and the repository can restore every machine in it. Without them and
without the passphrase nobody can. Keep this sheet in a safe place, away from the machines it is for.</p>
<pre>{lines}</pre>
<h2>When a machine is lost</h2>
<ol>
<li>Boot the new machine from the recovery medium and attach the repository.</li>
<li>Choose the recovery kit as the key. Scan the code, or type the five lines as they stand: the spaces and
the case of letters do not matter, and each line is checked for itself.</li>
<li>On a running system: write the five lines to a file and run
<code>remetal restore latest --repo LOCATION --kit-file FILE</code>.</li>
</ol>
</body>
</html>
"""
