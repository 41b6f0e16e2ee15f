"""MariaDB and MySQL: all tables are locked for reading from before the freeze until after it.

InnoDB would recover from a power cut at any moment; what MyISAM and Aria hold, the files of tables and the position in
the binary log are of one moment only if nothing is written. The lock belongs to a session, and is given up with it:
when remetal is gone, and by the server itself when the session has been silent for as long as the limit.

Source: FLUSH TABLES, lock_wait_timeout and wait_timeout in the manuals of MariaDB 10.11 and MySQL 8.0.
"""

from __future__ import annotations

import math
import os
import select
from contextlib import ExitStack
from pathlib import Path

from remetal.applications.contract import Moment, Phase, Settings
from remetal.errors import RemetalError
from remetal.system.limited import attended
from remetal.system.run import Process, find_program, presentable

_BATCH = ("--batch", "--skip-column-names", "--unbuffered", "--skip-reconnect")
_LOCKED, _RELEASED = b"remetal: locked", b"remetal: released"
_BRIEF = 2.0
"""Seconds in which a client whose server has ended its session says so."""


class MariadbSettings(Settings, frozen=True, kw_only=True):
    """Where the server is and who asks, as the client's own files say unless it is said here.

    `options` is a file as /root/.my.cnf is one, with a password if it takes one; it needs the privilege RELOAD.
    """

    user: str | None = None
    socket: str | None = None
    options: str | None = None

    @property
    def trusted(self) -> tuple[str, ...]:
        """The options, which may make the client load whatever they name."""
        return () if self.options is None else (self.options,)


class Mariadb:
    """A server of this machine, and the session that holds its lock."""

    name = "mariadb"
    phases: tuple[Phase, ...] = ("before-freeze", "after-thaw")

    def __init__(self, settings: MariadbSettings) -> None:
        self._settings = settings
        self._session = ExitStack()
        self._client: Process | None = None

    def carry_out(self, moment: Moment) -> None:
        """Lock all tables, or make sure that they were locked until now, and release them."""
        if moment.phase == "before-freeze":
            self._lock(moment)
        elif self._client is not None:
            self._release(self._client, moment)

    def _lock(self, moment: Moment) -> None:
        seconds = math.ceil(moment.limit)
        # the server gives up before we do, so that it says for what it has waited
        patience = max(seconds - 1, 1)
        client = self._session.enter_context(attended(self._argv(), env={"HOME": str(Path.home())}))
        try:
            _tell(client, f"SET SESSION lock_wait_timeout = {patience}, wait_timeout = {seconds};")
            _tell(client, f"FLUSH TABLES WITH READ LOCK; SELECT '{_LOCKED.decode()}';")
            _expect(client, _LOCKED, moment)
        except BaseException:
            self._session.close()
            raise
        self._client = client

    def _release(self, client: Process, moment: Moment) -> None:
        self._client = None
        with self._session:
            _tell(client, f"UNLOCK TABLES; SELECT '{_RELEASED.decode()}';")
            try:
                _expect(client, _RELEASED, moment)
            except RemetalError as error:
                raise RemetalError(
                    f"the tables were not locked until the end: {error.message}",
                    hint="The lock is given up after as many seconds as the limit: a higher one is limit = 60.",
                ) from error

    def _argv(self) -> list[str]:
        asked = self._settings
        files = [] if asked.options is None else [f"--defaults-extra-file={asked.options}"]
        where = [] if asked.socket is None else [f"--socket={asked.socket}"]
        who = [] if asked.user is None else [f"--user={asked.user}"]
        client = "mariadb" if find_program("mariadb") or not find_program("mysql") else "mysql"
        return [client, *files, *_BATCH, *where, *who]


def _tell(client: Process, text: str) -> None:
    assert client.stdin is not None
    try:
        os.write(client.stdin.fileno(), f"{text}\n".encode())
    except BrokenPipeError:
        return  # it has ended, and what it said is read next


def _expect(client: Process, wanted: bytes, moment: Moment) -> None:
    """Wait for the line that is wanted. Raises RemetalError with what the client says if there is none in time."""
    assert client.stdout is not None
    said = b""
    while wanted not in said:
        if not select.select([client.stdout], [], [], moment.left())[0]:
            raise RemetalError(f"the server has not answered for {moment.limit:g} s")
        data = os.read(client.stdout.fileno(), 4096)
        if not data:
            raise RemetalError(f"the client has ended: {_complaint(client)}")
        said = (said + data)[-4096:]


def _complaint(client: Process) -> str:
    """Return the last of what a client has said that has ended."""
    assert client.stderr is not None
    ready = select.select([client.stderr], [], [], _BRIEF)[0]
    text = os.read(client.stderr.fileno(), 4096).decode("utf-8", "replace") if ready else ""
    return " / ".join(line for line in map(presentable, text.splitlines()[-3:]) if line) or "without a word"
