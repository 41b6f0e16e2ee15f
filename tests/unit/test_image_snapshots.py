"""Which volumes are read from LVM snapshots, with how much room, what the kernel tells of snapshots and pools, and that
they are watched until they are dropped, whatever who reads is busy with."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from lab.disk import fresh_disk
from remetal.errors import UnavailableError
from remetal.events import Report, silent
from remetal.image.extents import probe_used
from remetal.image.live import LiveVolume, Manner, Moment, capture_live
from remetal.image.ranges import Extents
from remetal.image.snapshots import Offer, _capture, plan_snapshots
from remetal.repository.session import Batch, Session, open_session
from remetal.system.blockdev import Span
from remetal.system.freeze import freezes_nest
from remetal.system.lvm_snapshots import LvmSnapshot, Origin, Pool, is_whole, parse_pool
from remetal.system.mounts import mounted
from remetal.units import GIB, KIB, MIB
from tests.repositories import make_site

POOL = Pool("vg/pool", Path("/dev/dm-3"), 0.5, "")
LINEAR = Origin("vg", "a", 10 * GIB, "linear", "public", 8 * GIB, 4 * MIB)
THIN = replace(LINEAR, name="b", layout="thin,sparse", pool=POOL)


def offer(volume: str, origin: Origin, used: int = GIB) -> Offer:
    return Offer(volume, origin, used)


def test_the_policy_says_which_kinds() -> None:
    offers = [offer("vg/a", LINEAR), offer("vg/b", THIN)]
    assert plan_snapshots(offers, "none", nest=True).rooms == {}
    thin = plan_snapshots(offers, "thin", nest=True)
    assert (thin.rooms, thin.reasons) == ({"vg/b": 0}, {})
    every = plan_snapshots(offers, "all", nest=True)
    assert (every.rooms, every.reasons) == ({"vg/a": 4 * GIB, "vg/b": 0}, {})


def test_where_freezing_does_not_nest_the_one_with_most_in_use_is_chosen() -> None:
    offers = [
        offer("vg/a", LINEAR),
        offer("vg/b", THIN, 2 * GIB),
        offer("vg/c", replace(LINEAR, layout="cache"), 9 * GIB),
    ]
    choice = plan_snapshots(offers, "all", nest=False)
    assert choice.rooms == {"vg/b": 0}
    assert "lets only one volume" in choice.reasons["vg/a"]
    assert "(cache; public)" in choice.reasons["vg/c"]


@pytest.mark.parametrize(
    ("size", "free", "room"),
    [
        (10 * GIB, 100 * GIB, 5 * GIB),
        (10 * GIB, 3 * GIB, 3 * GIB // 2),
        (10 * GIB, GIB, GIB),
        (10 * GIB, GIB - 4 * MIB, None),
        (100 * MIB, 64 * MIB, 64 * MIB),
        (100 * MIB, 60 * MIB, None),
    ],
)
def test_room_is_a_tenth_at_least_and_up_to_half(size: int, free: int, room: int | None) -> None:
    choice = plan_snapshots([offer("vg/a", replace(LINEAR, size=size, free=free))], "all", nest=True)
    if room is None:
        assert choice.rooms == {}
        assert "in the volume group vg" in choice.reasons["vg/a"]
    else:
        assert room <= choice.rooms["vg/a"] < room + 4 * MIB
        assert choice.rooms["vg/a"] % (4 * MIB) == 0


def test_what_one_takes_the_next_one_has_not() -> None:
    small = replace(LINEAR, size=GIB, free=160 * MIB)
    choice = plan_snapshots([offer("vg/a", small), offer("vg/b", small)], "all", nest=True)
    assert list(choice.rooms) == ["vg/a"]
    assert "which has 56.0 MiB free" in choice.reasons["vg/b"]


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (replace(POOL, usage=0.81), "81% of the thin pool vg/pool are in use"),
        (replace(POOL, trouble="it needs a check"), "of the thin pool vg/pool: it needs a check"),
    ],
)
def test_a_pool_that_is_nearly_full_or_ill_gives_none(pool: Pool, words: str) -> None:
    choice = plan_snapshots([offer("vg/b", replace(THIN, pool=pool))], "thin", nest=True)
    assert (choice.rooms, choice.reasons) == ({}, {"vg/b": words})


@pytest.mark.parametrize("role", ["public,snapshot,thicksnapshot", "public,origin,thickorigin,snapshot,thicksnapshot"])
def test_a_snapshot_gets_no_snapshot(role: str) -> None:
    assert plan_snapshots([offer("vg/a", replace(LINEAR, role=role))], "all", nest=True).rooms == {}


def test_what_the_kernel_tells_of_a_snapshot() -> None:
    assert is_whole("0 409600 snapshot 96/131072 16\n")
    for told in (
        "0 409600 snapshot Invalid\n",
        "0 409600 snapshot Overflow\n",
        "0 409600 snapshot Unknown",
        "",
        "0 8 error",
    ):
        assert not is_whole(told)


def test_what_the_kernel_tells_of_a_pool() -> None:
    told = "0 614400 thin-pool 1 114/1024 1200/4800 - {} discard_passdown {} {} 256 \n"
    assert parse_pool(told.format("rw", "queue_if_no_space", "-")) == (0.25, "")
    assert parse_pool(told.format("out_of_data_space", "error_if_no_space", "-"))[1] == "it has run out of space"
    assert parse_pool(told.format("ro", "queue_if_no_space", "-"))[1] == "it is read-only"
    assert parse_pool(told.format("ro", "queue_if_no_space", "needs_check"))[1] == "it needs a check"
    for bad in ("0 614400 thin-pool Fail", "0 614400 thin-pool Error", "", "0 8 linear"):
        assert parse_pool(bad) == (1.0, "it has failed")


@pytest.mark.parametrize(
    ("release", "nest"), [("6.7.12", False), ("6.8.0-31-generic", True), ("5.14.0", False), ("10.0", True), ("", False)]
)
def test_which_kernels_nest(monkeypatch: pytest.MonkeyPatch, release: str, nest: bool) -> None:
    monkeypatch.setattr("platform.release", lambda: release)
    assert freezes_nest() is nest


class Fake(LvmSnapshot):
    """A snapshot of a disk file; while it is `full` it does not last, and once it is given up it cannot be read."""

    def __init__(self, path: Path) -> None:
        super().__init__(THIN, 0)
        self.path = path
        self.full = False
        self.done: list[str] = []

    def take(self, patience: float) -> None:
        self.done.append("taken")

    def open(self) -> Path:
        return self.path

    def check(self) -> None:
        if self.full:
            raise UnavailableError("it is full")

    def give_up(self) -> None:
        self.done.append("given up")
        self.path.write_bytes(b"")
        self.full = False  # there is room again

    def drop(self, report: Report) -> None:
        self.done.append("dropped")


def comes(snapshot: Fake, what: str) -> bool:
    until = time.monotonic() + 10
    while what not in snapshot.done and time.monotonic() < until:
        time.sleep(0.02)
    return what in snapshot.done


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """Snapshots of two ext4, for which nothing has to be frozen."""
    monkeypatch.setattr("remetal.image.snapshots.freezes_nest", lambda: False)
    made = []
    for name in ("one", "two"):
        path = tmp_path / name
        subprocess.run(["mkfs.ext4", "-q", "-d", "/etc/ssl", path, "64M"], check=True)
        made.append(Fake(path))
    return made


class Store:
    """A session that takes what it is given, and does something whenever it takes an image's first batch."""

    chunk_size, workers = 64 * KIB, 1

    def __init__(self, meanwhile: Callable[[str], None]) -> None:
        self.meanwhile = meanwhile
        self.images: list[str] = []

    def write_image(self, volume: str, size: int, batches: Iterator[Batch], *, previous: None) -> str:
        for number, batch in enumerate(batches):
            if number == 0:
                self.meanwhile(volume)
            batch.release()
        self.images.append(volume)
        return volume


