"""Frozen file systems: held together, and let go whatever becomes of who froze them."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from remetal.errors import RefusedError, UnavailableError
from remetal.system.blockdev import Span
from remetal.system.freeze import held_still
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.watchdog import FIFREEZE, FITHAW
from remetal.units import MIB

SIZE = 320 * MIB


@pytest.fixture(params=["ext4", "xfs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted file system, which is thawed at the end whatever the test has done."""
    yield from mounted_file_system(tmp_path / "disk.img", request.param)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Path]:
    """Another one."""
    yield from mounted_file_system(tmp_path / "other.img", "ext4")


def mounted_file_system(disk: Path, kind: str) -> Iterator[Path]:
    with disk.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run([f"mkfs.{kind}", "-q", disk], check=True)
    with attach_loop(Span(disk, 0, SIZE), writable=True) as device, mounted(device) as folder:
        try:
            yield folder
        finally:
            with suppress(OSError):
                control(folder, FITHAW)


def control(folder: Path, request: int) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, request, 0)
    finally:
        os.close(fd)


def is_frozen(folder: Path) -> bool:
    """Tell whether somebody who writes waits; the one who tries is ended."""
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(folder / 'probe')!r}, 'w').write('x')"])
    try:
        writer.wait(5)
    except subprocess.TimeoutExpired:
        control(folder, FITHAW)
        writer.wait(10)
        control(folder, FIFREEZE)
        return True
    return False


def wait_for_thaw(folder: Path, seconds: float) -> None:
    """Wait until somebody can write again."""
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(folder / 'probe')!r}, 'w').write('x')"])
    assert writer.wait(seconds) == 0


def hold_elsewhere(*folders: Path, limit: float, read_only: Path | None = None) -> subprocess.Popen[bytes]:
    """Let another process hold file systems and sleep; returns when they are held."""
    held, others = [str(each) for each in folders], [str(read_only)] if read_only is not None else []
    code = (
        "import sys, time; from pathlib import Path; from remetal.system.freeze import held_still\n"
        f"held, others = ([Path(each) for each in paths] for paths in ({held!r}, {others!r}))\n"
        f"with held_still(held, limit={limit}, read_only=others):\n"
        "    print('frozen', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"frozen\n"
    return process


def test_nobody_writes_meanwhile(folder: Path, other: Path) -> None:
    with held_still([folder, other], limit=60):
        assert is_frozen(folder)
        assert is_frozen(other)
    assert not is_frozen(folder)
    assert not is_frozen(other)


def test_it_is_thawed_when_the_time_is_over_and_told(folder: Path) -> None:
    with pytest.raises(UnavailableError, match="longer than 1 seconds"), held_still([folder], limit=1):
        wait_for_thaw(folder, 20)
    assert not is_frozen(folder)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_it_is_thawed_when_who_froze_it_is_gone(folder: Path, other: Path, how: signal.Signals) -> None:
    limit = 2.0 if how == signal.SIGSTOP else 60.0
    with hold_elsewhere(folder, other, limit=limit) as process:
        process.send_signal(how)
        try:
            wait_for_thaw(folder, 20)
            wait_for_thaw(other, 20)
        finally:
            process.kill()


def test_what_somebody_else_has_frozen_stays_so(folder: Path, other: Path) -> None:
    control(folder, FIFREEZE)
    with pytest.raises(RefusedError, match="somebody has frozen it already"), held_still([other, folder], limit=60):
        pytest.fail("it was frozen twice")
    assert is_frozen(folder)
    assert not is_frozen(other)


def test_a_kind_that_cannot_be_frozen_is_refused(other: Path) -> None:
    with pytest.raises(RefusedError, match="cannot be held still"), held_still([other, Path("/proc")], limit=60):
        pytest.fail("nothing freezes this")
    assert not is_frozen(other)


def test_what_fails_meanwhile_is_raised_and_nothing_stays_frozen(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), held_still([folder], limit=60):
        raise ZeroDivisionError
    assert not is_frozen(folder)


def write(path: Path) -> str:
    """Write a file and return what the kernel said, if it did not like it."""
    try:
        path.write_text("x")
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


def test_what_cannot_be_frozen_is_read_only_for_the_moment(folder: Path, other: Path) -> None:
    with held_still([folder], read_only=[other], limit=60):
        assert write(other / "probe") == "Read-only file system"
        assert is_frozen(folder)
    assert write(other / "probe") == ""
    assert not is_frozen(folder)


def test_what_somebody_writes_to_cannot_be_made_read_only(folder: Path, other: Path) -> None:
    with (
        (other / "open").open("w"),
        pytest.raises(RefusedError, match="a file on it is open for writing"),
        held_still([folder], read_only=[other], limit=60),
    ):
        pytest.fail("it was made read-only")
    assert write(other / "probe") == ""
    assert not is_frozen(folder)


def test_it_is_writable_again_when_who_made_it_read_only_is_gone(folder: Path, other: Path) -> None:
    with hold_elsewhere(folder, limit=60, read_only=other) as process:
        assert write(other / "probe") == "Read-only file system"
        process.kill()
        wait_for_thaw(folder, 20)
    limit = time.monotonic() + 20  # each is let go by a process of its own
    while (said := write(other / "probe")) and time.monotonic() < limit:
        time.sleep(0.05)
    assert said == ""
