"""QEMU's screen dumps as PNG files. Pure.

Sources: ppm(5), and the PNG specification (W3C), chunks IHDR, IDAT and IEND.
"""

from __future__ import annotations

import re
import struct
import zlib

_HEADER = re.compile(rb"P6\s+(\d+)\s+(\d+)\s+255\s")


def encode_png(ppm: bytes) -> bytes:
    """Return a binary PPM image (P6, 8 bits a channel) as PNG. Raises ValueError for anything else."""
    header = _HEADER.match(ppm)
    if header is None:
        raise ValueError("not a PPM image of 8 bits a channel")
    width, height = int(header[1]), int(header[2])
    stride = 3 * width
    pixels = ppm[header.end() :]
    if not width or not height or len(pixels) != stride * height:
        raise ValueError(f"a PPM image of {width} x {height} pixels has {len(pixels)} bytes")
    rows = b"".join(b"\0" + pixels[row : row + stride] for row in range(0, len(pixels), stride))
    shape = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (_chunk(b"IHDR", shape), _chunk(b"IDAT", zlib.compress(rows, 9)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
