"""The databases' own clients on this host, which reach the one inside a machine through a port of loopback."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from lab.live.cases import LiveCase
from lab.live.ledger import QUESTION, Shell, set_up

_PLACES = {
    "postgresql": ("", "TABLESPACE space"),
    "mariadb": ("ENGINE=InnoDB", "ENGINE=InnoDB DATA DIRECTORY='/space/tables'"),
}
_NOISE = {
    "postgresql": "INSERT INTO noise SELECT repeat(md5(random()::text), 40) FROM generate_series(1, 50);",
    "mariadb": "INSERT INTO noise SELECT REPEAT(MD5(RAND()), 40) FROM seq_1_to_50;",
}


def find_shell(case: LiveCase, port: int) -> Shell:
    """Return the client that talks to the database behind a port."""
    if case.database == "postgresql":
        return ("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres")
    return ("mariadb", "--no-defaults", "-BNn", "-h127.0.0.1", f"-P{port}", "-uroot", "ledger")


def ask(shell: Shell, text: str) -> str:
    """Return what the database answers. Raises CalledProcessError."""
    return subprocess.run(shell, input=text, check=True, capture_output=True, text=True, timeout=600).stdout


def make_tables(case: LiveCase, shell: Shell, clients: int) -> None:
    """Make the tables of the ledger, and one for noise."""
    ask(shell, set_up(clients, places=_PLACES[case.database]) + "CREATE TABLE noise (filler text);")


@contextmanager
def making_noise(case: LiveCase, shell: Shell) -> Iterator[None]:
    """Let one more client insert what hardly compresses, as fast as it can, until the block is left."""
    quiet = subprocess.DEVNULL
    with (
        subprocess.Popen(["yes", _NOISE[case.database]], stdout=subprocess.PIPE) as statements,
        subprocess.Popen(shell, stdin=statements.stdout, stdout=quiet, stderr=quiet) as client,
    ):
        try:
            yield
        finally:
            statements.kill()
            client.kill()


def look_for_damage(case: LiveCase, port: int) -> str:
    """Let the database's own tool look at every table; return what it is. Raises CalledProcessError."""
    if case.database == "postgresql":
        argv = ["pg_amcheck", "--heapallindexed", "--install-missing", "-h", "127.0.0.1", "-p", str(port)]
        subprocess.run([*argv, "-U", "postgres", "postgres"], check=True, capture_output=True, timeout=900)
        return "pg_amcheck"
    argv = ["mariadb-check", "--no-defaults", "-h127.0.0.1", f"-P{port}", "-uroot", "--extended"]
    done = subprocess.run([*argv, "--databases", "ledger"], check=True, capture_output=True, text=True, timeout=900)
    need_whole_tables(done.stdout)
    return "mariadb-check"


def need_whole_tables(told: str) -> None:
    """Raise AssertionError if mariadb-check tells of anything but whole tables, and rows still to be purged."""
    lines = told.splitlines()
    tables = [line for line in lines if line.startswith("ledger.")]
    odd = [line for line in lines if line.startswith(("Warning", "Error", "error", "note", "info"))]
    assert all("InnoDB: Unpurged" in line for line in odd), told
    assert tables, told
    assert sum(line.endswith("OK") for line in lines) == len(tables), told


def read_ledger(shell: Shell) -> str:
    """Return what the database answers to the ledger's question."""
    return ask(shell, QUESTION)
