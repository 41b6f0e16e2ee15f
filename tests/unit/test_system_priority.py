"""Less processor and disk time for a process, and normal priority again for what must not wait."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOOK = """
import os, subprocess, threading
from concurrent.futures import ThreadPoolExecutor
from remetal.system.priority import normal_priority, set_priority

def look():
    number = str(threading.get_native_id())
    disk = subprocess.run(["ionice", "-p", number], check=True, capture_output=True, text=True).stdout.strip()
    print(os.getpriority(os.PRIO_PROCESS, 0), disk, sep=", ")

{0}
look()
pool = ThreadPoolExecutor(1)
pool.submit(int).result()
with normal_priority():
    look()
    pool.submit(look).result()
pool.submit(look).result()
look()
thread = threading.Thread(target=look)
thread.start()
thread.join()
"""


def looks(change: str) -> list[str]:
    """Return what threads see of their priorities: this one and another before, during and after normal priority."""
    argv = [sys.executable, "-c", LOOK.format(change)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("change", "low"),
    [
        ("set_priority(15, 'idle')", "15, idle"),
        ("set_priority(7, 'low')", "7, best-effort: prio 7"),
    ],
)
def test_less_is_inherited_and_taken_back_for_a_while(change: str, low: str) -> None:
    before, during, other, other_after, after, thread = looks(change)
    assert [before, other_after, after, thread] == [low] * 4
    assert during == other == looks("")[0]


def test_nothing_changes_where_nothing_is_asked_for() -> None:
    assert len(set(looks("set_priority(None, None)"))) == 1
