"""What the hardware allows: reading, BLAKE3, zstd at level 1 and AES-GCM on all cores, and nothing else.

Each part is measured alone, on one core, on the very bytes that are captured. The limit is their sum, divided by the
number of cores: no program that does these four things can be faster.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.data import Volume
from remetal.image.extents import probe_used
from remetal.image.ranges import Extent
from remetal.system.blockdev import Span
from remetal.units import MIB

_CHUNK = 256 << 10
_SAMPLE = 512 * MIB


@dataclass(frozen=True)
class Parts:
    """Seconds of one core for each part, for all used bytes; `verify` is what remetal does besides."""

    used: int
    read: float
    blake3: float
    zstd: float
    aes: float
    verify: float

    @property
    def limit(self) -> float:
        """Seconds that the four parts take on all cores."""
        return (self.read + self.blake3 + self.zstd + self.aes) / (os.cpu_count() or 1)


def used_extents(volume: Volume) -> list[Extent]:
    """Return the used extents of a volume."""
    return list(probe_used(Span(volume.path, 0, volume.path.stat().st_size), volume.kind))


def read_used(path: Path, extents: list[Extent]) -> None:
    """Read extents of a file in order, 4 MiB at a time, as dd would."""
    buffer = memoryview(bytearray(4 * MIB))
    with path.open("rb", buffering=0) as file:
        for extent in extents:
            position = extent.start
            while position < extent.end:
                position += os.preadv(file.fileno(), [buffer[: extent.end - position]], position)


@cache
def measure_parts(volume: Volume) -> Parts:
    """Measure the parts on a sample of the volume that is spread over all of it, and scale them to its used bytes.

    A volume is measured once in a run.
    """
    extents = used_extents(volume)
    used = sum(each.size for each in extents)
    read = verify = hashing = packing = sealing = 0.0
    sampled = 0
    step = max(used // _SAMPLE, 1)
    codec = zstandard.ZstdCompressor(level=1, write_checksum=False, write_content_size=True)
    decoder = zstandard.ZstdDecompressor()
    cipher, key = AESGCM(bytes(32)), bytes(32)
    buffer = memoryview(bytearray(_CHUNK))
    with volume.path.open("rb", buffering=0) as file:
        for number, (start, size) in enumerate(_chunks(extents)):
            if number % step:
                continue
            began = time.thread_time()
            os.preadv(file.fileno(), [buffer[:size]], start)
            marks = [time.thread_time()]
            blake3(buffer[:size], key=key).digest()
            marks.append(time.thread_time())
            packed = codec.compress(buffer[:size])
            marks.append(time.thread_time())
            sealed = cipher.encrypt(bytes(12), packed, b"")
            blake3(sealed).digest()
            marks.append(time.thread_time())
            blake3(decoder.decompress(cipher.decrypt(bytes(12), sealed, b"")), key=key).digest()
            marks.append(time.thread_time())
            read += marks[0] - began
            hashing += marks[1] - marks[0]
            packing += marks[2] - marks[1]
            sealing += marks[3] - marks[2]
            verify += marks[4] - marks[3]
            sampled += size
    scale = used / sampled
    return Parts(used, read * scale, hashing * scale, packing * scale, sealing * scale, verify * scale)


def _chunks(extents: list[Extent]) -> list[tuple[int, int]]:
    return [
        (start, min(_CHUNK, extent.end - start))
        for extent in extents
        for start in range(extent.start, extent.end, _CHUNK)
    ]
