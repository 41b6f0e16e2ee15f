"""Real database servers, each in a folder of its own and as its own user, for the length of a block."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.live.clients import postgresql_tool
from tests.servers import free_port


@contextmanager
def folder_of(user: str) -> Iterator[Path]:
    """Make a folder that a user owns and can reach; those of pytest are for root alone."""
    folder = Path(tempfile.mkdtemp(prefix="remetal-"))
    try:
        shutil.chown(folder, user, user)
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL cluster: the folder of its socket, its port, its data and its log."""

    socket: Path
    port: int
    data: Path
    log: Path

    def sql(self, text: str) -> str:
        """Return what the server answers."""
        where = f"host={self.socket} port={self.port} dbname=postgres"
        return as_postgres(["psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", where, "-c", text]).strip()


def as_postgres(argv: Sequence[str | Path]) -> str:
    """Run a program as the user postgres and return what it prints."""
    done = subprocess.run(
        argv, user="postgres", group="postgres", extra_groups=[], cwd="/", check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


@contextmanager
def running_postgresql(data: Path, socket: Path, *options: str) -> Iterator[Cluster]:
    """Run a cluster, which is made first if there is none in `data`; it is stopped as by a power cut."""
    if not (data / "PG_VERSION").exists():
        as_postgres([postgresql_tool("initdb"), "-D", data, "--auth=peer", "--no-instructions"])
    port = free_port()
    log = socket / f"log-{port}"
    said = f"-p {port} -k {socket} -c listen_addresses='' {' '.join(options)}"
    control: list[str | Path] = [postgresql_tool("pg_ctl"), "-D", data, "-s"]
    try:
        as_postgres([*control, "-l", log, "-o", said, "-w", "start"])
    except subprocess.CalledProcessError as error:
        raise AssertionError(log.read_text() if log.exists() else "no log") from error
    try:
        yield Cluster(socket, port, data, log)
    finally:
        process = Path("/proc", (data / "postmaster.pid").read_text().split()[0])
        as_postgres([*control, "-m", "immediate", "-w", "stop"])
        for _ in range(600):  # its number stands in the copies of its data: nobody else may seem to be it
            if not process.exists():
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"{process} does not end")


@dataclass(frozen=True)
class MariaServer:
    """A MariaDB server, which root may ask everything through its socket."""

    socket: Path
    process: subprocess.Popen[bytes]

    def sql(self, text: str) -> str:
        """Return what the server answers, columns apart by tabs."""
        return subprocess.run(self.argv(text), check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    def argv(self, text: str) -> list[str]:
        """Return what asks the server."""
        return ["mariadb", "--no-defaults", f"--socket={self.socket}", "--batch", "--skip-column-names", "-e", text]


@contextmanager
def running_mariadb(data: Path, folder: Path, *options: str) -> Iterator[MariaServer]:
    """Run a server, whose data are made first if there are none; it is stopped as by a power cut."""
    own = ["--no-defaults", f"--datadir={data}", f"--tmpdir={folder}"]
    if not (data / "mysql").exists():
        argv = [
            "mariadb-install-db",
            *own,
            "--user=mysql",
            "--auth-root-authentication-method=socket",
            "--skip-test-db",
        ]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    socket = folder / "socket"
    argv = ["mariadbd", *own, f"--socket={socket}", f"--pid-file={folder / 'pid'}", "--skip-networking", *options]
    with (
        (folder / "log").open("ab") as log,
        subprocess.Popen(argv, user="mysql", group="mysql", extra_groups=[], stdout=log, stderr=log) as process,
    ):
        server = MariaServer(socket, process)
        try:
            wait_until(lambda: answers(server.argv("select 1")), process)
            yield server
        finally:
            process.kill()


def answers(argv: Sequence[str | Path]) -> bool:
    """Whether a program ends well."""
    return subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for a server that is starting."""
    for _ in range(600):
        if ready():
            return
        assert process.poll() is None, "the server has ended"
        time.sleep(0.1)
    raise AssertionError("the server does not answer")


@dataclass(frozen=True)
class RedisServer:
    """A Redis server, its socket and the folder of its files."""

    socket: Path
    folder: Path
    process: subprocess.Popen[bytes]

    def ask(self, *words: str) -> str:
        """Return what the server answers."""
        argv = ["redis-cli", "-s", str(self.socket), *words]
        return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@contextmanager
def running_redis(folder: Path, *options: str) -> Iterator[RedisServer]:
    """Run a server that writes nothing unless it is asked to; it is stopped as by a power cut."""
    socket = folder / "socket"
    argv = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", "", *options]
    with (
        (folder / "log").open("ab") as log,
        subprocess.Popen(
            argv, user="redis", group="redis", extra_groups=[], cwd=folder, stdout=log, stderr=log
        ) as process,
    ):
        try:
            wait_until(lambda: answers(["redis-cli", "-s", socket, "ping"]), process)
            yield RedisServer(socket, folder, process)
        finally:
            process.kill()
