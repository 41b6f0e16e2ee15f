"""Redis writes out what it has in memory before the freeze: a real server, which then loses its power."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from remetal.applications.contract import Moment
from remetal.applications.redis import Redis, RedisSettings
from remetal.errors import RemetalError
from tests.databases import RedisServer, folder_of, running_redis


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_of("redis") as found:
        yield found


def make_ready(server: RedisServer, limit: float = 30, **settings: str) -> list[str]:
    lines: list[str] = []
    made = RedisSettings(socket=str(server.socket), **settings)  # type: ignore[arg-type]
    Redis(made).carry_out(Moment("before-freeze", limit, {}, lines.append))
    return lines


def test_what_is_in_memory_is_dumped(folder: Path) -> None:
    with running_redis(folder) as server:
        server.ask("set", "colour", "green")
        assert make_ready(server) == ["a dump was made"]
        server.ask("set", "colour", "red")
    with running_redis(folder) as server:
        assert server.ask("get", "colour") == "green"


def test_a_dump_that_has_begun_already_is_not_enough(folder: Path) -> None:
    with running_redis(folder, "--rdb-key-save-delay", "1000000") as server:
        server.ask("set", "first", "1")
        server.ask("bgsave")
        server.ask("set", "second", "2")
        assert make_ready(server) == ["a dump was made"]
    with running_redis(folder) as server:
        assert server.ask("get", "second") == "2"


@pytest.mark.parametrize("sync", ["no", "everysec", "always"])
def test_what_is_appended_needs_no_dump(folder: Path, sync: str) -> None:
    with running_redis(folder, "--appendonly", "yes", "--appendfsync", sync) as server:
        server.ask("set", "colour", "green")
        assert make_ready(server) == ["all that was written is appended"]
        assert not (folder / "dump.rdb").exists()
    with running_redis(folder, "--appendonly", "yes") as server:
        assert server.ask("get", "colour") == "green"


def test_a_dump_that_takes_too_long_is_said(folder: Path) -> None:
    with running_redis(folder, "--rdb-key-save-delay", "20000000") as server:
        server.ask("set", "colour", "green")
        began = time.monotonic()
        with pytest.raises(RemetalError, match="the server is still making a dump after 1 s"):
            make_ready(server, limit=1)
        with pytest.raises(RemetalError, match="the server is still making another dump after 1 s"):
            make_ready(server, limit=1)
        assert time.monotonic() - began < 5


def test_a_dump_that_fails_is_said(folder: Path) -> None:
    with running_redis(folder) as server:
        server.ask("set", "colour", "green")
        shutil.chown(folder, "root", "root")
        with pytest.raises(RemetalError, match="could not write: rdb_last_bgsave_status is err"):
            make_ready(server)


def test_a_password_is_in_a_file_and_on_no_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, seen = tmp_path / "secret", tmp_path / "seen"
    secret.write_text("geheim\n")
    client = tmp_path / "redis-cli"
    client.write_text(f'#!/bin/sh\necho "$*" >> {seen}\nexec /usr/bin/redis-cli "$@"\n')
    client.chmod(0o755)
    with running_redis(folder, "--requirepass", "geheim") as server:
        with pytest.raises(RemetalError, match="does not tell its state: NOAUTH"):
            make_ready(server)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin")
        assert make_ready(server, password_file=str(secret)) == ["a dump was made"]
        assert make_ready(server, password_file=str(secret), user="default") == ["a dump was made"]
        secret.write_text("falsch\n")
        with pytest.raises(RemetalError, match="the server does not tell its state"):
            make_ready(server, password_file=str(secret))
        with pytest.raises(RemetalError, match="cannot read the password in /none"):
            make_ready(server, password_file="/none")
    assert "bgsave" in seen.read_text().lower()
    assert "geheim" not in seen.read_text()


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(
        RemetalError, match="redis-cli failed with exit code 1: Could not connect to Redis at /run/none"
    ):
        Redis(RedisSettings(socket="/run/none")).carry_out(Moment("before-freeze", 5, {}, print))


def test_a_missing_client_is_said_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/sbin")
    with pytest.raises(RemetalError, match="not installed: redis-cli") as caught:
        Redis(RedisSettings()).carry_out(Moment("before-freeze", 5, {}, print))
    assert caught.value.hint == "On Debian or Ubuntu: apt-get install redis-tools"
