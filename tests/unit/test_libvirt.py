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

from remetal.applications.contract import Moment, Phase
from remetal.applications.libvirt import Libvirt, LibvirtSettings
from remetal.errors import RemetalError

URI = "test:///default"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write down what virsh is asked for; in the file `slow` stands at which word it takes a minute."""
    seen = tmp_path / "asked"
    client = tmp_path / "virsh"
    client.write_text(
        f'#!/bin/sh\nshift 3\necho "$*" >> {seen}\n'
        f'[ ! -e {tmp_path}/slow ] || [ "$1" != "$(cat {tmp_path}/slow)" ] || exec sleep 60\n'
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
    assert lines_of(asked) == ["domfsfreeze gone", "domfsfreeze test", "domfsthaw test", "domfsthaw gone"]


def test_one_that_does_not_answer_is_left_and_thawed_all_the_same(asked: Path) -> None:
    (asked.parent / "slow").write_text("domfsfreeze")
    application = made()
    with pytest.raises(RemetalError, match=r"guest test was not frozen: .*virsh did not end within .* and was stopped"):
        application.carry_out(at("before-freeze", 1))
    application.carry_out(at("after-thaw", 1))
    assert lines_of(asked)[-1] == "domfsthaw test"


def test_one_that_is_not_thawed_is_said_with_what_to_do(asked: Path) -> None:
    application = made()
    application.carry_out(at("before-freeze"))
    (asked.parent / "virsh").unlink()
    (asked.parent / "virsh").write_text("#!/bin/sh\nexit 1\n")
    (asked.parent / "virsh").chmod(0o755)
    with pytest.raises(RemetalError, match=r"guest test was not thawed: .* exit code 1") as caught:
        application.carry_out(at("after-thaw"))
    assert caught.value.hint == f"Try it by hand: virsh -c {URI} domfsthaw GUEST"


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
