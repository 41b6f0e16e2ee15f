"""The pieces of work that are compared, one function each; a goal is a limit for remetal's part of a peer's figure."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.data import Volume, find_mixed, find_noise, find_root
from bench.limit import measure_parts, read_used, used_extents
from bench.memory import measure_memory
from bench.timing import Contender, Timing, median, pipe, run, time_in_turn
from bench.tools import REMETAL, Borg, Fsarchiver, Partclone, Remetal, Restic, drop_caches, forget, size_of
from remetal.units import MIB

_CHANGED = 0.01
_BLOCK = 4096


@dataclass(frozen=True)
class Finding:
    """One line of the table: two medians or sizes, and the goal for their ratio.

    It is remetal's figure as a part of the peer's; where the peer is the limit (`of_limit`), of which a large part is
    to be reached, it is the other way round. `at_least` tells that a large ratio is the better one.
    """

    work: str
    data: str
    peer: str
    ours: float
    theirs: float
    goal: float
    unit: str = "s"
    at_least: bool = False
    of_limit: bool = False

    @property
    def ratio(self) -> float:
        """The ratio, to two places: what is finer changes from run to run."""
        return round(self.theirs / self.ours if self.of_limit else self.ours / self.theirs, 2)

    @property
    def reached(self) -> bool:
        """Whether the ratio is as good as it should be."""
        return self.ratio >= self.goal if self.at_least else self.ratio <= self.goal


def capture(folder: Path, rounds: int) -> list[Finding]:
    """Capture into a new repository, of every volume; the peers that need minutes see the first one only."""
    findings = []
    for number, volume in enumerate((find_root("ext4"), find_root("xfs"), find_mixed())):
        remetal, partclone = Remetal(folder), Partclone(folder)
        contenders = [
            Contender(remetal.name, remetal.fresh, partial(remetal.capture, volume.path)),
            Contender(partclone.name, _nothing, partial(partclone.capture, volume)),
        ]
        goals = {partclone.name: 0.40}
        if number == 0:
            restic, borg, fsarchiver = Restic(folder), Borg(folder), Fsarchiver(folder)
            contenders += [
                Contender(restic.name, restic.fresh, partial(restic.capture_files, volume)),
                Contender(borg.name, borg.fresh, partial(borg.capture_files, volume)),
                Contender(fsarchiver.name, _nothing, partial(fsarchiver.capture, volume)),
            ]
            goals |= {restic.name: 0.15, borg.name: 0.20, fsarchiver.name: 0.50}
        times = time_in_turn(contenders, rounds, f"capture of {volume.name}")
        findings += _against(times, "full capture", volume.name, goals)
        findings.append(_part_of_limit(volume, median(times[remetal.name])))
        whole, parity, peer = (
            size_of(each) / MIB for each in (remetal.repository, remetal.repository / "parity", partclone.image)
        )
        findings += [
            Finding(work, volume.name, partclone.name, size, peer, 1.0, unit="MiB")
            for work, size in (("repository size", whole), ("the same without parity", whole - parity))
        ]
        peak = max(each.peak for each in times[remetal.name]) / MIB
        findings.append(Finding("memory of a capture", volume.name, "256 MiB", peak, 256, 1.0, unit="MiB"))
    return findings


def _part_of_limit(volume: Volume, ours: float) -> Finding:
    limit = measure_parts(volume).limit
    peer = "read, BLAKE3, zstd -1, AES on all cores"
    return Finding("part of the limit", volume.name, peer, ours, limit, 0.85, at_least=True, of_limit=True)


def again(folder: Path, rounds: int) -> list[Finding]:
    """Capture what has not changed, from a cold cache."""
    volume = find_root("ext4")
    remetal = Remetal(folder)
    remetal.fresh()
    remetal.capture(volume.path)
    extents = used_extents(volume)
    times = time_in_turn(
        [
            Contender(remetal.name, lambda: forget(volume.path), lambda: remetal.capture(volume.path)),
            Contender("reading", lambda: forget(volume.path), lambda: read_used(volume.path, extents)),
        ],
        rounds,
        "unchanged capture",
    )
    return _against(times, "unchanged capture", volume.name, {"reading": 1.15})


def changed(folder: Path, rounds: int) -> list[Finding]:
    """Capture a disk file of which 1 % of the used blocks, scattered, have changed since the last time."""
    volume = find_root("ext4")
    image = folder / "changing.img"
    shutil.copyfile(volume.path, image)
    noise = random.Random(1)
    places = [at for each in used_extents(volume) for at in range(each.start, each.end - _BLOCK + 1, _BLOCK)]

    def change() -> None:
        with image.open("r+b") as file:
            for at in noise.sample(places, int(len(places) * _CHANGED)):
                file.seek(at)
                file.write(noise.randbytes(_BLOCK))

    remetal, restic, borg = Remetal(folder), Restic(folder), Borg(folder)
    for each in (remetal, restic, borg):
        each.fresh()
    remetal.capture(image)
    restic.capture_image(image)
    borg.capture_image(image)
    folders = {remetal.name: remetal.repository, restic.name: restic.repository, borg.name: borg.repository}
    before = {name: size_of(folder) for name, folder in folders.items()}
    contenders = [
        Contender(remetal.name, change, lambda: remetal.capture(image)),
        Contender(restic.name, _nothing, lambda: restic.capture_image(image)),
        Contender(borg.name, _nothing, lambda: borg.capture_image(image)),
    ]
    times = time_in_turn(contenders, rounds, "1 % changed")
    findings = _against(times, "1 % changed", volume.name, {restic.name: 0.10, borg.name: 0.10})
    grown = {name: (size_of(folder) - before[name]) / MIB / rounds for name, folder in folders.items()}
    findings += [
        Finding("stored for 1 % changed", volume.name, name, grown[remetal.name], grown[name], 3.0, unit="MiB")
        for name in (restic.name, borg.name)
    ]
    return findings


def restore(folder: Path, rounds: int) -> list[Finding]:
    """Bring a volume to a blank disk file, and over one that is equal already, from a cold cache."""
    volume = find_root("ext4")
    remetal, partclone, restic = Remetal(folder), Partclone(folder), Restic(folder)
    target, files = folder / "target.img", folder / "files"
    remetal.fresh()
    remetal.capture(volume.path)
    partclone.capture(volume)
    restic.fresh()
    restic.capture_files(volume)

    def blank() -> None:
        target.unlink(missing_ok=True)
        with target.open("wb") as file:
            file.truncate(volume.path.stat().st_size)
        drop_caches()

    def clear() -> None:
        shutil.rmtree(files, ignore_errors=True)
        drop_caches()

    times = time_in_turn(
        [
            Contender(restic.name, clear, lambda: restic.restore(files)),
            Contender(partclone.name, blank, lambda: partclone.restore(target)),
            Contender(remetal.name, blank, lambda: remetal.restore(target)),
        ],
        rounds,
        "restore",
    )
    findings = _against(times, "restore to a blank disk", volume.name, {partclone.name: 0.70, restic.name: 0.15})
    extents = used_extents(volume)
    times = time_in_turn(
        [
            Contender(remetal.name, lambda: forget(target), lambda: remetal.restore(target)),
            Contender("reading", lambda: forget(target), lambda: read_used(target, extents)),
        ],
        rounds,
        "restore over the same",
    )
    return findings + _against(times, "restore over the same", volume.name, {"reading": 1.20})


def cores(folder: Path, rounds: int) -> list[Finding]:
    """Capture on one core and on all: the throughput of one core, as a part of that of all, is what they share."""
    volume = find_root("ext4")
    remetal = Remetal(folder)
    count = os.cpu_count() or 1
    steps = sorted({1, *(1 << power for power in range(1, count.bit_length())), count} & set(range(1, count + 1)))

    def on(number: int) -> Callable[[], None]:
        def work() -> None:
            os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:number])
            remetal.capture(volume.path)

        return work

    times = time_in_turn(
        [Contender(f"{number} of {count} cores", remetal.fresh, on(number)) for number in steps], rounds, "cores"
    )
    used = sum(each.size for each in used_extents(volume)) / MIB
    alone = used / median(times[f"1 of {count} cores"])
    return [
        Finding("capture by cores", volume.name, name, used / median(each), alone, 0.9 * number, "MiB/s", at_least=True)
        for number, (name, each) in zip(steps, times.items(), strict=True)
    ]


def dense(folder: Path, rounds: int) -> list[Finding]:
    """Capture what cannot be compressed, beside copying it."""
    remetal, copy, noise = Remetal(folder), folder / "copy", find_noise()

    def clean() -> None:
        copy.unlink(missing_ok=True)
        forget(noise)

    def fresh() -> None:
        remetal.fresh()
        forget(noise)

    times = time_in_turn(
        [
            Contender(remetal.name, fresh, lambda: remetal.capture(noise)),
            Contender("copying", clean, lambda: pipe(f"dd if={noise} of={copy} bs=4M conv=fsync")),
        ],
        rounds,
        "what is encrypted already",
    )
    return _against(times, "encrypted input", "noise", {"copying": 1.0})


def start(folder: Path, rounds: int) -> list[Finding]:
    """Start the command."""
    remetal = Remetal(folder)
    remetal.fresh()
    remetal.capture(find_noise())
    times = time_in_turn(
        [
            Contender("--version", _nothing, lambda: run([REMETAL, "--version"])),
            Contender("snapshots", _nothing, remetal.snapshots),
        ],
        max(rounds, 5),
        "start",
    )
    return [
        Finding(f"remetal {name}", "", "the limit", median(times[name]), limit, 1.0)
        for name, limit in (("--version", 0.15), ("snapshots", 0.40))
    ]


def memory(folder: Path, rounds: int) -> list[Finding]:
    """Carry a volume of 2 TiB, once: what each command takes at most, and what is computed for 100 TiB."""
    record = measure_memory()
    sizes = {(row["work"], "2 TiB, 200 GiB used"): row["resident"] for row in record["rows"]}
    sizes |= {(work, "100 TiB, computed"): sum(parts.values()) for work, parts in record["bound"].items()}
    return [
        Finding(f"memory: {work}", data, "256 MiB", size / MIB, record["goal"] / MIB, 1.0, unit="MiB")
        for (work, data), size in sizes.items()
    ]


WORKS: dict[str, Callable[[Path, int], list[Finding]]] = {
    "capture": capture,
    "again": again,
    "changed": changed,
    "restore": restore,
    "cores": cores,
    "dense": dense,
    "start": start,
    "memory": memory,
}


def _against(times: dict[str, list[Timing]], work: str, data: str, goals: dict[str, float]) -> list[Finding]:
    ours = median(times["remetal"])
    return [Finding(work, data, peer, ours, median(times[peer]), goal) for peer, goal in goals.items()]


def _nothing() -> None:
    """Prepare nothing."""
