"""PostgreSQL: a checkpoint before the freeze, so that a restored cluster has little to recover.

A cluster recovers from a power cut at any moment, and one that is restored is as after one: whatever was committed
before the freeze is there, as long as data, tablespaces and WAL all lie on what is captured.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

from remetal.applications.contract import Moment, Phase, Settings
from remetal.errors import RefusedError
from remetal.system.limited import run_within

_SOCKET = ".s.PGSQL."


class PostgresqlSettings(Settings, frozen=True, kw_only=True):
    """`user` is the user and the role that asks; `socket` the folder of the clusters' sockets; `ports` theirs.

    Without ports all clusters are meant that run there. A password, if one is needed, is in the user's ~/.pgpass.
    """

    user: str = "postgres"
    socket: str = "/run/postgresql"
    ports: tuple[int, ...] = ()


class Postgresql:
    """The clusters of this machine."""

    name = "postgresql"
    phases: tuple[Phase, ...] = ("before-freeze",)

    def __init__(self, settings: PostgresqlSettings) -> None:
        self._settings = settings

    def carry_out(self, moment: Moment) -> None:
        """Let each cluster write out what it has in memory."""
        ports = self._settings.ports or tuple(self._running())
        if not ports:
            moment.tell(f"no cluster runs in {self._settings.socket}")
        for port in ports:
            self._checkpoint(port, moment)
            moment.tell(f"the cluster at port {port} has written a checkpoint")

    def _running(self) -> Iterator[int]:
        """Yield the ports of the clusters that take connections; sockets of others were left by a crash."""
        for path in sorted(Path(self._settings.socket).glob(f"{_SOCKET}*")):
            port = path.name.removeprefix(_SOCKET)
            if port.isdecimal() and _listens(path):
                yield int(port)

    def _checkpoint(self, port: int, moment: Moment) -> None:
        user = self._settings.user
        asked = {
            "host": self._settings.socket,
            "port": str(port),
            "user": user,
            "dbname": "postgres",
            "requirepeer": user,  # nobody else's server is asked, or told a password
        }
        options = ["-X", "-A", "-t", "-w", "-v", "ON_ERROR_STOP=1"]
        where = " ".join(f"{key}={_quoted(value)}" for key, value in asked.items())
        run_within(moment.left(), ["psql", *options, "-d", where, "-c", "CHECKPOINT"], env={}, user=user)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ours:
        try:
            ours.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError as error:
            raise RefusedError(f"cannot ask who listens at {path}: {error.strerror or error}") from error
    return True


def _quoted(value: str) -> str:
    """Return a value as libpq's connection strings take it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
