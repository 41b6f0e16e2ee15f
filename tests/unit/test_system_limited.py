"""Programs that are not ours: what they see, and how they are ended, whatever they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remetal.errors import RefusedError
from remetal.system.limited import attended, run_within
from remetal.system.run import ProgramFailedError, ProgramMissingError
from tests.unit.test_system_run import ends


def shell(text: str) -> list[str]:
    return ["/bin/sh", "-c", text]


def test_a_program_sees_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMETAL_PASSPHRASE_FILE", "/root/secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("LC_ALL", "de_DE")
    done = run_within(5, ["env"], env={"REMETAL_PHASE": "frozen"})
    names = {line.partition("=")[0] for line in done.text.splitlines()}
    assert names == {"PATH", "LANG", "REMETAL_PHASE"}
    assert "LANG=C.UTF-8" in done.text.splitlines()


def test_its_input_is_empty_and_its_outputs_come_apart() -> None:
    done = run_within(5, shell("cat; pwd; echo bad >&2"), env={})
    assert (done.stdout, done.stderr) == (b"/\n", b"bad\n")


def test_of_endless_output_the_beginning_and_the_last_complaints_are_kept() -> None:
    done = run_within(20, shell("seq 200000; seq 200000 >&2"), env={})
    assert len(done.stdout) == len(done.stderr) == 1 << 16
    assert done.stdout.startswith(b"1\n2\n")
    assert done.stderr.endswith(b"\n200000\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo one >&2; echo two >&2; exit 3", "/bin/sh failed with exit code 3: one / two"),
        ("kill -TERM $$", "/bin/sh was ended by signal 15"),
    ],
)
def test_how_it_failed_is_said(text: str, said: str) -> None:
    with pytest.raises(ProgramFailedError) as caught:
        run_within(5, shell(text), env={})
    assert caught.value.message == said


def test_one_that_cannot_start_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProgramMissingError, match=f"there is no program {tmp_path}/none"):
        run_within(5, [tmp_path / "none"], env={})
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ProgramFailedError, match="could not be started: Permission denied"):
        run_within(5, [tmp_path / "text"], env={})


@pytest.mark.parametrize("text", ["sleep 60 & echo $!; wait", "trap '' TERM INT; sleep 60 & echo $!; wait; wait"])
def test_when_its_time_is_over_its_whole_group_is_killed(tmp_path: Path, text: str) -> None:
    began = time.monotonic()
    with pytest.raises(ProgramFailedError, match=r"did not end within 0\.5 s and was stopped: here"):
        run_within(0.5, shell(f"echo here >&2; ({text}) > {tmp_path / 'pid'}"), env={})
    assert time.monotonic() - began < 2
    assert ends(int((tmp_path / "pid").read_text()))


def test_one_that_never_stops_talking_is_stopped() -> None:
    began = time.monotonic()
    with pytest.raises(ProgramFailedError, match=r"did not end within 0\.5 s"):
        run_within(0.5, ["yes"], env={})
    assert time.monotonic() - began < 2


def test_what_it_leaves_running_is_not_waited_for() -> None:
    began = time.monotonic()
    pid = int(run_within(20, shell("sleep 60 & echo $!"), env={}).text)
    assert time.monotonic() - began < 2
    os.kill(pid, signal.SIGKILL)


def test_one_that_is_interrupted_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from remetal.system.limited import run_within; "
        f"run_within(60, ['/bin/sh', '-c', 'echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 60'], "
        "env={})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        for _ in range(200):
            if (tmp_path / "pid").exists():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait(10)
    assert ends(int((tmp_path / "pid").read_text()))


def test_one_that_is_attended_is_talked_to_and_gone_afterwards() -> None:
    with attended(shell("echo ready; read word; echo $word; sleep 60"), env={}) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 100) == b"ready\n"
        os.write(process.stdin.fileno(), b"hello\n")
        assert os.read(process.stdout.fileno(), 100) == b"hello\n"
    assert process.returncode == -signal.SIGKILL


def test_it_runs_as_another_user_with_his_groups() -> None:
    done = run_within(5, shell("id -un; id -G; echo $HOME; grep CapEff /proc/self/status"), env={}, user="nobody")
    name, groups, home, capabilities = done.text.splitlines()
    assert (name, home) == ("nobody", "/nonexistent")
    assert set(groups.split()) == {"65534"}
    assert int(capabilities.split()[1], 16) == 0
    with pytest.raises(RefusedError, match="there is no user 'nobody-such'"):
        run_within(5, ["true"], env={}, user="nobody-such")
