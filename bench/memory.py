"""How much memory remetal takes for a large volume: the last work of `make bench`, or `python -m bench.memory`.

A sparse volume of 2 TiB holds an ext4 with 200 GiB in use: files that are allocated, and of which every chunk has one
block that is like no other. So all chunks differ and all have to be read, hashed, stored and found, yet the disk that
this runs on needs a twentieth of that. The commands are the real ones; their greatest resident size, and that of what
they start, is what the kernel tells when they have ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.bound import GOAL, Case, bound
from bench.resident import run_resident
from lab.cache import cache_folder
from remetal.repository.config import DEFAULT_CHUNK_SIZE
from remetal.repository.packs import ENTRY, PACK_SIZE, Contents
from remetal.repository.table import ChunkTable
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import GIB, KIB, TIB, align_up, format_bytes

BLOCK = 4 * KIB
CHANGED = 100
"""One chunk in so many is spoilt before the restore, which has to bring it back."""


@dataclass(frozen=True)
class Row:
    """One command: seconds, and bytes of its greatest resident size."""

    work: str
    seconds: float
    resident: int


@contextmanager
def disposable_folder(size: int) -> Iterator[Path]:
    """Yield a folder in a file system of its own, of `size` bytes, in a file that is one piece.

    A sparse file of a million pieces takes long to delete where the disk is told of each piece that it is free.
    """
    with TemporaryDirectory(prefix="remetal-bench-", dir=cache_folder()) as place:
        disk = Path(place) / "disk.img"
        with disk.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        subprocess.run(["mkfs.ext4", "-q", "-E", "nodiscard", disk], check=True)
        with attach_loop(Span(disk, 0, size), writable=True) as device, mounted(device) as folder:
            yield folder


def build_volume(path: Path, size: int, used: int) -> list[int]:
    """Make the volume and return where the blocks are that make its chunks differ."""
    with path.open("wb") as file:
        file.truncate(size)
    # One inode for 4 MiB: tables of inodes would else take more of the volume than the files do.
    subprocess.run(["mkfs.ext4", "-q", "-T", "largefile4", "-E", "nodiscard", path], check=True)
    places: list[int] = []
    with attach_loop(Span(path, 0, size), writable=True) as device, mounted(device) as folder:
        for number in range(used // GIB):
            part = folder / f"part-{number}"
            fd = os.open(part, os.O_CREAT | os.O_WRONLY, 0o600)
            os.posix_fallocate(fd, 0, GIB)
            os.fsync(fd)
            os.close(fd)
            places += _chunks_of(part)
    with path.open("r+b") as file:
        for place in places:
            os.pwrite(file.fileno(), os.urandom(BLOCK), place)
        os.fsync(file.fileno())
    return places


def _chunks_of(file: Path) -> Iterator[int]:
    """Yield the places on the volume where a chunk begins that lies in this file as a whole."""
    text = subprocess.run(["filefrag", "-v", "-b1", file], check=True, capture_output=True, text=True).stdout
    for start, end in re.findall(r"^ *\d+: +\d+\.\. *\d+: +(\d+)\.\. *(\d+):", text, re.MULTILINE):
        yield from range(
            align_up(int(start), DEFAULT_CHUNK_SIZE), int(end) + 1 - DEFAULT_CHUNK_SIZE, DEFAULT_CHUNK_SIZE
        )


def measure(work: str, folder: Path, *words: str) -> Row:
    """Run a command of remetal's to its end."""
    environment = os.environ | {
        "REMETAL_REPO": str(folder / "repository"),
        "REMETAL_STATE": str(folder / "state"),
        "TMPDIR": str(folder),
    }
    began = time.monotonic()
    usage = run_resident([Path(sys.executable).with_name("remetal"), *words, "--quiet"], environment)
    if usage.returncode:
        sys.exit(f"remetal {' '.join(words)} ended with {usage.returncode}")
    return _told(Row(work, time.monotonic() - began, usage.resident))


def _told(row: Row) -> Row:
    print(f"    {row.work}: {format_bytes(row.resident)}, {row.seconds:.0f} s", flush=True)
    return row


