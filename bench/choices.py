"""What chunk size, compression level, pack size, read-ahead and threads cost and bring: what the defaults rest on."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import zstandard

from bench.data import Volume
from bench.limit import used_extents
from bench.timing import Contender, median, time_in_turn
from bench.tools import Remetal, size_of
from remetal.image.capture import READ_AHEAD
from remetal.repository.config import DEFAULT_CHUNK_SIZE
from remetal.repository.packs import PACK_SIZE
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


@dataclass(frozen=True)
class Setting:
    """A full capture with another constant than ours: seconds, and bytes that the repository takes."""

    what: str
    value: int
    default: bool
    seconds: float
    stored: int


def measure_settings(volume: Volume, folder: Path, rounds: int) -> list[Setting]:
    """Capture the volume with each value of each setting, all in turn."""
    cores = os.cpu_count() or 1
    ways: dict[tuple[str, int], Remetal] = {}

    def add(what: str, value: int, *constants: str, chunk_size: int = 0) -> None:
        ways[what, value] = Remetal(folder / f"{what}-{value}", constants=constants, chunk_size=chunk_size)

    for size in CHUNKS:
        add("bytes of a chunk", size, chunk_size=size)
    for size in (PACK_SIZE // 2, PACK_SIZE, 3 * PACK_SIZE // 2):
        add("bytes of a pack", size, f"remetal.repository.packs.PACK_SIZE={size}")
    for depth in (1, READ_AHEAD, 2 * READ_AHEAD):
        add("batches read ahead", depth, f"remetal.image.capture.READ_AHEAD={depth}")
    for threads in sorted({1, cores, cores + 1, 2 * cores}):
        add("threads that encode", threads, f"remetal.repository.session.probe_processors={threads}")
    contenders = [
        Contender(f"{what} {value}", way.fresh, partial(way.capture, volume.path))
        for (what, value), way in ways.items()
    ]
    times = time_in_turn(contenders, rounds, "settings")
    sizes = {key: size_of(way.repository) for key, way in ways.items()}
    ours = {
        "bytes of a chunk": DEFAULT_CHUNK_SIZE,
        "bytes of a pack": PACK_SIZE,
        "batches read ahead": READ_AHEAD,
        "threads that encode": cores,
    }
    return [
        Setting(what, value, value == ours[what], median(times[f"{what} {value}"]), sizes[what, value])
        for what, value in ways
    ]


def _read_sample(volume: Volume) -> list[memoryview]:
    runs = [start for extent in used_extents(volume) for start in range(extent.start, extent.end - _RUN + 1, _RUN)]
    step = max(len(runs) * _RUN // _SAMPLE, 1)
    with volume.path.open("rb") as file:
        sample = []
        for start in runs[::step]:
            file.seek(start)
            sample.append(memoryview(file.read(_RUN)))
    return sample
