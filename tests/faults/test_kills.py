"""kill -9 at random and at chosen points of real commands on real files: nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from remetal.errors import RefusedError
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.copy import copy_repository
from remetal.repository.machines import MachineKeys
from remetal.repository.objects import is_there, pack_name
from remetal.repository.parity import find_groups
from remetal.repository.prune import prune_machine
from remetal.repository.recipients import RecipientKey
from remetal.repository.repair import accept_repair, repair_repository
from remetal.repository.repository import (
    enroll_machine,
    init_repository,
    load_machine_keys,
    open_repository,
    remove_passphrase,
    save_machine_keys,
    unlock_with_kit,
    unlock_with_passphrase,
)
from remetal.storage import LocalStore
from tests.faults.counting import Count, StartCount
from tests.repositories import CHUNK, Site, backup, restore

_CHECKOUT = Path(__file__).parents[2]
_COMMAND = """
import os, signal, sys
from pathlib import Path
from remetal.repository import encoder, packs, slots
from remetal.repository.copy import copy_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.catalog import open_catalog
from remetal.repository.prune import prune_machine
from remetal.repository.recipients import RecipientKey
from remetal.repository.repair import repair_repository
from remetal.repository.repository import change_passphrase, init_repository, load_machine_keys, open_repository
from remetal.repository.session import open_session
from remetal.storage import LocalStore, local, open_store
from tests.repositories import batches_of

work, root, state, image, seed, point = sys.argv[1:]
packs.PACK_SIZE = 4 << 16
encoder.PACKS_PER_INDEX = 2
local._DIRECT = 1 << 16
slots.MEMORY_KIB = 1 << 10
store = open_store(root)
repository = open_repository(store)
keys = load_machine_keys(Path(state), repository)
key = RecipientKey(repository.config.id, bytes.fromhex(seed))
calls = 0

def trace(frame, event, argument):
    '''Die before the so-many-th system call that changes something.'''
    global calls
    name = getattr(argument, "__name__", "")
    if event == "c_call" and name in {"fsync", "link", "unlink", "writev", "pwrite", "mkdir", "open", "replace"}:
        calls += 1
        if calls == int(point):
            os.kill(os.getpid(), signal.SIGKILL)

print("ready", flush=True)
if point != "0":
    import threading
    sys.setprofile(trace)
    threading.setprofile(trace)
if work == "backup":
    data = Path(image).read_bytes()
    with open_session(repository, keys) as session:
        session.write_image("sda:1", len(data), batches_of(data))
        snapshot = session.commit(layout=b"{}", hostname="h")
    print(snapshot.id, flush=True)
elif work == "forget":
    forget_snapshots(repository, key, [each.id for each in open_catalog(repository, key).snapshots()[:-2]])
elif work == "prune":
    prune_machine(repository, key, keys.machine_id, grace=0, max_unused=0)
elif work == "repair":
    repair_repository(repository, key)
elif work == "copy":
    copy_repository(store, LocalStore(Path(image)), delete=True)
elif work == "change-passphrase":
    change_passphrase(repository, *image.split())
elif work == "init":
    init_repository(LocalStore(Path(image)), passphrase="p")
else:
    raise SystemExit(work)