def measure_commands(folder: Path, size: int, used: int) -> tuple[list[Row], int]:
    """Return a row for each command, and how many chunks the volume has that are like no other."""
    volume, secret = folder / "volume.img", folder / "passphrase"
    secret.write_text("correct horse battery staple\n")
    key = ("--passphrase-file", str(secret))
    places = build_volume(volume, size, used)
    measure("init", folder, "init", *key)
    rows = [
        measure("full capture", folder, "backup", "--disk", str(volume)),
        measure("unchanged capture", folder, "backup", "--disk", str(volume)),
        measure("check", folder, "check", *key),
        measure("check that reads all data", folder, "check", "--read-data", *key),
    ]
    with volume.open("r+b") as file:
        for place in places[::CHANGED]:
            os.pwrite(file.fileno(), bytes(BLOCK), place)
    with _as_disk(volume) as disk:
        rows.append(measure("restore over what is there", folder, "restore", "latest", "--map", disk, "--yes", *key))
    rows.append(measure("forget", folder, "forget", "--keep-last", "1", *key))
    rows.append(measure("prune", folder, "prune", *key))
    return rows, len(places)


@contextmanager
def _as_disk(volume: Path) -> Iterator[str]:
    """Yield a block device over the volume: a disk file would have to have room for all of its 200 GiB."""
    found = subprocess.run(["losetup", "--find", "--show", volume], check=True, capture_output=True, text=True)
    try:
        yield found.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", found.stdout.strip()], check=True)


def measure_index(chunks: int) -> Row:
    """Learn of so many chunks in a process of its own, and look for some of them."""
    began = time.monotonic()
    usage = run_resident([sys.executable, "-m", "bench.memory", "--learn", str(chunks)])
    if usage.returncode:
        sys.exit("the index could not be built")
    return _told(Row(f"index of {chunks:,} chunks", time.monotonic() - began, usage.resident))


def learn(chunks: int) -> None:
    """Fill a table as loading an index does, 16 packs at a time, and look for every thousandth chunk."""
    table, random = ChunkTable(), np.random.default_rng(1)
    per_pack = PACK_SIZE // DEFAULT_CHUNK_SIZE
    wanted: list[bytes] = []
    for _ in range(chunks // (16 * per_pack)):
        packs: list[Contents] = []
        for _ in range(16):
            rows = np.zeros(per_pack, ENTRY)
            rows["id"] = np.frombuffer(random.bytes(32 * per_pack), np.uint8).reshape(-1, 32)
            rows["word"], rows["plain"] = DEFAULT_CHUNK_SIZE // 2, DEFAULT_CHUNK_SIZE
            packs.append(Contents(random.bytes(32), PACK_SIZE, 1244, rows))
        table.add(packs)
        wanted.append(packs[-1].entries["id"][0].tobytes())
    table.settle()
    assert -1 not in table.packs_of(wanted), "the table lacks what it was told"


def measure_memory(size: int = 2 * TIB, used: int = 200 * GIB, chunks: int = 20_000_000) -> dict[str, Any]:
    """Run every command over a volume of `size` bytes and keep what they took under out/bench/; half an hour or more.

    `chunks` are those of an index that is built by itself. Returns the record: greatest resident sizes in bytes, and
    what is computed for 100 TiB.
    """
    print(f"==> An ext4 of {format_bytes(size)} with {format_bytes(used)} used, {os.cpu_count()} cores", flush=True)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with disposable_folder(used // 25 + 2 * GIB) as folder:
        rows, different = measure_commands(folder, size, used)
    rows.append(measure_index(chunks))
    record = {
        "size": size,
        "used": used,
        "chunks": different,
        "goal": GOAL,
        "rows": [asdict(row) for row in rows],
        "bound": bound(Case()),
    }
    out = Path("out/bench")
    out.mkdir(parents=True, exist_ok=True)
    (out / "memory.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2 * TIB, help="bytes of the volume")
    parser.add_argument("--used", type=int, default=200 * GIB, help="bytes of it that are in use")
    parser.add_argument("--chunks", type=int, default=20_000_000, help="chunks in the index that is built by itself")
    parser.add_argument("--learn", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.learn:
        learn(options.learn)
        return
    record = measure_memory(options.size, options.used, options.chunks)
    layout = "{:34} {:>10} {:>8} {:>9}"
    print("\n" + layout.format("work", "resident", "goal", "time"))
    for row in record["rows"]:
        print(layout.format(row["work"], format_bytes(row["resident"]), format_bytes(GOAL), f"{row['seconds']:.0f} s"))
    for work, parts in record["bound"].items():
        total = sum(parts.values())
        print(layout.format(f"{work}, 100 TiB, computed", format_bytes(total), format_bytes(GOAL), ""))
    worst = max(row["resident"] for row in record["rows"])
    if worst > GOAL:
        sys.exit(f"{format_bytes(worst)} are more than {format_bytes(GOAL)}")


if __name__ == "__main__":
    main()
