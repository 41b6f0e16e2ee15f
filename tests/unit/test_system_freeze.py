"""Frozen file systems: held together, and let go whatever becomes of who froze them."""

from __future__ import annotations

import errno
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

from remetal.errors import RefusedError, RemetalError, UnavailableError
from remetal.system import freeze, watchdog
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


def make_writable(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        watchdog.reconfigure(fd, b"rw")
    finally:
        os.close(fd)


def end(held: freeze.Held) -> None:
    """End who watches over what is held."""
    held.check()
    held._dog.kill()
    held._dog.wait()
    with pytest.raises(UnavailableError, match="watches over"):
        held.check()


def is_frozen(folder: Path) -> bool:
    """Tell whether somebody has frozen a file system: it cannot be frozen twice."""
    try:
        control(folder, FIFREEZE)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return True
    control(folder, FITHAW)
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
        writer = subprocess.Popen([sys.executable, "-c", f"open({str(folder / 'probe')!r}, 'w').write('x')"])
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(3)
    assert writer.wait(20) == 0
    assert not is_frozen(folder)
    assert not is_frozen(other)


def test_it_is_thawed_when_the_time_is_over_and_told(folder: Path) -> None:
    with pytest.raises(UnavailableError, match="longer than 1 seconds"), held_still([folder], limit=1):
        wait_for_thaw(folder, 20)
    assert not is_frozen(folder)


@pytest.mark.parametrize("late", [True, False])
def test_what_is_frozen_after_the_time_is_over_is_thawed_as_well(
    folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch, *, late: bool
) -> None:
    """As one that takes long to freeze: it begins in time, and is frozen when the others have been let go."""
    hold = freeze._hold

    def slowly(place: Path, fd: int, **how: bool) -> None:
        if late:
            time.sleep(1)
        hold(place, fd, **how)
        if not late:
            time.sleep(1)
        monkeypatch.setattr(freeze.Held, "check", lambda self: None)  # so that the other is frozen, too

    monkeypatch.setattr(freeze, "_hold", slowly)
    with pytest.raises(UnavailableError, match=r"longer than 0\.5 seconds"), held_still([folder, other], limit=0.5):
        wait_for_thaw(other, 20)
    assert not is_frozen(folder)
    assert not is_frozen(other)


def test_no_more_is_frozen_when_the_time_is_over(folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def slowly(place: Path, fd: int, **how: bool) -> None:
        held.append(place)
        time.sleep(1)

    monkeypatch.setattr(freeze, "_hold", slowly)
    with pytest.raises(UnavailableError, match=r"longer than 0\.5 seconds"), held_still([folder, other], limit=0.5):
        pytest.fail("it was too late")
    assert held == [folder]


def test_a_thaw_by_somebody_else_is_noticed(folder: Path, other: Path) -> None:
    with pytest.raises(UnavailableError, match="somebody else let go"), held_still([folder, other], limit=60):
        control(other, FITHAW)
    with (
        pytest.raises(UnavailableError, match="somebody else let go"),
        held_still([folder], read_only=[other], limit=60),
    ):
        make_writable(other)
    assert not is_frozen(folder)
    assert write(other / "probe") == ""


def test_it_is_thawed_when_the_watchdog_is_gone(folder: Path, other: Path) -> None:
    with (
        pytest.raises(UnavailableError, match="watches over"),
        held_still([folder], read_only=[other], limit=60) as held,
    ):
        end(held)
    assert not is_frozen(folder)
    assert write(other / "probe") == ""


def test_it_is_thawed_at_once_when_the_watchdog_is_gone(folder: Path, other: Path) -> None:
    """Whatever we are doing then, and however long that takes."""

    def wait_for_both(held: freeze.Held) -> None:
        held._dog.kill()
        wait_for_thaw(folder, 20)
        wait_for_thaw(other, 20)

    with pytest.raises(UnavailableError, match="watches over"), held_still([folder, other], limit=60) as held:
        wait_for_both(held)
    assert not is_frozen(folder)


def test_nobody_ends_both_by_our_name(folder: Path) -> None:
    """`pkill -f remetal` and `killall python3` leave the watchdog alone."""
    with hold_elsewhere(folder, limit=30) as holding:
        found = subprocess.run(["pgrep", "--parent", str(holding.pid)], check=True, capture_output=True, text=True)
        dog = Path("/proc", found.stdout.strip())
        words = (dog / "cmdline").read_bytes()
        assert b"remetal" not in words.replace(os.fsencode(Path(sys.executable).resolve()), b"")
        assert (dog / "comm").read_text() == "thaw-watchdog\n"
        holding.kill()
        wait_for_thaw(folder, 20)


def test_the_watchdog_needs_no_other_process(folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", no_room)
    opened = [os.open(each, os.O_RDONLY) for each in (folder, other)]
    control(folder, FIFREEZE)
    assert not watchdog.let_go([], opened)
    control(folder, FIFREEZE)
    control(other, FIFREEZE)
    assert watchdog.let_go([], opened)
    for each in opened:
        os.close(each)
    monkeypatch.undo()
    assert not is_frozen(folder)


def test_who_watches_is_in_none_of_our_control_groups(folder: Path) -> None:
    if not os.access("/sys/fs/cgroup/cgroup.procs", os.W_OK):
        pytest.skip("this host lets nobody change control groups, or has no unified hierarchy")
    with held_still([folder], limit=60) as held:
        groups = Path(f"/proc/{held._dog.pid}/cgroup").read_text().splitlines()
    assert groups[-1] == "0::/"


def test_a_place_that_is_gone_is_told(folder: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be reached any more"), held_still([folder / "x"], limit=60):
        pytest.fail("nothing is there")


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


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, UnavailableError), (errno.EPERM, RefusedError)])
def test_one_that_does_not_work_is_told(
    folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[RemetalError]
) -> None:
    """As one whose disk was unplugged."""
    ioctl = fcntl.ioctl

    def broken(fd: int, request: int, argument: int) -> int:
        if request == FIFREEZE and os.fstat(fd).st_dev == other.stat().st_dev:
            raise OSError(number, os.strerror(number))
        return ioctl(fd, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", broken)
    with pytest.raises(kind, match="cannot be held still"), held_still([folder, other], limit=60):
        pytest.fail("it cannot be frozen")
    monkeypatch.undo()
    assert not is_frozen(folder)


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
