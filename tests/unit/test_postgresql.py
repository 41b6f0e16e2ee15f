"""PostgreSQL is made ready for a backup: real clusters, as the user postgres."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from remetal.applications.contract import Moment
from remetal.applications.postgresql import Postgresql, PostgresqlSettings
from remetal.errors import RemetalError
from tests.databases import Cluster, folder_of, running_postgresql


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with folder_of("postgres") as folder, running_postgresql(folder / "data", folder) as found:
        yield found


def make_ready(limit: float = 30, **settings: object) -> list[str]:
    lines: list[str] = []
    made = PostgresqlSettings(**settings)  # type: ignore[arg-type]
    Postgresql(made).carry_out(Moment("before-freeze", limit, {}, lines.append))
    return lines


def test_what_was_written_is_in_a_checkpoint(cluster: Cluster) -> None:
    cluster.sql("create table numbers as select generate_series(1, 100000) as number")
    written = cluster.sql("select pg_current_wal_lsn()")
    assert make_ready(socket=str(cluster.socket)) == [f"the cluster at port {cluster.port} has written a checkpoint"]
    assert cluster.sql(f"select redo_lsn >= '{written}' from pg_control_checkpoint()") == "t"
    assert cluster.sql("select count(*) from pg_stat_activity where application_name = 'psql'") == "1", "itself"


def test_all_clusters_are_made_ready_or_those_that_are_named(cluster: Cluster) -> None:
    with folder_of("postgres") as folder, running_postgresql(folder / "data", cluster.socket) as other:
        said = [f"the cluster at port {each} has written a checkpoint" for each in sorted([other.port, cluster.port])]
        assert sorted(make_ready(socket=str(cluster.socket))) == said
        assert len(make_ready(socket=str(cluster.socket), ports=(other.port,))) == 1


def test_one_that_crashed_is_none(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(tmp_path / ".s.PGSQL.5432"))
    (tmp_path / ".s.PGSQL.5432.lock").touch()
    assert make_ready(socket=str(tmp_path)) == [f"no cluster runs in {tmp_path}"]


def test_one_that_is_named_and_does_not_run_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(
        RemetalError, match=r"psql failed with exit code 2: .*\.PGSQL\.1.* failed: No such file"
    ) as caught:
        make_ready(socket=str(cluster.socket), ports=(1,))
    assert "The command was: /usr/bin/psql" in caught.value.hint


def test_a_user_that_is_not_there_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(RemetalError, match="there is no user 'nobody-such'"):
        make_ready(socket=str(cluster.socket), user="nobody-such")


def test_a_server_of_another_user_is_told_nothing(tmp_path: Path) -> None:
    """What takes connections there is root's, and would hear what is said to it."""
    listen = (
        "import socket, sys; ours = socket.socket(socket.AF_UNIX); ours.bind(sys.argv[1]); ours.listen(); "
        "print('ready', flush=True); ours.accept(); print(ours.accept()[0].recv(100), flush=True)"
    )
    with folder_of("postgres") as folder:
        argv: list[str | Path] = [sys.executable, "-c", listen, folder / ".s.PGSQL.5432"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            (folder / ".s.PGSQL.5432").chmod(0o777)
            with pytest.raises(
                RemetalError, match='requirepeer specifies "postgres", but actual peer user name is "root"'
            ):
                make_ready(socket=str(folder))
            assert server.stdout.readline() == "b''\n"


def test_one_that_does_not_answer_is_left_when_the_time_is_over(cluster: Cluster) -> None:
    pid = int((cluster.data / "postmaster.pid").read_text().split()[0])
    subprocess.run(["kill", "-STOP", str(pid)], check=True)
    try:
        with pytest.raises(RemetalError, match=r"psql did not end within (1|0\.9+) s and was stopped"):
            make_ready(socket=str(cluster.socket), limit=1)
    finally:
        subprocess.run(["kill", "-CONT", str(pid)], check=True)


def test_a_missing_client_is_said_with_its_package(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/sbin")
    with pytest.raises(RemetalError, match="not installed: psql") as caught:
        make_ready(socket=str(cluster.socket))
    assert caught.value.hint == "On Debian or Ubuntu: apt-get install postgresql-client"
