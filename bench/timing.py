"""Timing whole processes in turn, so that what the machine does besides hits all of them alike."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Timing:
    """What one run took: seconds on the clock, seconds of processor, and the largest process in bytes."""

    seconds: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Contender:
    """Somebody who does a piece of work: `prepare` is not timed, `work` is."""

    name: str
    prepare: Callable[[], None]
    work: Callable[[], None]


def run(words: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> None:
    """Run a program that prints nothing worth reading. Raises CalledProcessError."""
    environment = {**os.environ, **(env or {})}
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pipe(line: str) -> None:
    """Run a pipeline of the shell; it fails if any part does."""
    run(["bash", "-o", "pipefail", "-c", line])


def time_in_turn(contenders: Sequence[Contender], rounds: int, title: str) -> dict[str, list[Timing]]:
    """Let everybody work `rounds` times, in turn; each works in a process of its own."""
    times: dict[str, list[Timing]] = {each.name: [] for each in contenders}
    for number in range(rounds):
        for each in contenders:
            each.prepare()
            timing = _time(each.work)
            times[each.name].append(timing)
            print(f"    {title}, round {number + 1}: {each.name} {timing.seconds:.2f} s", flush=True)
    return times


def median(timings: Sequence[Timing]) -> float:
    """Return the median of the seconds."""
    return statistics.median(each.seconds for each in timings)


def _time(work: Callable[[], None]) -> Timing:
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - began
    if status != 0:
        raise RuntimeError("the work that was timed has failed; run its command by hand to see why")
    return Timing(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)
