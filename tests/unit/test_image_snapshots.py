"""Which volumes are read from LVM snapshots, with how much room, and what the kernel tells of snapshots and pools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from remetal.image.snapshots import Offer, plan_snapshots
from remetal.system.freeze import freezes_nest
from remetal.system.lvm_snapshots import Origin, Pool, is_whole, parse_pool
from remetal.units import GIB, MIB

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
