"""Which kernel an image is: the version that uname(1) shows, from the image's own header.

Source: Linux Documentation/arch/x86/boot.rst (`kernel_version`, protocol 2.00 and later).
"""

from __future__ import annotations

_MAGIC_AT, _MAGIC = 0x202, b"HdrS"
_POINTER_AT = 0x20E
_BASE = 0x200
HEAD = 0x8200
"""So many bytes from the start of an image are enough."""
_LONGEST = 256


def parse_version(head: bytes) -> str | None:
    """Return the version of an x86 kernel image (bzImage) from its first bytes; None if it is none, or does not say."""
    if head[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] != _MAGIC:
        return None
    at = int.from_bytes(head[_POINTER_AT : _POINTER_AT + 2], "little") + _BASE
    text = head[at : at + _LONGEST].split(b"\0")[0].decode("ascii", "replace")
    words = text.split()
    return words[0] if words and text.isprintable() else None
