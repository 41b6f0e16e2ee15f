"""Capture and restore beside their peers, in one run, on the same volume: `make bench`.

Every line is the median of several rounds in which remetal and its peer take turns. remetal's times are those of
the whole command and include hashing, encryption, authentication and fsync; the peers encrypt nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.volume import find_volume
from remetal.image.extents import probe_used, total
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.units import GIB, MIB, format_bytes

REMETAL = Path(sys.executable).with_name("remetal")


@dataclass(frozen=True)
class Row:
    """One comparison: medians in seconds, their ratio, and the goal for the ratio."""

    work: str
    peer: str
    seconds: float
    peer_seconds: float
    goal: float

    @property
    def ratio(self) -> float:
        """remetal's time as a part of the peer's."""
        return self.seconds / self.peer_seconds


class Bench:
    """The folder, the volume and the commands of one run."""

    def __init__(self, folder: Path, volume: Path) -> None:
        self.folder = folder
        self.volume = volume
        self.secret = folder / "passphrase"
        self.secret.write_text("correct horse battery staple\n")
        self.repository = folder / "repository"
        self.peer_image = folder / "peer.zst"
        self.target = folder / "target.img"

    def fresh_repository(self) -> None:
        """Start from an empty repository and a machine that was never enrolled."""
        shutil.rmtree(self.repository, ignore_errors=True)
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        self.remetal("init", "--passphrase-file", str(self.secret))

    def capture(self) -> None:
        self.remetal("backup", "--disk", str(self.volume))

    def peer_capture(self) -> None:
        _shell(
            f"partclone.extfs -c -q -L {self.folder}/log -s {self.volume} -o - | zstd -q -f -1 -T0 -o {self.peer_image}"
        )

    def read_used(self) -> None:
        """Read the volume's used extents as dd would: the floor for a backup that stores nothing."""
        self._read(self.volume)

    def read_target(self) -> None:
        """Read the same of the target: the floor for a restore that writes nothing."""
        self._read(self.target)

    def _read(self, path: Path) -> None:
        span = Span(self.volume, 0, self.volume.stat().st_size)
        buffer = bytearray(4 * MIB)
        with path.open("rb", buffering=0) as file:
            for extent in probe_used(span, "ext4"):
                position = extent.start
                while position < extent.end:
                    position += os.preadv(file.fileno(), [memoryview(buffer)[: extent.end - position]], position)

    def forget(self) -> None:
        """Drop the volume and the target from the page cache, so that reading them means reading the disk."""
        for path in (self.volume, self.target):
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def blank_target(self) -> None:
        self.target.unlink(missing_ok=True)
        with self.target.open("wb") as file:
            file.truncate(self.volume.stat().st_size)

    def restore(self) -> None:
        self.remetal("restore", "latest", "--map", str(self.target), "--yes", "--passphrase-file", str(self.secret))

    def peer_restore(self) -> None:
        with attach_loop(Span(self.target, 0, self.target.stat().st_size), writable=True) as device:
            _shell(
                f"zstd -q -d -c {self.peer_image} | "
                f"partclone.restore -C -q -L {self.folder}/log -s - -o {device} && sync {device}"
            )

    def remetal(self, *words: str) -> None:
        environment = os.environ | {
            "REMETAL_REPO": str(self.repository),
            "REMETAL_STATE": str(self.folder / "state"),
        }
        subprocess.run([REMETAL, *words, "--quiet"], check=True, env=environment, stdout=subprocess.DEVNULL)


def _shell(line: str) -> None:
    subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _compare(
    work: str,
    peer: str,
    goal: float,
    rounds: int,
    ours: tuple[Callable[[], None], Callable[[], None]],
    theirs: tuple[Callable[[], None], Callable[[], None]],
) -> Row:
    """Time `ours` and `theirs` in turn; each is a preparation, which is not timed, and the work."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for (prepare, act), seconds in zip((ours, theirs), times, strict=True):
            prepare()
            began = time.perf_counter()
            act()
            seconds.append(time.perf_counter() - began)
        print(f"    {work}, round {number + 1}: {times[0][-1]:.2f} s, {peer} {times[1][-1]:.2f} s", flush=True)
    return Row(work, peer, statistics.median(times[0]), statistics.median(times[1]), goal)


def _nothing() -> None:
    """Prepare nothing."""


def measure(bench: Bench, rounds: int) -> list[Row]:
    """Return all comparisons."""
    capture = _compare(
        "full capture",
        "partclone | zstd -1 -T0",
        1.0,
        rounds,
        (bench.fresh_repository, bench.capture),
        (_nothing, bench.peer_capture),
    )
    again = _compare(
        "unchanged capture, cold",
        "reading the used blocks",
        1.15,
        rounds,
        (bench.forget, bench.capture),
        (bench.forget, bench.read_used),
    )
    restore = _compare(
        "restore to a blank disk file",
        "zstd -d | partclone",
        0.7,
        rounds,
        (bench.blank_target, bench.restore),
        (bench.blank_target, bench.peer_restore),
    )
    bench.blank_target()
    bench.restore()
    second = _compare(
        "restore over the same, cold",
        "reading the used blocks",
        1.2,
        rounds,
        (bench.forget, bench.restore),
        (bench.forget, bench.read_target),
    )
    return [capture, again, restore, second]


def main() -> None:
    """Run the comparisons, print the table, and keep it as JSON under out/bench/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--used", type=int, default=GIB, help="bytes of files in the volume")
    options = parser.parse_args()
    volume = find_volume(options.used)
    used = total(probe_used(Span(volume, 0, volume.stat().st_size), "ext4"))
    print(f"==> An ext4 volume with {format_bytes(used)} used, {os.cpu_count()} cores, {options.rounds} rounds")
    with TemporaryDirectory(prefix="remetal-bench-", dir=volume.parent) as folder:
        bench = Bench(Path(folder), volume)
        rows = measure(bench, options.rounds)
        sizes = [
            sum(f.stat().st_size for f in bench.repository.rglob("*") if f.is_file()),
            bench.peer_image.stat().st_size,
        ]
    layout = "{:30} {:>10} {:>10} {:>7} {:>6}  {}"
    print("\n" + layout.format("work", "remetal", "peer", "ratio", "goal", "peer"))
    for row in rows:
        times = (f"{row.seconds:.2f} s", f"{row.peer_seconds:.2f} s")
        print(layout.format(row.work, *times, f"{row.ratio:.2f}", f"{row.goal:.2f}", row.peer))
    stored = (format_bytes(sizes[0]), format_bytes(sizes[1]), f"{sizes[0] / sizes[1]:.2f}")
    print(layout.format("stored bytes", *stored, "1.00", "partclone | zstd -1 -T0"))
    out = Path("out/bench")
    out.mkdir(parents=True, exist_ok=True)
    record = {"used": used, "sizes": sizes, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
