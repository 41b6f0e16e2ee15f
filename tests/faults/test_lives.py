"""The life of a repository that Hypothesis makes up: machines, recipients, copies, faults, damage, sleepers, clocks.

The model knows what was acknowledged. There are no locks: all that they would prevent happens here. Any work may sleep
at any of its store operations while others go on, among them a prune that has listed everything, a backup that uses an
old chunk again, the forgetting of the snapshot that had it, another prune; and any may fail there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from remetal.errors import RemetalError
from remetal.repository import encoder
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository, rebuild_index
from remetal.repository.clocks import Witness
from remetal.repository.copy import copy_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.machines import MachineKeys
from remetal.repository.prune import prune_machine
from remetal.repository.remove import remove_recipient
from remetal.repository.repository import (
    accept_recipients,
    add_recipient,
    enroll_machine,
    list_keys,
    open_repository,
)
from remetal.repository.session import Session, open_session
from remetal.storage import Entry, Pieces
from tests.faults.campaign import FaultError, need_listed
from tests.faults.counting import Count, StartCount
from tests.faults.schedule import without_locks_and_threads
from tests.repositories import CHUNK, MemoryStore, Site, backup, make_site, noise, restore, write

_YEARS = 10 * 365 * 86400.0
CONTENTS = [
    noise("l1", 2) + noise("l2", 1),
    noise("l2", 1) + noise("l3", 2),
    noise("l3", 1) + noise("l1", 2),
    noise("l4", 3),
]
"""Images that share chunks, so that what one machine forgets its next snapshot may need again."""


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """Make packs small and passphrases quick, and let everything run without locks and in one thread."""
    patch = pytest.MonkeyPatch()
    patch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)
    patch.setattr(encoder, "PACKS_PER_INDEX", 2)
    patch.setattr("remetal.repository.slots.MEMORY_KIB", 1 << 10)
    with without_locks_and_threads():
        yield
    patch.undo()


@dataclass
class EventfulStore(MemoryStore):
    """A store in memory at whose operation number `at` something happens; then it is an ordinary one again."""

    at: int = 0
    event: Callable[[], None] | None = None

    def _step(self) -> None:
        if self.event is not None:
            self.at -= 1
            if self.at <= 0:
                event, self.event = self.event, None
                event()

    def put(self, name: str, data: Pieces) -> None:
        self._step()
        super().put(name, data)

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        self._step()
        return super().get(name, start=start, size=size)

    def entries(self, prefix: str) -> Iterator[Entry]:
        self._step()
        yield from list(super().entries(prefix))

    def delete(self, name: str) -> None:
        self._step()
        super().delete(name)


@dataclass
class Sleeper:
    """A backup that has written its image and not yet committed."""

    session: Session
    stack: ExitStack
    data: bytes
    machine: int


_START: list[tuple[Site, MachineKeys]] = []


def _start() -> tuple[Site, MachineKeys]:
    if not _START:
        site = make_site()
        _START.append((site, enroll_machine(site.repository, "db")))
    return _START[0]


_AT = st.integers(1, 60)
_MACHINE = st.integers(0, 1)
_CONTENT = st.integers(0, len(CONTENTS) - 1)
_OLD = st.integers(0, 5)
_GRACE = st.sampled_from([0.0, 0.0, 3600.0])
_WORK = st.one_of(
    st.tuples(st.just("backup"), _MACHINE, _CONTENT),
    st.tuples(st.just("forget"), _MACHINE, _OLD),
    st.tuples(st.just("prune"), _MACHINE, _GRACE),
    st.tuples(st.just("repair"), _MACHINE, _OLD),
    st.tuples(st.just("copy"), _MACHINE, _OLD),
    st.tuples(st.just("wake"), _MACHINE, _OLD),
)
_MEANWHILE = st.lists(_WORK, min_size=1, max_size=4)


@dataclass
class Model:
    """What was acknowledged by snapshot, and what may be there or not."""

    expected: dict[str, bytes] = field(default_factory=dict)
    maybe: dict[str, bytes] = field(default_factory=dict)
    owner: dict[str, int] = field(default_factory=dict)


class Life(RuleBasedStateMachine):
    """Two machines, one repository, one copy of it."""

    count: ClassVar[Count]

    def __init__(self) -> None:
        super().__init__()
        site, other = _start()
        self.store = EventfulStore(dict(site.store.objects))
        self.repository = open_repository(self.store)
        self.key = site.key
        self.keys = [MachineKeys(site.keys.stored), MachineKeys(other.stored)]
        self.target = MemoryStore()
        self.model = Model()
        self.sleepers: list[Sleeper] = []
        self.damage: dict[str, bytes] = {}
        self.wall, self.uptime, self.boot = 1e9, 1e3, 0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("remetal.repository.prune.witness_now", self.witness)

    def witness(self) -> Witness:
        return Witness(time=self.wall, host_id="h", boot_id=f"boot-{self.boot}", uptime=self.uptime)

    def site(self, machine: int = 0) -> Site:
        return Site(self.store, self.repository, self.keys[machine], self.key)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Whatever an administrator is told is no loss."""
        try:
            yield
        except RemetalError:
            self.count.told()
        finally:
            self.store.event = None

    def do(self, work: tuple[str, int, float]) -> None:
        """Do one of the works of `_WORK`."""
        name, machine, number = work
        getattr(self, f"do_{name}")(machine, number)

    def do_backup(self, machine: int, number: float) -> None:
        data = CONTENTS[int(number)]
        self.model.maybe[f"unacknowledged {number}"] = data
        snapshot = backup(self.site(machine), data, workers=1)
        self.acknowledge(snapshot.id, data, machine)

    def acknowledge(self, identity: str, data: bytes, machine: int) -> None:
        self.model.expected[identity] = data
        self.model.owner[identity] = machine

    def do_forget(self, machine: int, number: float) -> None:
        own = [each for each, owner in self.model.owner.items() if owner == machine and each in self.model.expected]
        if own:
            chosen = own[int(number) % len(own)]
            self.model.maybe[chosen] = self.model.expected.pop(chosen)
            if forget_snapshots(self.repository, self.key, [chosen]) == [chosen]:
                del self.model.maybe[chosen]

    def do_prune(self, machine: int, number: float) -> None:
        prune_machine(self.repository, self.key, self.keys[machine].machine_id, grace=number, max_unused=0)

    def do_repair(self, machine: int, number: float) -> None:
        rebuild_index(self.repository, self.key)

    def do_copy(self, machine: int, number: float) -> None:
        before = dict(self.model.expected)
        result = copy_repository(self.store, self.target, delete=number > 2)
        if not result.problems and not self.damage:
            site = Site(self.target, open_repository(self.target), self.keys[0], self.key)
            known = before | self.model.expected
            there = {each: data for each, data in known.items() if each in before and each in self.model.expected}
            extra = {each: data for each, data in known.items() if each not in there}
            need_listed(site, there, extra | self.model.maybe)

    def do_wake(self, machine: int, number: float) -> None:
        """A backup that has slept for as long as it takes goes on."""
        if self.sleepers:
            sleeper = self.sleepers.pop(int(number) % len(self.sleepers))
            self.model.maybe[f"sleeping {len(self.model.maybe)}"] = sleeper.data
            with sleeper.stack:
                snapshot = sleeper.session.commit(layout=b"{}", hostname="h")
            self.acknowledge(snapshot.id, sleeper.data, sleeper.machine)

    @rule(work=_WORK)
    def work(self, work: tuple[str, int, float]) -> None:
        """Something is done from start to end."""
        with self.telling():
            self.do(work)

    @rule(machine=_MACHINE, content=_CONTENT)
    def fall_asleep(self, machine: int, content: int) -> None:
        """A backup stands still before its commit: the computer was closed, its lease runs out."""
        stack = ExitStack()
        with self.telling(), ExitStack() as going:
            session = going.enter_context(open_session(self.repository, self.keys[machine], workers=1))
            write(session, CONTENTS[content])
            stack = going.pop_all()
            self.sleepers.append(Sleeper(session, stack, CONTENTS[content], machine))

    @rule(work=_WORK, at=_AT, meanwhile=_MEANWHILE)
    def sleep_amid(self, work: tuple[str, int, float], at: int, meanwhile: list[tuple[str, int, float]]) -> None:
        """Something is begun, others go on and end, and then it goes on, too."""

        def others() -> None:
            for each in meanwhile:
                try:
                    self.do(each)
                except RemetalError:
                    self.count.told()

        self.store.at, self.store.event = at, others
        with self.telling():
            self.do(work)

    @rule(at=_AT, machine=_MACHINE, old=_OLD, content=_CONTENT)
    def collector_amid(self, at: int, machine: int, old: int, content: int) -> None:
        """A prune lists; a backup uses an old chunk again; the old snapshot is forgotten, pruned; the prune goes on."""
        story: list[tuple[str, int, float]] = [
            ("backup", machine, content),
            ("forget", machine, old),
            ("prune", machine, 0.0),
        ]
        self.sleep_amid(("prune", machine, 0.0), at, story)

    @rule(work=_WORK, at=_AT)
    def fail_amid(self, work: tuple[str, int, float], at: int) -> None:
        """The store fails once."""

        def fail() -> None:
            self.count.faults += 1
            raise FaultError("the store fails")

        self.store.at, self.store.event = at, fail
        with self.telling():
            self.do(work)

    @rule(jump=st.sampled_from([3600.0, -3600.0, _YEARS, -_YEARS]), reboot=st.booleans())
    def set_the_clock(self, jump: float, reboot: bool) -> None:
        """The clock is wrong from now on."""
        self.count.faults += 1
        self.wall += jump
        self.boot += reboot

    @rule(seconds=st.sampled_from([60.0, 7200.0]))
    def wait(self, seconds: float) -> None:
        """Some time passes."""
        self.wall += seconds
        self.uptime += seconds

    @rule()
    @precondition(lambda self: not self.damage and sum(e.kind == "recipient" for e in list_keys(self.repository)) < 3)
    def add_a_recipient(self) -> None:
        """A second recipient comes, and the machines accept it."""
        with self.telling():
            add_recipient(self.repository, self.key, "escrow")
            for keys in self.keys:
                accept_recipients(self.repository, keys)

    @rule()
    def remove_a_recipient(self) -> None:
        """The last recipient that came goes."""
        with self.telling():
            others = [e.id for e in list_keys(self.repository) if e.kind == "recipient" and e.id != self.key.id]
            for each in others[-1:]:
                remove_recipient(self.repository, self.key, each)

    @rule(number=st.integers(0, 1000), bit=st.integers(0, 7))
    def damage_something(self, number: int, bit: int) -> None:
        """A bit of a pack, an index object or a page is not what it was."""
        names = [name for name in self.store.objects if name.startswith(("packs/", "index/", "maps/"))]
        if names and not self.damage:
            self.count.faults += 1
            name = names[number % len(names)]
            data = bytearray(self.store.objects[name])
            self.damage[name] = bytes(data)
            data[number % len(data)] ^= 1 << bit
            self.store.objects[name] = bytes(data)
            assert any(name in each for each in check_repository(self.repository, keys=None).problems)

    @rule()
    @precondition(lambda self: self.damage)
    def bring_it_back(self) -> None:
        """What was damaged comes back from a copy, unless nobody needed it any more."""
        for name, data in self.damage.items():
            if name in self.store.objects:
                self.store.objects[name] = data
        self.damage = {}

    @invariant()
    def nothing_is_lost(self) -> None:
        """Everything acknowledged restores; as long as something is damaged at least nothing wrong does."""
        with self.count.case(faults=0):
            if not self.damage:
                need_listed(self.site(), self.model.expected, self.model.maybe)
            else:
                self.need_nothing_wrong()

    def need_nothing_wrong(self) -> None:
        for each in open_catalog(self.repository, self.key).snapshots():
            try:
                found = restore(self.site(), each)
            except RemetalError:
                continue
            assert found == self.model.expected.get(each.id, found)

    def teardown(self) -> None:
        """In the end everything works unaided."""
        try:
            for sleeper in self.sleepers:
                sleeper.stack.close()
            self.bring_it_back()
            with self.count.case(faults=0):
                for machine in (0, 1):
                    self.do_backup(machine, 0)
                    self.do_prune(machine, 0.0)
                need_listed(self.site(), self.model.expected, self.model.maybe)
                assert check_repository(self.repository, keys=self.key, read_data=True).problems == []
        finally:
            self.patch.undo()


def live(counts: StartCount, examples: int, steps: int) -> None:
    class Counted(Life):
        count = counts("lives of a repository")

    run_state_machine_as_test(
        Counted,
        settings=settings(max_examples=examples, stateful_step_count=steps, suppress_health_check=list(HealthCheck)),
    )


def test_some_lives(counts: StartCount) -> None:
    live(counts, 7, 14)


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_many_lives(counts: StartCount) -> None:
    live(counts, 300, 40)
