"""Eight at once, without any locks: whatever the order of their operations, nothing that was acknowledged is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remetal.repository import encoder
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository, rebuild_index
from remetal.repository.forget import forget_snapshots
from remetal.repository.machines import MachineKeys
from remetal.repository.prune import prune_machine
from remetal.repository.repository import enroll_machine, open_repository
from tests.faults.campaign import need_listed
from tests.faults.counting import Count, StartCount
from tests.faults.schedule import Bursts, Choose, Priorities, ScheduledStore, without_locks_and_threads
from tests.repositories import CHUNK, MemoryStore, Site, backup, make_site, noise

_OLD = [noise("w1", 2) + noise("w2", 2), noise("w2", 2) + noise("w3", 1)]
_NEW = [noise("w1", 2) + noise("w4", 1), noise("w2", 1) + noise("w5", 1), noise("w1", 2) + noise("w2", 2)]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """Make packs small, and let everything run without locks."""
    patch = pytest.MonkeyPatch()
    patch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)
    patch.setattr(encoder, "PACKS_PER_INDEX", 2)
    with without_locks_and_threads():
        yield
    patch.undo()


_START: list[tuple[Site, MachineKeys, dict[str, bytes], str]] = []


def start() -> tuple[Site, MachineKeys, dict[str, bytes], str]:
    """A site with two snapshots of a machine, another machine's keys, what there is, and the first snapshot."""
    if not _START:
        site = make_site()
        made = {backup(site, data, workers=1).id: data for data in _OLD}
        _START.append((site, enroll_machine(site.repository, "db"), made, next(iter(made))))
    return _START[0]


def run_eight(choose: Choose) -> tuple[int, int]:
    """Run eight actors in an order; return how many backups were acknowledged, and how many were not.

    Raises AssertionError if anything was lost.
    """
    site, other, expected, first = start()
    expected = dict(expected)
    store = ScheduledStore(dict(site.store.objects))
    repository = open_repository(store)
    acknowledged: dict[str, bytes] = {}
    forgotten: list[str] = []

    def back_up(data: bytes, keys: MachineKeys) -> None:
        own = Site(store, repository, MachineKeys(keys.stored), site.key)
        acknowledged[backup(own, data, workers=1).id] = data

    def forget() -> None:
        forgotten.append(first)  # from here on it may or may not be there
        forget_snapshots(repository, site.key, [first])

    def prune() -> None:
        prune_machine(repository, site.key, site.keys.machine_id, grace=0, max_unused=0)

    actors = [
        lambda: back_up(_NEW[0], site.keys),
        lambda: back_up(_NEW[1], site.keys),
        lambda: back_up(_NEW[2], site.keys),
        lambda: back_up(_NEW[0], other),
        forget,
        prune,
        prune,
        lambda: rebuild_index(repository, site.key),
    ]
    errors = store.turns.run(actors, choose)
    assert not errors, errors
    maybe = dict.fromkeys(forgotten, b"")
    maybe[first] = expected.pop(first) if forgotten else b""
    calm = MemoryStore(dict(store.objects))
    after = Site(calm, open_repository(calm), MachineKeys(site.keys.stored), site.key)
    unacknowledged = {f"unacknowledged {number}": data for number, data in enumerate(_NEW)}
    need_listed(after, expected | acknowledged, maybe | unacknowledged)
    assert check_repository(after.repository, keys=after.key, read_data=True).problems == []
    following = backup(after, _OLD[0], workers=1)
    prune_machine(after.repository, after.key, after.keys.machine_id, grace=0, max_unused=0)
    need_listed(after, expected | acknowledged | {following.id: _OLD[0]}, maybe | unacknowledged)
    return len(acknowledged), 4 - len(acknowledged)


def count_eight(count: Count, choose: Choose) -> tuple[int, int]:
    """Run eight actors as a case of a campaign; a backup that was not acknowledged was told to run again."""
    with count.case(choose, faults=0):
        won, lost = run_eight(choose)
    count.detected += lost
    return won, lost


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 80)), max_size=14))
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_any_order_of_eight_writers_loses_nothing(counts: StartCount, bursts: list[tuple[int, int]]) -> None:
    count_eight(counts("eight writers, orders"), Bursts(bursts))


def test_orders_with_sleepers(counts: StartCount) -> None:
    count = counts("eight writers, orders")
    for seed in range(40):
        count_eight(count, Priorities(seed, 8))


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_two_thousand_orders_with_sleepers(counts: StartCount) -> None:
    count = counts("eight writers, orders")
    assert sum(count_eight(count, Priorities(seed, 8))[0] for seed in range(1000, 3000)) > 2000


def test_a_collector_that_looks_before_and_deletes_after_a_new_snapshot(counts: StartCount) -> None:
    """The prune lists, a backup uses chunks of an old snapshot again, that is forgotten, the prune goes on."""
    count = counts("eight writers, a collector amid a backup")
    for lead in range(0, 60, 3):
        count_eight(count, Bursts([(5, lead), (2, 300), (4, 300), (5, 600)]))
        count_eight(count, Bursts([(2, lead), (4, 300), (5, 600), (2, 300)]))
        count_eight(count, Bursts([(4, 300), (0, lead), (5, 600), (0, 300)]))


def test_a_prune_that_sleeps_while_another_one_runs(counts: StartCount) -> None:
    count = counts("eight writers, a prune that slept")
    for lead in range(0, 90, 3):
        count_eight(count, Bursts([(4, 300), (5, lead), (6, 900), (5, 900)]))


def test_catalog_lists_what_was_there() -> None:
    site, _, expected, _ = start()
    assert {each.id for each in open_catalog(site.repository, site.key).snapshots()} == expected.keys()
