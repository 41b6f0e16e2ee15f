"""Databases that work while their disk is backed up come back whole: real servers, on the disk and on its copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.disk import fresh_disk
from lab.live.clients import postgresql_tool
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.commands.site import Site
from tests.databases import (
    Cluster,
    MariaServer,
    folder_of,
    running_mariadb,
    running_postgresql,
    running_redis,
)

SIZE = 1024 * MIB
SMALL = ("--innodb-log-file-size=8M", "--innodb-buffer-pool-size=32M")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A disk with an ext4 on all of it."""
    with fresh_disk(tmp_path / "disk.img", SIZE) as device:
        yield device


def place_of(user: str, folder: Path) -> Path:
    """Return a folder for a server's data."""
    place = folder / user
    place.mkdir(mode=0o700, exist_ok=True)
    shutil.chown(place, user, user)
    return place


def back_up(site: Site, device: Path, hooks: str) -> str:
    """Back up with these hooks and return what was told."""
    file = site.folder / "hooks.toml"
    file.write_text(hooks)
    return site.remetal("backup", "--disk", device, "--hooks", file).err


@contextmanager
def restored(site: Site) -> Iterator[Path]:
    """Mount what comes back of the last backup."""
    target = site.folder / "target.img"
    site.remetal("restore", "latest", "--map", target, "--yes")
    with attach_loop(Span(target, 0, SIZE), writable=True) as copy, mounted(copy) as folder:
        yield folder


@contextmanager
def bench(cluster: Cluster) -> Iterator[None]:
    """Let two clients transfer money, as fast as they can."""
    own = ["-h", str(cluster.socket), "-p", str(cluster.port), "-U", "postgres", "postgres"]
    postgres = {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": "/"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    tool = postgresql_tool("pgbench")
    subprocess.run([tool, "-i", "-q", *own], check=True, **postgres, **quiet)  # type: ignore[call-overload]
    with subprocess.Popen([tool, "-c", "2", "-T", "600", *own], **postgres, **quiet) as process:  # type: ignore[call-overload]
        try:
            yield
            assert process.poll() is None
        finally:
            process.kill()


def redone(log: Path) -> int:
    """Return how many bytes of its log a cluster has gone through to recover."""
    text = log.read_text()
    places = [re.search(rf"redo {what} at ([0-9A-F]+)/([0-9A-F]+)", text) for what in ("starts", "done")]
    begin, end = ((int(each[1], 16) << 32) + int(each[2], 16) for each in places if each is not None)
    return end - begin


def test_postgresql_comes_back_with_little_to_recover(site: Site, device: Path) -> None:
    with folder_of("postgres") as sockets:
        with (
            mounted(device) as folder,
            running_postgresql(place_of("postgres", folder), sockets) as cluster,
            bench(cluster),
        ):
            cluster.sql("create table before as select generate_series(1, 400000) as number")
            said = back_up(site, device, f'[[hook]]\napplication = "postgresql"\nsocket = "{sockets}"\n')
            written = int(cluster.sql("select pg_current_wal_lsn() - '0/0'"))
        assert f"hook 1 (postgresql): the cluster at port {cluster.port} has written a checkpoint" in said
        with restored(site) as folder, running_postgresql(folder / "postgres", sockets) as cluster:
            assert cluster.sql("select count(*) from before") == "400000"
            sums = (
                "(select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), "
                "(select sum(tbalance) from pgbench_tellers), (select sum(delta) from pgbench_history)"
            )
            assert len(set(cluster.sql(f"select {sums}").split("|"))) == 1
            assert int(cluster.sql("select count(*) from pgbench_history")) > 0
            assert redone(cluster.log) < 8 * MIB < written


@contextmanager
def pairs(server: MariaServer) -> Iterator[None]:
    """Write growing numbers, first to a table with transactions and then to one without."""
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            server.sql(f"insert into d.inno values ({number}); insert into d.aria values ({number})")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


def test_mariadb_comes_back_with_all_its_tables_of_one_moment(site: Site, device: Path) -> None:
    with folder_of("mysql") as own:
        with mounted(device) as folder, running_mariadb(place_of("mysql", folder), own, *SMALL) as server:
            server.sql("create database d; create table d.inno (a int) engine=innodb")
            server.sql("create table d.aria (a int) engine=aria transactional=0")
            with pairs(server):
                back_up(site, device, f'[[hook]]\napplication = "mariadb"\nsocket = "{server.socket}"\n')
            assert server.sql("select count(*) from d.inno") == server.sql("select count(*) from d.aria")
        with restored(site) as folder, running_mariadb(folder / "mysql", own, *SMALL) as server:
            assert server.sql("check table d.aria, d.inno").split() == [
                *("d.aria", "check", "status", "OK"),
                *("d.inno", "check", "status", "OK"),
            ]
            first, second = (int(server.sql(f"select count(*) from d.{each}")) for each in ("inno", "aria"))
            assert first - second in {0, 1}
            assert first > 0


def test_redis_comes_back_with_what_was_in_memory(site: Site, device: Path) -> None:
    with mounted(device) as folder, running_redis(place_of("redis", folder)) as server:
        for number in range(50):
            server.ask("set", f"key-{number}", os.urandom(100).hex())
        back_up(site, device, f'[[hook]]\napplication = "redis"\nsocket = "{server.socket}"\n')
        server.ask("set", "late", "1")
    with restored(site) as folder, running_redis(folder / "redis") as server:
        assert server.ask("dbsize") == "50"


def test_an_application_that_is_not_ready_ends_the_backup_or_is_a_warning(site: Site, device: Path) -> None:
    with mounted(device):
        file = site.folder / "hooks.toml"
        hook = '[[hook]]\napplication = "redis"\nsocket = "/run/none"\n'
        file.write_text(hook)
        said = site.remetal("backup", "--disk", device, "--hooks", file, code=1).err
        assert "hook 1 (redis) failed at before-freeze: " in said
        assert "Could not connect to Redis at /run/none" in said
        assert site.remetal("snapshots", "--json").json == []
        said = back_up(site, device, f'{hook}on-failure = "continue"\n')
        assert "warning: hook 1 (redis) failed at before-freeze: " in said
    assert len(site.remetal("snapshots", "--json").json) == 1
