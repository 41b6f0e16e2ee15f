"""Every fuzz target meets its corpus again, its seeds, and a short row of mutations that is the same in every run."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.run import CORPUS, keep, read_corpus, steps_of
from tests.fuzz.target import MEMORY, SECONDS, Target
from tests.fuzz.targets import TARGETS

PATIENCE = 0.5
"""Seconds of processor time for the mutations of one target."""
_NUMBERS = (
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\0\0\0\0\0\0\0\x80",
    b"\xff" * 8,
)
_WORDS = (b"../", b"\n", b'"', b"{", b"[", b"%s", b"\x1b[2J", b"\xc0\x80", b"=", b",", b"9" * 400)


def mutations(seeds: list[bytes], chance: random.Random) -> Iterator[bytes]:
    """Yield seeds with some bytes changed, put in, left out, or taken from another seed; without end."""
    while True:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 4, 8))):
            place = chance.randrange(len(data) + 1)
            piece = chance.choice((*_NUMBERS, *_WORDS, chance.randbytes(chance.randrange(1, 5))))
            match chance.randrange(5):
                case 0:
                    data[place : place + 1] = bytes([chance.randrange(256)])
                case 1:
                    data[place : place + len(piece)] = piece
                case 2:
                    data[place:place] = piece
                case 3:
                    del data[place : place + chance.choice((1, 2, 8, 64))]
                case _:
                    other = chance.choice(seeds)
                    start = chance.randrange(len(other) + 1)
                    data[place : place + 16] = other[start : start + 16]
        yield bytes(data)


def meet_in_time(target: Target, data: bytes) -> None:
    began = time.process_time()
    try:
        target.meet(data)
    except BaseException:
        print(f"{target.name} meets {data[:2000]!r}")
        raise
    assert time.process_time() - began < SECONDS, f"{target.name} took too long over {data[:2000]!r}"


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str) -> None:
    target = TARGETS[name]
    seeds = list(target.seeds())
    assert seeds, "there is no seed"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seeds += read_corpus(name)
    for seed in (*seeds, b"", bytes(4096), b"\xff" * 4096):
        meet_in_time(target, seed)
    chance = random.Random(name)
    until = time.process_time() + PATIENCE
    met = 0
    for data in mutations(seeds, chance):
        meet_in_time(target, data)
        met += 1
        if time.process_time() > until:
            break
    assert met > 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < MEMORY


def test_every_corpus_has_its_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= {f"{name}.txt" for name in TARGETS}


def test_what_reaches_something_new_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMETAL_CACHE", str(tmp_path))
    monkeypatch.setattr("tests.fuzz.run.CORPUS", tmp_path / "corpus")
    target = TARGETS["xfs-map"]
    (seed,) = target.seeds()
    found = tmp_path / "fuzz" / "xfs-map"
    found.mkdir(parents=True)
    for number, each in enumerate((seed, b"", seed.replace(b"= 20", b"= 2"), seed.replace(b"= 20", b"= 3"))):
        (found / str(number)).write_bytes(each)
    assert keep(target) == 2
    assert read_corpus("xfs-map") == [b"", seed.replace(b"= 20", b"= 2")]
    assert keep(target) == 0
    assert steps_of(target, b"") < steps_of(target, b"") | steps_of(target, seed)


def test_the_fuzzer_finds_nothing_in_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All targets, with atheris, which sees what each input reaches."""
    monkeypatch.setenv("REMETAL_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    argv = [sys.executable, "-m", "tests.fuzz.run", "--runs", "1000"]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {line.split(":")[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert runs.keys() == TARGETS.keys()
    assert min(runs.values()) >= 1000
    assert all(any((tmp_path / "fuzz" / name).iterdir()) for name in TARGETS)
