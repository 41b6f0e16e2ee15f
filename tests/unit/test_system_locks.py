"""Locks between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from remetal.errors import UnavailableError
from remetal.system.locks import held_lock
from remetal.system.mounts import mounted

HOLD = (
    "import sys,time; from pathlib import Path; from remetal.system.locks import held_lock\n"
    "with held_lock(Path(sys.argv[1]), what='it'): print('held', flush=True); time.sleep(60)"
)


def hold(path: Path) -> subprocess.Popen[bytes]:
    """Let another process hold the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    process.stdout.close()
    return process


def test_another_process_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    process = hold(path)
    try:
        with pytest.raises(UnavailableError) as caught, held_lock(path, what="the repository /r"):
            pass
        assert caught.value.message == f"another remetal (process {process.pid}) is at work on the repository /r"
        assert caught.value.exit_code == 6
    finally:
        process.kill()
        process.wait()


def test_who_waits_is_told_for_whom(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = hold(path)
    told: list[str] = []

    def end(said: str) -> None:
        told.append(said)
        process.kill()

    try:
        with held_lock(path, what="it", waiting=end):
            assert told == [f"another remetal (process {process.pid}) is at work on it"]
            with pytest.raises(UnavailableError, match=f"process {os.getpid()}"), held_lock(path, what="it"):
                pass
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_lock_of_a_dead_process_is_free(tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "lock"
    process = hold(path)
    process.send_signal(how)
    process.wait()
    with held_lock(path, what="it"):
        assert path.read_text() == str(os.getpid())


def test_a_program_that_was_started_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_lock(path, what="it"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with held_lock(path, what="it"):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_lock_excludes_its_own_process_and_survives_errors(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_lock(path, what="it"), pytest.raises(UnavailableError), held_lock(path, what="it"):
        pass
    with pytest.raises(ZeroDivisionError), held_lock(path, what="it"):
        raise ZeroDivisionError
    with held_lock(path, what="it"):
        pass


def test_exactly_one_of_many_wins(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from remetal.errors import UnavailableError\n"
        "from remetal.system.locks import held_lock\n"
        "try:\n"
        "    with held_lock(Path(sys.argv[1]), what='it'): print('won', flush=True); sys.stdin.read()\n"
        "except UnavailableError: print('lost', flush=True)"
    )
    argv = [sys.executable, "-c", code, str(path)]
    many = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    said = [process.stdout.readline().strip() for process in many if process.stdout is not None]
    for process in many:
        process.communicate(timeout=30)
    assert sorted(said) == [b"lost", b"lost", b"lost", b"won"]


def test_a_place_that_takes_no_lock_is_told_of(tmp_path: Path) -> None:
    with mounted(Path("tmpfs"), kind="tmpfs", options=["ro", "size=64k"]) as folder:
        for path in (folder / "lock", folder / "deep" / "lock"):
            with pytest.raises(UnavailableError, match="Read-only file system"), held_lock(path, what="it"):
                pass
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="cannot lock"), held_lock(tmp_path / "file" / "lock", what="it"):
        pass


def test_a_full_disk_does_not_keep_from_locking() -> None:
    with mounted(Path("tmpfs"), kind="tmpfs", options=["size=4k"]) as folder:
        (folder / "filler").write_bytes(bytes(4096))
        with (
            held_lock(folder / "lock", what="it"),
            pytest.raises(UnavailableError),
            held_lock(folder / "lock", what="it"),
        ):
            pass
