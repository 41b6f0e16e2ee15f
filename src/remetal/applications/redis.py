"""Redis: what is in memory is in a file before the freeze.

Where everything that is written is appended to a file (AOF), what was answered is in it already, unless the disk could
not keep up; that is waited for. Elsewhere a new dump is made, and waited for. The freeze makes either durable. What is
written after the dump has begun is not in it: Redis would lose it in a power cut, too.

Source: INFO, BGSAVE and the persistence of Redis 7.0 in its manual.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from remetal.applications.contract import Moment, Phase, Settings
from remetal.errors import RefusedError, RemetalError
from remetal.system.limited import run_within
from remetal.system.run import presentable

_TICK = 0.1
_BUSY = re.compile("already in progress|Another child process")


class RedisSettings(Settings, frozen=True, kw_only=True):
    """Where the server is and who asks. `password_file` holds the password and nothing else."""

    host: str = "127.0.0.1"
    port: int = 6379
    socket: str | None = None
    user: str | None = None
    password_file: str | None = None

    @property
    def trusted(self) -> tuple[str, ...]:
        """The password, which is nobody else's business."""
        return () if self.password_file is None else (self.password_file,)


class Redis:
    """A server of this machine."""

    name = "redis"
    phases: tuple[Phase, ...] = ("before-freeze",)

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings

    def carry_out(self, moment: Moment) -> None:
        """Let the server write out what it has in memory, and wait for it."""
        if self._persistence(moment).get("aof_enabled") == "1":
            self._wait(moment, "appending what was written", "aof_buffer_length")
            self._need_ok("aof_last_write_status", moment)
            moment.tell("all that was written is appended")
        else:
            self._save(moment)
            self._wait(moment, "making a dump", "rdb_bgsave_in_progress")
            self._need_ok("rdb_last_bgsave_status", moment)
            moment.tell("a dump was made")

    def _save(self, moment: Moment) -> None:
        """Begin a dump; one that is being made already has begun too early."""
        while _BUSY.search(said := self._ask("BGSAVE", moment=moment)):
            _pause(moment, "making another dump")
        if not said.startswith("Background saving started"):
            raise RemetalError(f"the server makes no dump: {presentable(said)}")

    def _wait(self, moment: Moment, what: str, field: str) -> None:
        """Wait until a field of the server's state is 0."""
        while self._persistence(moment).get(field) != "0":
            _pause(moment, what)

    def _need_ok(self, field: str, moment: Moment) -> None:
        status = self._persistence(moment).get(field)
        if status != "ok":
            raise RemetalError(f"the server could not write: {field} is {status}", hint="Its log tells why.")

    def _persistence(self, moment: Moment) -> dict[str, str]:
        """Return what the server says about its files."""
        lines = self._ask("INFO", "persistence", moment=moment).splitlines()
        found = {key: value for key, _, value in (line.partition(":") for line in lines)}
        if "aof_enabled" not in found:
            raise RemetalError(f"the server does not tell its state: {presentable(' '.join(lines[:3]))}")
        return found

    def _ask(self, *words: str, moment: Moment) -> str:
        asked = self._settings
        where = ["-s", asked.socket] if asked.socket else ["-h", asked.host, "-p", str(asked.port)]
        who = ["--user", asked.user] if asked.user else []
        argv = ["redis-cli", "--no-auth-warning", *where, *who, *words]
        return run_within(moment.left(), argv, env=self._secret()).text.strip()

    def _secret(self) -> dict[str, str]:
        """Return the environment that tells the password: it is on no command line."""
        path = self._settings.password_file
        if path is None:
            return {}
        try:
            return {"REDISCLI_AUTH": Path(path).read_text("utf-8").strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise RefusedError(f"cannot read the password in {path}: {error}") from error


def _pause(moment: Moment, what: str) -> None:
    """Wait a little. Raises RemetalError if that would be too long."""
    if moment.left() < 2 * _TICK:
        raise RemetalError(f"the server is still {what} after {moment.limit:g} s")
    time.sleep(_TICK)
