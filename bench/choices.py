"""What chunk size and compression level cost and bring: the measurements behind the defaults."""

from __future__ import annotations

import time
from dataclasses import dataclass

import zstandard

from bench.data import Volume
from bench.limit import used_extents
from remetal.units import KIB, MIB

CHUNKS = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
LEVELS = (-3, -1, 1, 2, 3)
_SAMPLE = 256 * MIB
_RUN = 4 * MIB
_BLOCK = 4096


@dataclass(frozen=True)
class Choice:
    """Bytes per chunk, zstd's level, MB/s of one core compressing, stored bytes of each byte, and of each byte changed.

    `rewritten` is the part of all chunks that a backup stores again after 1 % of the 4 KiB blocks, scattered, changed.
    """

    chunk: int
    level: int
    speed: float
    stored: float
    rewritten: float


def measure_choices(volume: Volume) -> list[Choice]:
    """Compress a sample that is spread over the volume in every way."""
    sample = _read_sample(volume)
    choices = []
    for chunk in CHUNKS:
        for level in LEVELS:
            codec = zstandard.ZstdCompressor(level=level, write_checksum=False)
            began = time.thread_time()
            stored = sum(
                min(len(codec.compress(run[start : start + chunk])), chunk)
                for run in sample
                for start in range(0, len(run), chunk)
            )
            seconds = time.thread_time() - began
            total = sum(len(run) for run in sample)
            rewritten = 1 - 0.99 ** (chunk // _BLOCK)
            choices.append(Choice(chunk, level, total / seconds / 1e6, stored / total, rewritten))
    return choices


def _read_sample(volume: Volume) -> list[memoryview]:
    runs = [start for extent in used_extents(volume) for start in range(extent.start, extent.end - _RUN + 1, _RUN)]
    step = max(len(runs) * _RUN // _SAMPLE, 1)
    with volume.path.open("rb") as file:
        sample = []
        for start in runs[::step]:
            file.seek(start)
            sample.append(memoryview(file.read(_RUN)))
    return sample
