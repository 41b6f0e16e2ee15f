"""Clocks that are off by an hour or a decade, go backwards, or jump amid a command: nothing is lost by any of that.

Several hosts, each with a clock of its own, run the real commands in turn on one repository; among them two that are at
work at the same time, one with a backup, one with a prune.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path

import pytest

from remetal.errors import UnavailableError
from remetal.repository import encoder
from remetal.repository.check import check_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.prune import prune_machine
from remetal.repository.session import open_session
from tests.faults.campaign import need_listed
from tests.faults.counting import StartCount
from tests.faults.test_system_calls import Place
from tests.repositories import CHUNK, PASSPHRASE, backup, make_site, noise, write

HOUR, DAY, DECADE = 3600.0, 86400.0, 10 * 365.25 * 86400.0
OFFSETS = (0.0, HOUR, -HOUR, DECADE, -DECADE, 40.0, -90.0)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)
    patch.setattr(encoder, "PACKS_PER_INDEX", 2)
    patch.setattr("remetal.repository.slots.MEMORY_KIB", 1 << 10)
    yield
    patch.undo()


@dataclass
class Host:
    """A computer whose clock is wrong by `offset` seconds, and after so many looks at it by `then`."""

    name: str
    offset: float = 0.0
    looks: int = 0
    then: float | None = None
    boots: int = 1
    booted: float = 0.0

    def read(self, true: float) -> float:
        """Return what the clock shows."""
        if self.then is not None:
            self.looks -= 1
            if self.looks <= 0:
                self.offset, self.then = self.then, None
        return true + self.offset


@dataclass
class Sky:
    """The true time, and the hosts below it."""

    true: float = 1.8e9
    hosts: list[Host] = field(default_factory=list)

    @contextmanager
    def on(self, host: Host) -> Iterator[None]:
        """Let this process be that host for the length of a block."""

        class Moment(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
                return datetime.fromtimestamp(host.read(self.true), tz or UTC)

        def read_text(path: str) -> str:
            return {"/etc/machine-id": host.name}.get(path, f"{host.name}, boot {host.boots}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: host.read(self.true))
            patch.setattr(time, "clock_gettime", lambda which: self.true - host.booted)
            patch.setattr("remetal.repository.repository.datetime", Moment)
            for module in ("clocks", "locks"):
                patch.setattr(f"remetal.repository.{module}.read_text", read_text)
            yield


class Run:
    """One run of the campaign: hosts, a repository, and what must still be there."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.sky = Sky(hosts=[Host(f"host-{n}", self.chance.choice(OFFSETS)) for n in range(3)])
        self.place = Place(folder)
        self.folder = folder
        self.data: dict[str, bytes] = {}
        self.kept: dict[str, list[str]] = {}
        self.told = self.faults = 0

    def step(self) -> None:
        """Let some time pass, a clock jump maybe, and a host do something."""
        host = self.chance.choice(self.sky.hosts)
        self.sky.true += self.chance.choice((1.0, 60.0, HOUR, DAY, 9 * DAY))
        if self.chance.random() < 0.4:
            self.faults += 1
            host.then, host.looks = self.chance.choice(OFFSETS), self.chance.randrange(6)
        if self.chance.random() < 0.2:
            host.boots, host.booted = host.boots + 1, self.sky.true
        work = self.chance.choice((self.backup, self.backup, self.forget, self.prune, self.copy, self.overlap))
        with self.sky.on(host):
            work(host)

    def run(self, *words: str) -> bool:
        """Run a command; return whether it did what it should. It may be refused, and must then say so."""
        code, said = self.place.run(*words)
        assert code in {0, 6}, said
        self.told += code != 0
        return code == 0

    def backup(self, host: Host) -> None:
        data = noise(f"{self.chance.randrange(6)}", 2) + noise(f"{self.chance.random()}", 1)
        disk = self.folder / "disk.img"
        disk.write_bytes(data)
        if self.run("backup", "--machine", host.name, "--disk", str(disk)):
            self.note(host, data)

    def note(self, host: Host, data: bytes) -> None:
        fresh = [each for each in self.place.listed(host.name) if each not in self.data]
        assert len(fresh) == 1, "a snapshot that was acknowledged is not there"
        self.data[fresh[0]] = data
        self.kept.setdefault(host.name, []).append(fresh[0])

    def forget(self, host: Host) -> None:
        """The machine's newest two must stay, whatever their times say; by days, its newest at least."""
        last = self.chance.random() < 0.5
        owner = self.chance.choice(self.sky.hosts).name
        policy = ("--keep-last", "2") if last else ("--keep-daily", "2")
        if owner in self.kept and self.run("forget", "--machine", owner, *policy):
            there = self.place.listed(owner)
            gone = [each for each in self.kept[owner] if each not in there]
            assert not set(gone) & set(self.kept[owner][-2 if last else -1 :]), "the newest was forgotten"
            self.kept[owner] = [each for each in self.kept[owner] if each in there]

    def prune(self, host: Host) -> None:
        self.run("prune", "--grace", self.chance.choice(("0s", "1h", "7d")), "--max-unused", "0")

    def copy(self, host: Host) -> None:
        self.run("copy", "--to", str(self.folder / "copy"), "--delete")
        if (self.folder / "copy" / "config").exists():
            assert check_repository(self.place.site(self.folder / "copy").repository, keys=None).problems == []

    def overlap(self, host: Host) -> None:
        """A backup is at work; on another host, whose clock takes its lock for dead, a prune goes ahead."""
        site = self.place.site(machine=host.name)
        if site.keys.stored is None:
            return
        other = self.chance.choice([each for each in self.sky.hosts if each is not host])
        data = noise(f"{self.chance.randrange(6)}", 2)
        try:
            with open_session(site.repository, site.keys, workers=1) as session:
                write(session, data)
                with self.sky.on(other):
                    self.run("prune", "--grace", "0s", "--max-unused", "0")
                session.commit(layout=b"{}", hostname=host.name)
        except UnavailableError:
            self.told += 1
        else:
            self.note(host, data)

    def need_sound(self) -> None:
        expected = {each: self.data[each] for kept in self.kept.values() for each in kept}
        site = self.place.site()
        need_listed(site, expected, {})
        assert check_repository(site.repository, keys=site.key, read_data=True).problems == []


