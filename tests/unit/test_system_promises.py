"""A promise is kept by another process when we are gone, or too slow."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remetal.system.promises import promised
from remetal.system.run import ProgramMissingError


def writing(path: Path, before: str = "") -> list[str]:
    return ["sh", "-c", f"{before} env > {path}.new; mv {path}.new {path}"]


def comes(path: Path, seconds: float = 5) -> bool:
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
    return path.exists()


def test_a_promise_that_is_released_is_forgotten(tmp_path: Path) -> None:
    with promised([writing(tmp_path / "done")], env={}, limit=5) as promise:
        assert promise.release()
    assert not comes(tmp_path / "done", 0.3)


def test_one_that_is_not_released_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "secret")
    with promised([writing(tmp_path / "done")], env={"REMETAL_PHASE": "after-thaw"}, limit=5):
        pass
    names = {line.partition("=")[0] for line in (tmp_path / "done").read_text().splitlines()}
    assert names - {"PWD", "_", "OLDPWD"} == {"PATH", "LANG", "REMETAL_PHASE"}


def test_when_the_time_is_over_it_is_kept_and_that_is_known(tmp_path: Path) -> None:
    with promised([writing(tmp_path / "done")], env={}, limit=5, wait=0.2) as promise:
        assert comes(tmp_path / "done")
        time.sleep(0.2)
        assert not promise.release()


def test_nobody_keeps_the_others_from_running(tmp_path: Path) -> None:
    bad = [["false"], ["sh", "-c", "sleep 60"], ["/none"]]
    with promised([*bad, writing(tmp_path / "done")], env={}, limit=0.5):
        pass
    assert (tmp_path / "done").exists()


def test_what_is_not_there_is_not_promised() -> None:
    with pytest.raises(ProgramMissingError), promised([["no-such-program"]], env={}, limit=1):
        raise AssertionError("it was promised")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_it_is_kept_if_who_gave_it_is_gone(tmp_path: Path, how: signal.Signals) -> None:
    code = (
        "import sys, time; from remetal.system.promises import promised\n"
        "with promised([sys.argv[1:]], env={}, limit=5):\n    print('ready', flush=True); time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", code, *writing(tmp_path / "done")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert not comes(tmp_path / "done", 0.2)
        process.send_signal(how)
        assert comes(tmp_path / "done")


def failing_until(sign: Path, path: Path) -> list[str]:
    return writing(path, f"[ -e {sign} ] || exit 1;")


def test_what_fails_is_run_again_for_a_while_and_nobody_waits_for_it(tmp_path: Path) -> None:
    """Whether who gave the promise is gone, or took too long."""
    for wait in (None, 0.1):
        sign, done, other = (tmp_path / f"{name}-{wait}" for name in ("sign", "done", "other"))
        began = time.monotonic()
        with promised([failing_until(sign, done), writing(other)], env={}, limit=5, wait=wait, again=60) as promise:
            if wait is not None:
                assert comes(other)
                assert not promise.release()
        assert time.monotonic() - began < 8
        assert comes(other)
        assert not comes(done, 0.3)
        sign.touch()
        assert comes(done, 10)


def test_that_ends_when_the_while_is_over(tmp_path: Path) -> None:
    with promised([["sh", "-c", f"echo >> {tmp_path}/tried; exit 1"]], env={}, limit=5, again=3):
        pass
    time.sleep(6)
    tried = len((tmp_path / "tried").read_text())
    assert tried > 1
    time.sleep(4)
    assert len((tmp_path / "tried").read_text()) == tried


def test_some_are_kept_and_the_others_are_forgotten(tmp_path: Path) -> None:
    first, sign, last = tmp_path / "first", tmp_path / "sign", tmp_path / "last"
    commands = [writing(first), failing_until(sign, last)]
    began = time.monotonic()
    with promised(commands, env={}, limit=5, wait=60, again=60) as promise:
        assert promise.keep([1])
    assert time.monotonic() - began < 8
    sign.touch()
    assert comes(last, 10)
    assert not first.exists()