def capture(store: Store, snapshots: Sequence[Fake]) -> None:
    """Capture volumes of which all are read from snapshots."""
    folder = Path("/dev/shm")
    volumes = [LiveVolume(each.path.name, Span(each.path, 0, 64 * MIB), "ext4", folder, Extents) for each in snapshots]
    chosen = {each.volume: snapshot for each, snapshot in zip(volumes, snapshots, strict=True)}
    _capture(cast("Session", store), volumes, cast("Mapping[str, LvmSnapshot]", chosen), Manner(60), silent)


def test_each_is_watched_from_when_it_is_taken_until_it_is_dropped(fakes: list[Fake]) -> None:
    one, two = fakes

    def meanwhile(volume: str) -> None:
        one.full = one.full or volume == "two"  # nobody looks at it any more

    store = Store(meanwhile)
    capture(store, fakes)
    assert store.images == ["one", "two"]
    assert (one.done, two.done) == (["taken", "dropped", "dropped"], ["taken", "dropped", "dropped"])


@pytest.mark.parametrize("number", [0, 1], ids=["the one that is read", "the other"])
def test_one_that_fills_up_while_the_store_keeps_waiting_is_given_up_and_there_is_no_image(
    fakes: list[Fake], number: int
) -> None:
    full = fakes[number]

    def meanwhile(volume: str) -> None:
        full.full = True
        assert comes(full, "given up"), "while who reads waits"

    store = Store(meanwhile)
    with pytest.raises(UnavailableError, match="it is full"):
        capture(store, fakes)
    assert store.images == []
    assert all(each.done[-1] == "dropped" for each in fakes)
    assert "given up" not in fakes[1 - number].done


def test_one_that_fills_up_after_its_last_byte_is_noticed(fakes: list[Fake]) -> None:
    class Late(Store):
        def write_image(self, volume: str, size: int, batches: Iterator[Batch], *, previous: None) -> str:
            super().write_image(volume, size, batches, previous=previous)
            fakes[0].full = True
            return volume

    with pytest.raises(UnavailableError, match="it is full"):
        capture(Late(lambda volume: None), fakes[:1])


def test_one_that_fills_up_while_other_volumes_are_stored_ends_the_backup(tmp_path: Path) -> None:
    class Full(Moment):
        def check(self) -> None:
            raise UnavailableError("it is full")

    site = make_site()
    with fresh_disk(tmp_path / "disk.img", 320 * MIB, "ext4") as device, mounted(device) as folder:
        span = Span(device, 0, 320 * MIB)
        volume = LiveVolume("disk", span, "ext4", folder, partial(probe_used, span, "ext4", frozen=True))
        with open_session(site.repository, site.keys) as session, pytest.raises(UnavailableError, match="it is full"):
            capture_live(session, [volume], Manner(60, moment=Full()))


def test_a_thin_one_that_is_given_up_is_taken_from_who_reads_it_before_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dmsetup", "lvm"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("remetal.system.lvm_snapshots._hidden", lambda group, name: tmp_path)
    LvmSnapshot(LINEAR, GIB).give_up()
    LvmSnapshot(THIN, 0).give_up()
    first, second = (tmp_path / "asked").read_text().splitlines()
    assert first.startswith("dmsetup wipe_table ")
    assert second.startswith("lvm lvremove ")
