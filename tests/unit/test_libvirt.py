"""Guests are frozen and thawed through virsh, with the driver that libvirt has for tests.

Its only guest, `test`, takes a freeze, but has forgotten it for the next virsh, as each has a host of its own; so what
is asked of it is looked at.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remetal.applications import libvirt
from remetal.applications.contract import Moment, Phase
from remetal.applications.libvirt import Libvirt, LibvirtSettings
from remetal.errors import RemetalError

URI = "test:///default"


@pytest.fixture(autouse=True)
def _for_a_short_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt, "_AGAIN", 15.0)  # what has no agent is tried in vain when the test is over


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write down what virsh is asked for; in the files `slow` and `broken` stands at which word it takes a minute, or
    fails."""
    seen = tmp_path / "asked"
    client = tmp_path / "virsh"
    client.write_text(
        f'#!/bin/sh\nshift 3\necho "$*" >> {seen}\n'
        f'[ ! -e {tmp_path}/slow ] || [ "$1" != "$(cat {tmp_path}/slow)" ] || exec sleep 60\n'
        f'[ ! -e {tmp_path}/broken ] || [ "$1" != "$(cat {tmp_path}/broken)" ] || exit 1\n'
        f'exec /usr/bin/virsh --quiet --connect {URI} "$@"\n'
    )
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return seen


def at(phase: Phase, limit: float = 30, lines: list[str] | None = None) -> Moment:
    return Moment(phase, limit, {}, ([] if lines is None else lines).append)


def made(**settings: tuple[str, ...]) -> Libvirt:
    return Libvirt(LibvirtSettings(uri=URI, **settings))  # type: ignore[arg-type]


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_all_that_run_are_frozen_and_thawed(asked: Path) -> None:
    application = made()
    application.carry_out(at("before-freeze"))
    assert lines_of(asked) == ["list --name --state-running", "domfsfreeze test"]
    application.carry_out(at("after-thaw"))
    assert lines_of(asked)[2:] == ["domfsthaw test"]


def test_one_that_cannot_be_frozen_is_named_and_the_others_are_frozen_and_thawed(asked: Path) -> None:
    application = made(guests=("gone", "test"))
    with pytest.raises(RemetalError, match=r"guest gone was not frozen: .*failed to get domain 'gone'") as caught:
        application.carry_out(at("before-freeze"))
    assert "guest-ping" in caught.value.hint
    application.carry_out(at("after-thaw"))
    assert lines_of(asked)[:4] == ["domfsfreeze gone", "domfsfreeze test", "domfsthaw test", "domfsthaw gone"]
    time.sleep(3)
    assert thaws_of(asked).count("test") == 1


def test_one_that_does_not_answer_is_left_and_thawed_all_the_same(asked: Path) -> None:
    (asked.parent / "slow").write_text("domfsfreeze")
    application = made()
    with pytest.raises(RemetalError, match=r"guest test was not frozen: .*virsh did not end within .* and was stopped"):
        application.carry_out(at("before-freeze", 1))
    application.carry_out(at("after-thaw", 1))
    assert lines_of(asked)[-1] == "domfsthaw test"


def thaws_of(asked: Path, seconds: float = 0) -> list[str]:
    """Return which guests were to be thawed, of which there should be more in so many seconds."""
    before = len(lines_of(asked))
    until = time.monotonic() + seconds
    while len(lines_of(asked)) == before and time.monotonic() < until:
        time.sleep(0.05)
    return [line.partition(" ")[2] for line in lines_of(asked) if line.startswith("domfsthaw ")]


def test_one_that_is_not_thawed_is_said_with_what_to_do_and_tried_again(asked: Path) -> None:
    application = made()
    application.carry_out(at("before-freeze"))
    (asked.parent / "broken").write_text("domfsthaw")
    with pytest.raises(RemetalError, match=r"guest test was not thawed: .* exit code 1") as caught:
        application.carry_out(at("after-thaw"))
    assert caught.value.hint == f"It is tried again for 0.25 minutes. By hand: virsh -c {URI} domfsthaw GUEST"
    assert len(thaws_of(asked, 10)) >= 2
    (asked.parent / "broken").unlink()
    assert len(thaws_of(asked, 10)) >= 3
    time.sleep(0.5)
    done = thaws_of(asked)
    assert thaws_of(asked, 4) == done, "it was thawed"


def test_one_that_freezes_when_nobody_waits_for_it_any_more_is_thawed_once_it_can_be(asked: Path) -> None:
    """As long as the agent is at it, libvirt cannot thaw it; the others are not thawed again meanwhile."""
    (asked.parent / "slow").write_text("domfsfreeze")
    application = made(guests=("test", "test", "gone"))
    with pytest.raises(RemetalError, match="was stopped; guest gone was not frozen"):
        application.carry_out(at("before-freeze", 1))
    (asked.parent / "slow").unlink()
    (asked.parent / "broken").write_text("domfsthaw")
    with pytest.raises(RemetalError, match=r"guest test was not thawed: .* exit code 1"):
        application.carry_out(at("after-thaw", 1))
    assert "test" in thaws_of(asked, 10)[2:]
    (asked.parent / "broken").unlink()
    before = thaws_of(asked).count("test")
    assert "test" in thaws_of(asked, 10)[-2:]
    time.sleep(3)
    assert before < thaws_of(asked).count("test") <= before + 2


def test_that_one_was_thawed_too_early_is_said_though_another_has_no_agent(asked: Path) -> None:
    application = made(guests=("gone", "test"))
    with pytest.raises(RemetalError, match="guest gone was not frozen"):
        application.carry_out(at("before-freeze", 0.5))
    thaws_of(asked, 5)
    time.sleep(0.5)
    with pytest.raises(RemetalError, match=r"^the guests were not frozen until the end, but for 1 s$"):
        application.carry_out(at("after-thaw", 0.5))


def test_they_are_thawed_when_it_takes_too_long_and_that_is_said(asked: Path) -> None:
    application = made()
    application.carry_out(at("before-freeze", 0.5))
    time.sleep(1.5)
    assert lines_of(asked)[-1] == "domfsthaw test"
    with pytest.raises(RemetalError, match="the guests were not frozen until the end, but for 1 s"):
        application.carry_out(at("after-thaw", 0.5))


def test_they_are_thawed_when_remetal_is_killed(asked: Path) -> None:
    code = (
        "import time; from remetal.applications.contract import Moment; "
        "from remetal.applications.libvirt import Libvirt, LibvirtSettings; "
        f"held = Libvirt(LibvirtSettings(uri='{URI}')); "
        "held.carry_out(Moment('before-freeze', 60, {}, print)); print('frozen', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"frozen\n"
        process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 5
    while lines_of(asked)[-1] != "domfsthaw test" and time.monotonic() < until:
        time.sleep(0.05)
    assert lines_of(asked)[-1] == "domfsthaw test"


def test_a_host_that_is_not_there_is_an_error() -> None:
    application = Libvirt(LibvirtSettings(uri="qemu+unix:///system?socket=/run/none"))
    with pytest.raises(RemetalError, match=r"virsh failed with exit code 1: .*failed to connect"):
        application.carry_out(at("before-freeze"))
    application.carry_out(at("after-thaw"))


def test_a_missing_client_is_said_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/sbin")
    with pytest.raises(RemetalError, match="not installed: virsh") as caught:
        made().carry_out(at("before-freeze"))
    assert caught.value.hint == "On Debian or Ubuntu: apt-get install libvirt-clients"
