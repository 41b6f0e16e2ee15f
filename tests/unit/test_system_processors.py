"""How many threads work at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from remetal.image.capture import BATCH, BUFFERS, READ_AHEAD, batch_size
from remetal.image.restore import group_size
from remetal.system.processors import MOST, probe_processors
from remetal.units import KIB, MIB


def test_only_those_count_that_this_process_may_use() -> None:
    code = "from remetal.system.processors import probe_processors; print(probe_processors())"
    one = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]
    assert subprocess.run([*one, sys.executable, "-c", code], check=True, capture_output=True).stdout == b"1\n"


def test_more_than_the_most_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1000)))
    assert probe_processors() == MOST


@pytest.mark.parametrize("workers", range(1, MOST + 1))
@pytest.mark.parametrize("chunk", [16 * KIB, 256 * KIB, 4 * MIB])
def test_all_buffers_together_are_bounded(workers: int, chunk: int) -> None:
    size = batch_size(workers + 1, chunk)
    assert size == chunk or (size % chunk == 0 and (workers + 1 + READ_AHEAD) * size <= BUFFERS)
    assert chunk <= size <= BATCH
    assert group_size(workers, chunk) % chunk == 0 < group_size(workers, chunk)
