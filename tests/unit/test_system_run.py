"""The gateway to other programs: what comes back, and what a failure says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remetal.errors import RefusedError
from remetal.system.run import (
    PACKAGES,
    ProgramFailedError,
    ProgramMissingError,
    find_program,
    need_programs,
    run,
    run_lines,
    start,
)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int) -> bool:
    """Whether a process is gone within two seconds."""
    deadline = time.monotonic() + 2
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(pid)


def test_output_is_returned_whole_and_as_it_came() -> None:
    done = run(["sh", "-c", "printf 'a\\377b\\n'; printf err >&2; exit 3"], allowed=(0, 3))
    assert (done.returncode, done.stdout, done.stderr) == (3, b"a\xffb\n", b"err")
    assert done.text == "a\ufffdb\n"
    assert len(run(["head", "-c", "3000000", "/dev/zero"]).stdout) == 3_000_000


def test_lines_come_while_the_program_runs(tmp_path: Path) -> None:
    go = tmp_path / "go"
    lines = run_lines(["sh", "-c", f"echo one; while [ ! -e {go} ]; do sleep 0.01; done; printf 'tw\\377o\n\nlast'"])
    assert next(lines) == "one"
    go.touch()
    assert list(lines) == ["tw\ufffdo", "", "last"]


def test_a_program_whose_lines_nobody_wants_any_more_is_ended() -> None:
    lines = run_lines(["sh", "-c", "echo $$; yes"])
    pid = int(next(lines))
    assert is_alive(pid)
    lines.close()
    assert ends(pid)


@pytest.mark.parametrize(
    ("script", "silent", "what"),
    [
        ("echo line; echo bad >&2; exit 3", False, "failed with exit code 3: bad"),
        ("echo line; kill -9 $$", False, "ended by signal 9"),
        ("echo line; echo odd >&2", True, "complained: odd"),
    ],
)
def test_a_failure_is_told_behind_the_last_line(script: str, silent: bool, what: str) -> None:
    lines = run_lines(["sh", "-c", script], silent=silent)
    assert next(lines) == "line"
    with pytest.raises(ProgramFailedError, match=what):
        next(lines)
    assert list(run_lines(["sh", "-c", "echo line; echo odd >&2"])) == ["line"]


def test_input_is_what_is_given_or_nothing() -> None:
    assert run(["cat"], input=b"x" * 200_000).stdout == b"x" * 200_000
    assert run(["cat"]).stdout == b""
    assert run(["cat"], input=b"").stdout == b""


def test_the_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("PATH", "/usr/bin")
    text = run(["env"], env={"EXTRA": "1"}).text.splitlines()
    assert {"LC_ALL=C.UTF-8", "LANG=C.UTF-8", "TZ=UTC", "EXTRA=1"} <= set(text)
    assert not any(line.startswith("SECRET=") for line in text)
    path = next(line for line in text if line.startswith("PATH="))
    assert path.startswith("PATH=/usr/bin:")
    assert "/usr/sbin" in path


def test_programs_are_found_in_sbin_though_path_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert find_program("losetup") is not None
    assert find_program("no-such-program") is None


def test_a_failure_names_the_program_its_last_words_and_a_command_to_paste() -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do echo line $i >&2; done; exit 9"
    with pytest.raises(ProgramFailedError) as caught:
        run(["sh", "-c", script])
    error = caught.value
    assert error.returncode == 9
    assert "failed with exit code 9" in error.message
    assert "line 8" in error.message
    assert "line 2" not in error.message
    assert error.hint.endswith(f"/sh -c '{script}'")
    assert error.stderr.startswith("line 1")
    assert error.exit_code == 1


def test_a_program_that_complains_on_standard_output_is_heard_too() -> None:
    with pytest.raises(ProgramFailedError, match="said here"):
        run(["sh", "-c", "echo said here; exit 1"])


def test_a_signal_is_named() -> None:
    with pytest.raises(ProgramFailedError, match="ended by signal 15") as caught:
        run(["sh", "-c", "kill -TERM $$"])
    assert caught.value.returncode == -signal.SIGTERM


def test_a_timeout_ends_the_program_and_says_so(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ProgramFailedError, match=r"did not end within 0.3 s and was stopped: half done"):
        run(["sh", "-c", f"echo $$ > {tmp_path}/pid; echo half done >&2; exec sleep 60"], timeout=0.3)
    assert time.monotonic() - began < 10
    assert ends(int((tmp_path / "pid").read_text()))


def test_a_missing_program_names_its_package() -> None:
    with pytest.raises(ProgramMissingError) as caught:
        run(["no-such-program-anywhere"])
    assert "no-such-program-anywhere" in caught.value.message
    assert isinstance(caught.value, RefusedError)
    with pytest.raises(ProgramMissingError, match="/nowhere/program"):
        run(["/nowhere/program"])


def test_all_missing_programs_are_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("remetal.system.run._SBIN", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    need_programs()
    with pytest.raises(ProgramMissingError) as caught:
        need_programs("mcopy", "mdir", "xfs_db")
    assert caught.value.message == "not installed: mcopy, mdir, xfs_db"
    assert caught.value.hint.endswith("apt-get install mtools xfsprogs")


BROUGHT = {"mariadb-client": "mariadb-client-core", "postgresql-client": "postgresql-client-common"}
"""What a package brings that has no program itself, but whose name is the same in every release."""


def test_every_named_package_is_the_one_that_has_the_program() -> None:
    names: dict[str, set[str]] = {}
    for program in PACKAGES:
        found = find_program(program)
        assert found is not None, program
        names[program] = {found, str(Path(found).resolve()), found.removeprefix("/usr"), f"/usr{found}"}
    said = run(["dpkg-query", "-S", *sorted(set().union(*names.values()))], allowed=(0, 1)).text
    owners = {path: package for package, _, path in (line.partition(": ") for line in said.splitlines())}
    for program, package in PACKAGES.items():
        assert BROUGHT.get(package, package) in {owners.get(name) for name in names[program]}, program


def use(way: str, argv: list[str]) -> None:
    """Run a program by one of the two ways."""
    if way == "run":
        run(argv)
    else:
        with start(argv):
            pass


@pytest.mark.parametrize("way", ["run", "start"])
def test_what_cannot_be_started_is_an_error_of_ours(tmp_path: Path, way: str) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    for argv in ([str(broken)], [str(tmp_path)], ["echo", "nul\0byte"], ["echo", "x" * (4 << 20)]):
        with pytest.raises(ProgramFailedError, match="could not be started") as caught:
            use(way, argv)
        assert caught.value.hint
    with pytest.raises(ProgramFailedError, match="nowhere"):
        run(["echo"], cwd=tmp_path / "nowhere")


def test_a_started_program_is_ended_with_the_block_and_logs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with start(["sh", "-c", "echo out; echo err >&2; exec sleep 60"], log=log) as process:
        deadline = time.monotonic() + 5
        while log.read_bytes().count(b"\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_alive(process.pid)
    assert log.read_text() == "out\nerr\n"
    assert process.returncode == -signal.SIGTERM
    with pytest.raises(ZeroDivisionError), start(["sleep", "60"], log=log) as process:
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGTERM


def test_a_started_program_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("remetal.system.run._PATIENCE", 0.3)
    ready = tmp_path / "ready"
    began = time.monotonic()
    code = (
        "import pathlib, signal, time; signal.signal(15, signal.SIG_IGN); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    with start([sys.executable, "-I", "-S", "-c", code]) as process:
        while not ready.exists() and time.monotonic() - began < 10:
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    assert time.monotonic() - began < 30


def test_file_descriptors_are_handed_over_only_on_request(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        with start(["bash", "-c", f"echo through >&{writer}"], pass_fds=(writer,)) as process:
            process.wait(10)
        assert os.read(reader, 100) == b"through\n"
        with start(["bash", "-c", f"echo through >&{writer}"], log=tmp_path / "log") as process:
            assert process.wait(10) != 0
    finally:
        os.close(reader)
        os.close(writer)


def test_a_message_holds_no_control_characters_and_no_endless_line() -> None:
    with pytest.raises(ProgramFailedError) as caught:
        run(["sh", "-c", "printf '\\033[31mred\\rx\\n' >&2; head -c 100000 /dev/urandom | od >&2 -w99999 ; exit 1"])
    assert all(each.isprintable() for each in caught.value.message)
    assert len(caught.value.message) < 2500


def test_a_program_dies_with_us() -> None:
    code = "from remetal.system.run import run; print('up', flush=True); run(['sh', '-c', 'echo $$ >&2; sleep 60'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 10
        while not (found := children.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        process.kill()
    assert ends(int(found[0]))