def run_campaign(folder: Path, seeds: range, counts: StartCount, steps: int = 14) -> None:
    count = counts("wrong clocks")
    for seed in seeds:
        place = Place(folder / "run")
        place.folder.mkdir()
        (place.folder / "passphrase").write_text(PASSPHRASE + "\n")
        run = Run(place.folder, seed)
        with run.sky.on(run.sky.hosts[0]):
            place.need("init", "--chunk-size", "64K")
        with count.case(seed, faults=0):
            for _ in range(steps):
                run.step()
            run.need_sound()
            run.sky.true += 30 * DAY
            calm = Host("calm")
            with run.sky.on(calm):
                run.backup(calm)
                assert run.run("prune", "--grace", "0s")
            run.need_sound()
        count.faults += run.faults
        count.detected += run.told
        shutil.rmtree(place.folder)


def test_some_days_with_wrong_clocks(tmp_path: Path, counts: StartCount) -> None:
    run_campaign(tmp_path, range(4), counts)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_many_days_with_wrong_clocks(tmp_path: Path, counts: StartCount) -> None:
    run_campaign(tmp_path, range(100, 300), counts)


@pytest.mark.parametrize(
    "offsets",
    [(0.0, HOUR), (0.0, -DECADE), (-DECADE, 0.0, DECADE), tuple(n * DECADE for n in range(-5, 6))],
    ids=["an hour", "a decade", "three hosts", "eleven hosts"],
)
def test_hosts_that_disagree_do_not_end_the_grace_period(offsets: tuple[float, ...], counts: StartCount) -> None:
    """Whoever looks, in whatever order: what is condemned stays until the time has passed on one and the same host."""
    count = counts("hosts whose clocks disagree")
    site = make_site()
    made = [backup(site, noise(name, 2), workers=1) for name in ("old", "new")]
    sky = Sky(hosts=[Host(f"host {number}", offset) for number, offset in enumerate(offsets)])
    grace = 1000.0

    def prune(host: Host) -> int:
        before = len(list(site.store.entries("packs/")))
        with sky.on(host):
            prune_machine(site.repository, site.key, site.keys.machine_id, grace=grace)
        return before - len(list(site.store.entries("packs/")))

    with sky.on(sky.hosts[0]):
        forget_snapshots(site.repository, site.key, [made[0].id])
    rising = sorted(sky.hosts, key=lambda host: host.offset)
    for turn in range(44):
        sky.true += 10
        with count.case(turn):
            assert prune(rising[turn % len(rising)]) == 0, "it was deleted before its time"
            if turn % 11 == 10:
                rising[0].boots, rising[0].booted = rising[0].boots + 1, sky.true
    sky.true += grace
    assert prune(Host("another one", 3 * DECADE)) == 0, "it was deleted by a host that has not seen it before"
    assert prune(rising[-1]) > 0
    need_listed(site, {made[1].id: noise("new", 2)}, {})