"""


class Place:
    """A repository in a folder, and what its snapshots hold."""

    def __init__(self, folder: Path, count: Count) -> None:
        self.count = count
        self.store = LocalStore(folder / "repository")
        self.state, self.image = folder / "state", folder / "image"
        repository, kit = init_repository(self.store, passphrase="p", chunk_size=CHUNK)
        self.key: RecipientKey = unlock_with_kit(repository, kit.text())
        save_machine_keys(self.state, enroll_machine(repository, "web"))
        self.expected: dict[str, bytes] = {}
        self.killed = 0
        self.returncode = 0
        self.passphrase = "p"
        first = os.urandom(2 * CHUNK)
        self.expected[backup(self.site(), first, workers=1).id] = first

    def site(self) -> Site:
        repository = open_repository(self.store)
        keys = load_machine_keys(self.state, repository)
        assert keys is not None
        return Site(self.store, repository, MachineKeys(keys.stored, keys.path), self.key)  # type: ignore[arg-type]

    def run(self, work: str, *, moment: float | None = None, point: int = 0) -> None:
        """Run a command, kill it after so many seconds or before so many system calls, and look at what is left."""
        match work:
            case "repair":
                self.around_repair(moment, point)
            case "copy":
                self.around_copy(moment, point)
            case "change-passphrase":
                self.around_passphrase(moment, point)
            case "init":
                self.around_init(moment, point)
            case _:
                data = os.urandom(6 * CHUNK)
                self.image.write_bytes(data)
                said = self.kill(work, str(self.image), moment, point)
                if said:
                    self.expected[said] = data
                with self.case(work, moment, point):
                    self.need_sound(work, data)

    def around_repair(self, moment: float | None, point: int) -> None:
        """Damage a pack that has parity; whatever becomes of the repair, all comes back, and another one ends it."""
        machine = self.site().keys.machine_id
        protected = [pack_name(machine, each) for group in find_groups(self.store, machine, []) for each in group.packs]
        spoilt = max((self.store.root / name for name in protected if is_there(self.store, name)), key=os.path.getsize)
        data = bytearray(spoilt.read_bytes())
        data[len(data) // 2] ^= 1
        spoilt.write_bytes(data)
        self.kill("repair", "", moment, point)
        with self.case("repair", moment, point):
            site = self.site()
            for snapshot in open_catalog(site.repository, site.key).snapshots():
                assert restore(site, snapshot) == self.expected[snapshot.id]
            repair_repository(site.repository, site.key)
            accept_repair(site.repository)
            self.need_sound("repair", b"")

    def around_copy(self, moment: float | None, point: int) -> None:
        """Whatever becomes of a copy, another one ends it, and it is as good as what it was made of."""
        target = self.state.parent / "copy"
        self.kill("copy", str(target), moment, point)
        with self.case("copy", moment, point):
            self.need_sound("copy", b"")
            store = LocalStore(target)
            copy_repository(self.store, store, delete=True)
            theirs = open_repository(store)
            assert check_repository(theirs, keys=self.key, read_data=True).problems == []
            found = open_catalog(theirs, self.key).snapshots()
            assert {each.id for each in found} == self.expected.keys()

    def around_passphrase(self, moment: float | None, point: int) -> None:
        """The old or the new passphrase opens the repository, or both."""
        old, new = self.passphrase, f"{self.passphrase}x"
        self.kill("change-passphrase", f"{old} {new}", moment, point)
        with self.case("change-passphrase", moment, point):
            opened = [each for each in (old, new) if self.opens(each)]
            assert opened, "nobody opens it any more"
            self.passphrase = opened[-1]
            if len(opened) > 1:
                remove_passphrase(self.site().repository, old)  # as who repeats the command is told to
            self.need_sound("change-passphrase", b"")

    def opens(self, passphrase: str) -> bool:
        try:
            return unlock_with_passphrase(open_repository(self.store), passphrase).id == self.key.id
        except RefusedError:
            return False

    def around_init(self, moment: float | None, point: int) -> None:
        """There is a repository then, or another init makes it."""
        place = self.state.parent / f"new-{self.killed}-{self.count.cases}"
        self.kill("init", str(place), moment, point)
        with self.case("init", moment, point):
            store = LocalStore(place)
            try:
                repository = open_repository(store)
            except RefusedError:
                repository, _ = init_repository(store, passphrase="p")
            assert unlock_with_passphrase(repository, "p").id == repository.config.id
            assert check_repository(repository, keys=None).problems == []

    @contextmanager
    def case(self, work: str, moment: float | None, point: int) -> Iterator[None]:
        with self.count.case(f"{work}, {moment} s, point {point}", faults=int(self.returncode != 0)):
            assert self.returncode in {0, -signal.SIGKILL}
            yield

    def kill(self, work: str, argument: str, moment: float | None, point: int) -> str:
        """Run a command in a process that is killed, and return what it said."""
        argv = [sys.executable, "-c", _COMMAND, work, str(self.store.root), str(self.state), argument]
        argv += [self.key.seed.hex(), str(point)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=_CHECKOUT, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            if moment is not None:
                time.sleep(moment)
                process.send_signal(signal.SIGKILL)
            said = process.stdout.read().strip()
        self.returncode = process.returncode
        self.killed += process.returncode == -signal.SIGKILL
        return said

    def need_sound(self, work: str, data: bytes) -> None:
        site = self.site()
        snapshots = open_catalog(site.repository, site.key).snapshots()
        found = {each.id: restore(site, each) for each in snapshots}
        lost = self.expected.keys() - found.keys()
        newest = set(list(self.expected)[-2:])
        assert not lost or (work == "forget" and not lost & newest), "an acknowledged snapshot is lost"
        new = found.keys() - self.expected.keys()
        assert not new or (work == "backup" and len(new) == 1 and found[next(iter(new))] == data)
        assert all(found[identity] == self.expected[identity] for identity in self.expected.keys() & found.keys())
        self.expected = found
        assert check_repository(site.repository, keys=site.key, read_data=True).problems == []
        assert check_repository(site.repository, keys=site.keys).problems == []


def campaign(folder: Path, kills: int, seed: int, counts: StartCount) -> None:
    """Kill so many runs of the commands that write, at random moments and before chosen system calls in turn."""
    place = Place(folder, counts("kill -9"))
    moments = random.Random(seed)
    works: Sequence[str] = (
        *("backup", "backup", "prune", "repair", "backup", "copy", "forget"),
        *("prune", "change-passphrase", "backup", "init", "repair", "copy"),
    )
    for number in count():
        if place.killed == kills:
            break
        work = works[number % len(works)]
        if number % 2:
            place.run(work, moment=moments.uniform(0.0, 0.15))
        else:
            place.run(work, point=moments.randrange(1, 60 if work == "backup" else 30))
    place.run("backup")
    site = place.site()
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=0)
    backup(site, b"the last one" * 10_000, workers=1)
    assert check_repository(site.repository, keys=site.key, read_data=True).problems == []
    assert list(place.store.entries("locks/")) == []


def test_fifty_kills(tmp_path: Path, counts: StartCount) -> None:
    campaign(tmp_path, 50, 1, counts)


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_five_hundred_kills(tmp_path: Path, counts: StartCount) -> None:
    campaign(tmp_path, 500, 2, counts)
