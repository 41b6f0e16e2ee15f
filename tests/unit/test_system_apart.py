"""What outlives us: programs that nothing ends, and processes in none of our control groups."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remetal.system import apart
from remetal.system.apart import UnbrokenProgram
from remetal.system.run import ProgramFailedError, ProgramMissingError


def test_a_program_that_must_not_be_broken_outlives_us(tmp_path: Path) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    script = f"while [ ! -e {go} ]; do sleep 0.01; done; echo said; echo more >&2; touch {done}"
    code = (
        "import time; from remetal.system.apart import UnbrokenProgram\n"
        f"print(UnbrokenProgram(['sh', '-c', {script!r}]).ends(0.1), flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"False\n"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    go.touch()
    deadline = time.monotonic() + 10
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done.exists()


def test_what_an_unbroken_program_says_is_told_if_it_fails() -> None:
    program = UnbrokenProgram(["sh", "-c", "sleep 0.2; echo said; echo why >&2; exit 3"])
    assert not program.ends(0.01)
    with pytest.raises(ProgramFailedError, match="sh failed with exit code 3: said / why"):
        program.ends(10)
    assert UnbrokenProgram(["true"]).ends(10)
    with pytest.raises(ProgramMissingError):
        UnbrokenProgram(["no-such-program"])


HIERARCHIES = pytest.mark.parametrize(("unified", "roots"), [(True, ["."]), (False, ["freezer", "memory"])])


def make_groups(folder: Path, monkeypatch: pytest.MonkeyPatch, *, unified: bool) -> None:
    """Make what looks like control groups, which hosts often let nobody change."""
    for each in (".", "freezer", "memory"):  # in a unified hierarchy these are groups, not hierarchies
        (folder / each).mkdir(exist_ok=True)
        (folder / each / "cgroup.procs").touch()
    if unified:
        (folder / "cgroup.controllers").touch()
    monkeypatch.setattr(apart, "_CGROUPS", folder)


def entered(folder: Path) -> dict[str, str]:
    """Return what was written to which of them."""
    found = {str(path.parent.relative_to(folder)): path.read_text() for path in folder.rglob("cgroup.procs")}
    return {name: text for name, text in found.items() if text}


@HIERARCHIES
def test_a_process_is_set_apart_in_every_hierarchy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, unified: bool, roots: list[str]
) -> None:
    make_groups(tmp_path, monkeypatch, unified=unified)
    apart.set_apart(4711)
    assert entered(tmp_path) == dict.fromkeys(roots, "4711")


@HIERARCHIES
def test_one_that_must_not_be_broken_leaves_our_groups_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, unified: bool, roots: list[str]
) -> None:
    make_groups(tmp_path, monkeypatch, unified=unified)
    files = [tmp_path / root / "cgroup.procs" for root in roots]
    begun = UnbrokenProgram(["sh", "-c", 'for each; do grep -q 0 "$each" || exit 1; done', "sh", *files])
    assert begun.ends(10), "it has left when it begins"
    assert entered(tmp_path) == dict.fromkeys(roots, "0"), "0 is who writes it"


def test_where_nobody_may_leave_it_begins_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_CGROUPS", tmp_path / "none")
    assert UnbrokenProgram(["true"]).ends(10)
