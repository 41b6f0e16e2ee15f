"""Transactions that are committed one after the other, and the list of those that the database has acknowledged.

A client writes number after number, each in a transaction of its own that touches two tables, and takes the next one
only once the last was acknowledged. So a copy of the database that is of one moment holds some number of first ones in
both tables: all that were acknowledged before that moment, and at most one more than at the next.
"""

from __future__ import annotations

import subprocess
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, TypeAlias

ACCOUNTS = 100
"""How many rows of the second table a client writes to in turn."""

QUESTION = (
    "SELECT 'entries', client, count(*), max(number) FROM entries GROUP BY client; "
    "SELECT 'accounts', client, account, number FROM accounts;\n"
)
"""What `check` wants to know, as rows of fields with bars or tabs between them."""


Shell: TypeAlias = tuple[str, ...]
"""What starts the database's own client, which reads statements and prints bare rows."""


class Client:
    """One that commits, in a thread, until it is stopped or the database is gone."""

    def __init__(self, shell: Shell, number: int) -> None:
        self.number = number
        self.sent = 0
        self.acknowledged = 0
        self.waited = 0.0
        """The longest that an acknowledgement took, in seconds."""
        self._sent_at: list[float] = []
        self._acknowledged_at: list[float] = []
        self._shell = shell
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._commit, name=f"client-{number}")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Take no further transaction; return when the last is over."""
        self._ended.set()
        self._thread.join()

    def at(self, moment: float) -> tuple[int, int]:
        """Return how many transactions had been acknowledged, and how many sent, by a moment of time.monotonic()."""
        return bisect_right(self._acknowledged_at, moment), bisect_right(self._sent_at, moment)

    def _commit(self) -> None:
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(self._shell, stdin=pipe, stdout=pipe, stderr=quiet) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            while not self._ended.is_set():
                began = time.monotonic()
                self._sent_at.append(began)
                self.sent += 1
                if not _ask(process.stdin, process.stdout, self._transaction(self.sent), self.sent):
                    return  # the database is gone, with or without this transaction
                self.acknowledged = self.sent
                self._acknowledged_at.append(time.monotonic())
                self.waited = max(self.waited, self._acknowledged_at[-1] - began)

    def _transaction(self, number: int) -> str:
        who, account = self.number, number % ACCOUNTS
        return (
            f"BEGIN; INSERT INTO entries VALUES ({who}, {number}, repeat('{number % 10}', 500)); "
            f"UPDATE accounts SET number = {number} WHERE client = {who} AND account = {account}; COMMIT; "
            f"SELECT 'done {number}';\n"
        )


def _ask(stdin: IO[bytes], stdout: IO[bytes], question: str, number: int) -> bool:
    try:
        stdin.write(question.encode())
        stdin.flush()
        return stdout.readline().strip() == f"done {number}".encode()
    except BrokenPipeError:
        return False


def set_up(clients: int, *, places: tuple[str, str] = ("", "")) -> str:
    """Return the statements that make the tables; `places` are what follows each one's columns."""
    rows = ", ".join(f"({client}, {account}, 0)" for client in range(clients) for account in range(ACCOUNTS))
    return f"""
        CREATE TABLE entries (client int, number int, filler text, PRIMARY KEY (client, number)) {places[0]};
        CREATE TABLE accounts (client int, account int, number int, PRIMARY KEY (client, account)) {places[1]};
        INSERT INTO accounts VALUES {rows};
    """


def check(answer: str) -> dict[int, int]:
    """Return how many transactions of each client are there, from what the database answers to `QUESTION`.

    Raises AssertionError if one is missing, or is in one of the tables only.
    """
    rows = [line.replace("|", "\t").split("\t") for line in answer.splitlines() if line.strip()]
    found = {}
    for client, count, last in (map(int, row[1:]) for row in rows if row[0] == "entries"):
        assert count == last, f"client {client}: {count} entries, the last of transaction {last}"
        found[client] = count
    for client, account, number in (map(int, row[1:]) for row in rows if row[0] == "accounts"):
        count = found.setdefault(client, 0)
        expected = max(count - (count - account) % ACCOUNTS, 0)
        assert number == expected, f"client {client}, account {account}: of transaction {number}, not {expected}"
    return found


@contextmanager
def committing(shell: Shell, clients: int) -> Iterator[list[Client]]:
    """Let clients commit until the block is left."""
    found = [Client(shell, number) for number in range(clients)]
    with ExitStack() as stack:
        for each in found:
            each.start()
            stack.callback(each.stop)
        yield found
