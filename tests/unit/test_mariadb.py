"""MariaDB's tables are locked from before the freeze until after it, and never for longer: a real server."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from remetal.applications.contract import Moment, Phase
from remetal.applications.hooks import Hook, HookFailedError, Hooks
from remetal.applications.mariadb import Mariadb, MariadbSettings
from remetal.errors import RemetalError
from tests.databases import MariaServer, folder_of, running_mariadb


@pytest.fixture(scope="module")
def server() -> Iterator[MariaServer]:
    with folder_of("mysql") as folder, running_mariadb(folder / "data", folder) as found:
        found.sql("create database d; create table d.inno (a int); create table d.aria (a int) engine=aria")
        found.sql("insert into d.inno values (1)")
        yield found


def at(phase: Phase, limit: float = 30) -> Moment:
    return Moment(phase, limit, {}, lambda line: None)


def made(server: MariaServer) -> Mariadb:
    return Mariadb(MariadbSettings(socket=str(server.socket)))


def writes(server: MariaServer, table: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(server.argv(f"insert into d.{table} values (1)"))


def test_nobody_writes_while_they_are_locked(server: MariaServer) -> None:
    application = made(server)
    application.carry_out(at("before-freeze"))
    writers = [writes(server, table) for table in ("inno", "aria")]
    time.sleep(0.5)
    assert server.sql("select count(*) from d.aria") == "0", "who only reads goes on"
    assert [each.poll() for each in writers] == [None, None]
    application.carry_out(at("after-thaw"))
    assert [each.wait(10) for each in writers] == [0, 0]
    assert server.sql("select count(*) from information_schema.processlist where user = 'root'") == "1", "itself"


def test_a_lock_that_is_not_had_in_time_is_given_up(server: MariaServer) -> None:
    with subprocess.Popen(server.argv("update d.inno set a = a + sleep(6) limit 1")) as long:
        time.sleep(0.5)
        application = made(server)
        with pytest.raises(RemetalError, match=r"ended: .*Lock wait timeout exceeded"):
            application.carry_out(at("before-freeze", 3))
        application.carry_out(at("after-thaw"))
        assert long.poll() is None
        assert writes(server, "aria").wait(2) == 0, "others do not wait for it any more"


def test_a_lock_that_is_held_for_too_long_is_given_up_by_the_server_and_that_is_said(server: MariaServer) -> None:
    application = made(server)
    application.carry_out(at("before-freeze", 1))
    assert writes(server, "aria").wait(5) == 0
    with pytest.raises(
        RemetalError, match=r"were not locked until the end: .*(gone away|Lost connection|disconnected)"
    ) as caught:
        application.carry_out(at("after-thaw"))
    assert "limit = 60" in caught.value.hint
    application.carry_out(at("after-thaw"))


def test_the_lock_is_given_up_though_others_may_change_its_options_by_now(server: MariaServer, tmp_path: Path) -> None:
    options = tmp_path / "my.cnf"
    options.write_text("[client]\n")
    application = Mariadb(MariadbSettings(socket=str(server.socket), options=str(options)))
    hooks = Hooks([Hook(1, application, 30, "end", (options,))])
    with pytest.raises(HookFailedError, match=r"my\.cnf may be changed by others"), hooks.quiet([]):
        options.chmod(0o666)
    assert writes(server, "aria").wait(5) == 0


def test_the_lock_goes_with_remetal(server: MariaServer, tmp_path: Path) -> None:
    code = (
        "import time; from remetal.applications.contract import Moment; "
        "from remetal.applications.mariadb import Mariadb, MariadbSettings; "
        f"held = Mariadb(MariadbSettings(socket='{server.socket}')); "
        "held.carry_out(Moment('before-freeze', 60, {}, print)); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        writer = writes(server, "aria")
        time.sleep(0.3)
        assert writer.poll() is None
        process.send_signal(signal.SIGKILL)
        assert writer.wait(5) == 0


def test_a_server_that_is_not_there_is_an_error() -> None:
    application = Mariadb(MariadbSettings(socket="/run/none"))
    with pytest.raises(RemetalError, match=r"the client has ended: ERROR 2002 .*/run/none"):
        application.carry_out(at("before-freeze"))
    application.carry_out(at("after-thaw"))


def test_a_server_that_does_not_answer_is_left_when_the_time_is_over(server: MariaServer) -> None:
    server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(RemetalError, match="has not answered for 1 s"):
            made(server).carry_out(at("before-freeze", 1))
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert writes(server, "aria").wait(5) == 0


def test_a_password_is_in_a_file_and_on_no_command_line(server: MariaServer, tmp_path: Path) -> None:
    server.sql("create user backup identified by 'geheim'; grant reload on *.* to backup")
    options = tmp_path / "options"
    options.write_text("[client]\nuser=backup\npassword=geheim\n")
    application = Mariadb(MariadbSettings(socket=str(server.socket), options=str(options)))
    application.carry_out(at("before-freeze"))
    shown = [each.read_bytes() for each in Path("/proc").glob("[0-9]*/cmdline")]
    assert any(str(options).encode() in each for each in shown)
    assert not any(b"geheim" in each for each in shown)
    application.carry_out(at("after-thaw"))
    options.write_text("[client]\nuser=backup\npassword=falsch\n")
    with pytest.raises(RemetalError, match="Access denied for user 'backup'"):
        application.carry_out(at("before-freeze"))


def test_a_missing_client_is_said_with_its_package(server: MariaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/sbin")
    with pytest.raises(RemetalError, match="not installed: mariadb") as caught:
        made(server).carry_out(at("before-freeze"))
    assert caught.value.hint == "On Debian or Ubuntu: apt-get install mariadb-client"
