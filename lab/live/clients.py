"""The databases' own clients on this host, which reach the one inside a machine through a port of loopback."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lab.live.cases import LiveCase
from lab.live.ledger import QUESTION, Shell, set_up

_PLACES = {
    "postgresql": ("", "TABLESPACE space"),
    "mariadb": ("ENGINE=InnoDB", "ENGINE=InnoDB DATA DIRECTORY='/space/tables'"),
}
_NOISE = "REPLACE INTO noise SELECT FLOOR(RAND() * 20000), REPEAT(MD5(RAND()), 40) FROM seq_1_to_50;"
"""Rows are replaced, since it goes on for as long as backups take, and the volume is small."""
_SCALE = 3
"""How many hundred thousand accounts pgbench has."""


def postgresql_tool(name: str) -> Path:
    """Return a program of the newest PostgreSQL that is installed."""
    return max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda each: int(each.parts[4]))


def find_shell(case: LiveCase, port: int) -> Shell:
    """Return the client that talks to the database behind a port."""
    if case.database == "postgresql":
        return ("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres")
    return ("mariadb", "--no-defaults", "-BNn", "-h127.0.0.1", f"-P{port}", "-uroot", "ledger")


def ask(shell: Shell, text: str) -> str:
    """Return what the database answers. Raises CalledProcessError."""
    return subprocess.run(shell, input=text, check=True, capture_output=True, text=True, timeout=600).stdout


def make_tables(case: LiveCase, shell: Shell, port: int, clients: int) -> None:
    """Make the tables of the ledger, and those for noise."""
    ask(shell, set_up(clients, places=_PLACES[case.database]))
    if case.database == "postgresql":
        subprocess.run([*_pgbench(port), "-i", "-q", "-s", str(_SCALE)], check=True, capture_output=True, timeout=1800)
    else:
        ask(shell, "CREATE TABLE noise (id INT PRIMARY KEY, filler TEXT);")


@contextmanager
def making_noise(case: LiveCase, shell: Shell, port: int) -> Iterator[None]:
    """Let others write as fast as they can until the block is left: pgbench, or who replaces what hardly compresses."""
    quiet = subprocess.DEVNULL
    with ExitStack() as stack:
        if case.database == "postgresql":
            argv, source = [*_pgbench(port), "-n", "-c", "2", "-T", "36000"], None
        else:
            statements = stack.enter_context(subprocess.Popen(["yes", _NOISE], stdout=subprocess.PIPE))
            stack.callback(statements.kill)
            argv, source = [*shell], statements.stdout
        client = stack.enter_context(subprocess.Popen(argv, stdin=source, stdout=quiet, stderr=quiet))
        stack.callback(client.kill)
        yield
        assert client.poll() is None, f"{argv[0]} has ended by itself"


def _pgbench(port: int) -> list[str]:
    return [str(postgresql_tool("pgbench")), "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "postgres"]


def look_for_damage(case: LiveCase, port: int) -> str:
    """Let the database's own tool look at every table; return what it is. Raises CalledProcessError."""
    if case.database == "postgresql":
        argv = [
            str(postgresql_tool("pg_amcheck")),
            "--heapallindexed",
            "--install-missing",
            "-h",
            "127.0.0.1",
            "-p",
            str(port),
        ]
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
