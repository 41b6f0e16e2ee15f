"""Databases whose files lie in three folders, each of which may be a file system of its own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.live.clients import need_whole_tables, postgresql_tool
from lab.live.ledger import QUESTION, Shell, set_up
from tests.databases import (
    Cluster,
    MariaServer,
    as_postgres,
    running_mariadb,
    running_postgresql,
)

FOLDERS = ("data", "log", "space")
"""Where a database keeps its files: the folder itself, its log, and one table."""


def _give(user: str, *folders: Path) -> None:
    for folder in folders:
        folder.mkdir(exist_ok=True)
        shutil.chown(folder, user, user)


class SpreadPostgresql:
    """A cluster, its write-ahead log elsewhere, and a tablespace."""

    def __init__(self, top: Path) -> None:
        """Use the folders in `top`."""
        self.top = top
        self._data = top / "data/cluster"
        self._cluster: Cluster | None = None

    def make(self, clients: int) -> None:
        """Make it, with the tables of `lab.live.ledger`; it does not run."""
        _give("postgres", self.top / "run", *(self.top / name for name in FOLDERS), self.top / "space/tables")
        options = ("--auth=peer", "--data-checksums", "--no-sync", "--no-instructions")
        as_postgres([postgresql_tool("initdb"), "-D", self._data, "--waldir", self.top / "log/wal", *options])
        with self.running() as cluster:
            cluster.sql(f"CREATE TABLESPACE space LOCATION '{self.top}/space/tables'")
            cluster.sql(set_up(clients, places=("", "TABLESPACE space")))
            as_postgres([postgresql_tool("pgbench"), *self._where(), "-i", "-q", "-s", "3", "postgres"])

    @contextmanager
    def running(self) -> Iterator[Cluster]:
        """Run it for the length of a block."""
        with running_postgresql(self._data, self.top / "run") as self._cluster:
            yield self._cluster

    def shell(self) -> Shell:
        """Return its own client."""
        argv = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "psql", "-XAtq", *self._where())
        return (*argv, "postgres")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Let pgbench write as fast as it can for the length of a block."""
        argv: list[str | Path] = [postgresql_tool("pgbench"), *self._where(), "-n", "-c", "2", "-T", "600", "postgres"]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(
            argv, user="postgres", group="postgres", extra_groups=[], cwd="/", stdout=quiet, stderr=quiet
        ) as process:
            try:
                yield
            finally:
                process.kill()

    def answer(self) -> str:
        """Return what it answers to the ledger's question."""
        assert self._cluster is not None
        return self._cluster.sql(QUESTION)

    def check(self) -> None:
        """Let pg_amcheck look at every table and index, and at the checksum of each page that it reads."""
        options = ("--heapallindexed", "--install-missing")
        as_postgres([postgresql_tool("pg_amcheck"), *self._where(), *options, "postgres"])

    def _where(self) -> list[str]:
        assert self._cluster is not None
        return ["-h", str(self._cluster.socket), "-p", str(self._cluster.port)]


class SpreadMariadb:
    """A data folder, InnoDB's log elsewhere, and a table that lies in a third place."""

    def __init__(self, top: Path) -> None:
        """Use the folders in `top`."""
        self.top = top
        self._server: MariaServer | None = None

    def make(self, clients: int) -> None:
        """Make it, with the tables of `lab.live.ledger`; it does not run."""
        places = (self.top / "data/data", self.top / "log/redo", self.top / "space/tables")
        _give("mysql", self.top / "run", *(self.top / name for name in FOLDERS), *places)
        own = ["--no-defaults", f"--datadir={self.top}/data/data", f"--tmpdir={self.top}/run", self._log()]
        install = ["--user=mysql", "--auth-root-authentication-method=socket", "--skip-test-db"]
        subprocess.run(["mariadb-install-db", *own, *install], check=True, stdout=subprocess.DEVNULL)
        with self.running() as server:
            engine = f"ENGINE=InnoDB DATA DIRECTORY='{self.top}/space/tables'"
            tables = set_up(clients, places=("ENGINE=InnoDB", engine))
            noise = "CREATE TABLE noise (number int AUTO_INCREMENT PRIMARY KEY, filler text) ENGINE=InnoDB;"
            server.sql(f"CREATE DATABASE ledger; USE ledger; {tables} {noise}")

    @contextmanager
    def running(self) -> Iterator[MariaServer]:
        """Run it for the length of a block."""
        with running_mariadb(self.top / "data/data", self.top / "run", self._log()) as self._server:
            yield self._server

    def _log(self) -> str:
        return f"--innodb-log-group-home-dir={self.top}/log/redo"

    def shell(self) -> Shell:
        """Return its own client."""
        assert self._server is not None
        return ("mariadb", "--no-defaults", f"--socket={self._server.socket}", "-BNn", "ledger")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Let a client insert what does not compress, and delete some of it, for the length of a block."""
        lines = (
            "INSERT INTO noise (filler) SELECT REPEAT(MD5(RAND()), 40) FROM seq_1_to_200;\n" * 20
            + "DELETE FROM noise WHERE number < (SELECT * FROM (SELECT MAX(number) - 20000 FROM noise) AS n);\n"
        )
        quiet = subprocess.DEVNULL
        with (
            subprocess.Popen(["yes", lines], stdout=subprocess.PIPE, stderr=quiet) as statements,
            subprocess.Popen(self.shell(), stdin=statements.stdout, stdout=quiet) as client,
        ):
            try:
                yield
            finally:
                statements.kill()
                client.kill()

    def answer(self) -> str:
        """Return what it answers to the ledger's question."""
        assert self._server is not None
        return self._server.sql(f"USE ledger; {QUESTION}")

    def check(self) -> None:
        """Let mariadb-check look at every table."""
        assert self._server is not None
        argv = ["mariadb-check", "--no-defaults", f"--socket={self._server.socket}", "--extended"]
        said = subprocess.run([*argv, "--databases", "ledger"], check=True, stdout=subprocess.PIPE, text=True).stdout
        need_whole_tables(said)
