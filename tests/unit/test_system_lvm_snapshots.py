"""What becomes of LVM snapshots where LVM does not do what it is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from remetal.errors import UnavailableError
from remetal.events import Event, Warn
from remetal.system import lvm_snapshots
from remetal.system.lvm_snapshots import LvmSnapshot, Origin, remove_left_behind
from remetal.units import GIB, MIB

ORIGIN = Origin("vg", "data-1", 10 * GIB, "linear", "public", 8 * GIB, 4 * MIB)


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An LVM that never ends, whatever it is asked; what it was asked, and its process, stand in files."""
    program = tmp_path / "lvm"
    program.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/asked\necho $$ >> {tmp_path}/pids\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(lvm_snapshots, "_PATIENCE", 0.3)
    yield tmp_path
    for pid in (tmp_path / "pids").read_text().split():
        if Path("/proc", pid, "comm").exists():
            os.kill(int(pid), signal.SIGKILL)


def test_one_that_is_never_taken_is_not_waited_for_for_ever(stuck: Path) -> None:
    snapshot = LvmSnapshot(ORIGIN, GIB)
    with pytest.raises(UnavailableError, match=r"no LVM snapshot of vg/data-1 was taken within 0\.1 seconds"):
        snapshot.take(0.1)
    events: list[Event] = []
    began = time.monotonic()
    snapshot.drop(events.append)
    assert time.monotonic() - began < 10
    (told,) = events
    assert isinstance(told, Warn)
    assert told.text.startswith(f"LVM is still taking the snapshot vg/{snapshot.name} of vg/data-1")
    assert f"lvremove vg/{snapshot.name}; " in told.hint
    assert told.hint.endswith("dmsetup resume vg-data--1.")
    assert (stuck / "asked").read_text().split() == ["lvcreate"], "no other waits for the lock that this one has"
    os.kill(int((stuck / "pids").read_text()), signal.SIGKILL)
    snapshot.drop(events.append)
    told = events[-1]
    assert isinstance(told, Warn)
    assert f"{snapshot.name} was not removed: {stuck}/lvm did not end within 0.3 s" in told.text
    assert told.hint == f"Remove it: lvremove vg/{snapshot.name}"


def test_what_was_left_behind_is_not_looked_for_for_ever(stuck: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm_snapshots, "find_mappings", lambda prefix: iter([Path("/dev/dm-0")]))
    events: list[Event] = []
    remove_left_behind(events.append)
    (told,) = events
    assert isinstance(told, Warn)
    assert "LVM does not tell whether a backup that was killed has left snapshots" in told.text
