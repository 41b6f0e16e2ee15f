"""One backup or prune of a machine at a time: a lock that is an object in the store (docs/format/lock.md).

Locks of a machine are numbered; the highest number holds. Whoever wants the lock creates the next number, which
the store grants to one only. A lock is renewed by creating the next number before the old one is deleted, so that
a holder who was given up on finds out. Numbers are used again once there is no lock, so a lock is told by its bytes,
never by its name alone: no two are equal.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from remetal.errors import DamagedError, RemetalError, UnavailableError
from remetal.repository.clocks import read_text
from remetal.repository.objects import (
    LOCKS,
    MAX_KEY_OBJECT,
    Record,
    decode_json,
    encode_json,
    get_object,
)
from remetal.storage import AlreadyExistsError, NotFoundError, Store
from remetal.system.locks import process_start

LEASE = 1800.0
"""Seconds after its last renewal at which a lock counts as left behind, whoever holds it."""
RENEWAL = 300.0
_MAX_LOCKS = 100
_LONGEST_HOST = 255


class LockRecord(Record, frozen=True, kw_only=True):
    """Who holds a lock. `time` is Unix time; `started` the process's start in ticks after boot (proc(5)).

    `token` is random, so that no two locks have the same bytes.
    """

    machine: str
    host: str
    host_id: str
    boot_id: str
    namespace: str
    pid: int
    started: int
    time: float
    token: str


class LockedError(UnavailableError):
    """Somebody else holds the lock."""


class MachineLock:
    """A lock that this process holds. `generation` is its number."""

    def __init__(self, store: Store, machine_id: str, generation: int) -> None:
        """Create the lock of that number. Raises AlreadyExistsError."""
        self._store = store
        self._machine_id = machine_id
        self._guard = threading.Lock()
        self._lost = False
        self._create(generation)

    def check(self) -> None:
        """Raise UnavailableError if somebody else has taken the lock over."""
        with self._guard:
            if not self._is_ours(self._name, self._data):
                self._lost = True
            if self._lost:
                raise UnavailableError(
                    "the lock on this machine's backups was taken over by another process",
                    hint="This one stood still for too long; nothing is lost, run it again.",
                )

    def renew(self) -> None:
        """Start a new lease. Raises UnavailableError if the lock is lost."""
        self.check()
        with self._guard:
            former, data = self._name, self._data
            try:
                self._create(self.generation + 1)
            except AlreadyExistsError:
                self._lost = True
            else:
                self._delete(former, data)
        if self._lost:
            self.check()

    def release(self) -> None:
        """Give the lock back."""
        with self._guard:
            if not self._lost:
                self._delete(self._name, self._data)

    def _create(self, generation: int) -> None:
        name, data = _lock_name(self._machine_id, generation), encode_json(_this_process(self._machine_id))
        self._store.put(name, [data])
        self.generation, self._name, self._data = generation, name, data

    def _delete(self, name: str, data: bytes) -> None:
        """Delete a lock that this process has created, unless another one has its number by now."""
        if self._is_ours(name, data):
            self._store.delete(name)

    def _is_ours(self, name: str, data: bytes) -> bool:
        with suppress(NotFoundError):
            return self._store.get(name, size=len(data) + 1) == data
        return False


@contextmanager
def hold_machine(store: Store, machine_id: str, *, renewal: float = RENEWAL) -> Iterator[MachineLock]:
    """Hold the lock on a machine's backups for the length of a block, renewing it every `renewal` seconds.

    Raises LockedError if a backup or a prune of this machine is at work, UnavailableError if the store fails.
    """
    lock = _acquire(store, machine_id)
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(renewal):
            with suppress(RemetalError):  # an unreachable store is tried again; a lost lock shows in check()
                lock.renew()

    keeper = threading.Thread(target=keep, name="lock renewal", daemon=True)
    keeper.start()
    try:
        yield lock
    finally:
        ended.set()
        keeper.join()
        with suppress(UnavailableError):  # the next backup sees that this process is gone
            lock.release()


def _acquire(store: Store, machine_id: str) -> MachineLock:
    numbers = _generations(store, machine_id)
    if numbers:
        owner = _read_lock(store, _lock_name(machine_id, numbers[-1]))
        if owner is not None and not is_stale(owner, now=time.time()):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(owner.time))
            raise LockedError(
                f"a backup or prune of this machine is at work: process {owner.pid} on {owner.host}, seen {since} UTC",
                hint="Wait until it has ended, then run the command again.",
            )
    try:
        lock = MachineLock(store, machine_id, numbers[-1] + 1 if numbers else 1)
    except AlreadyExistsError as error:
        raise _outrun() from error
    if set(_generations(store, machine_id)) - {*numbers, lock.generation}:  # somebody came in after a missed release
        lock.release()
        raise _outrun()
    lock.check()
    for number in numbers:
        store.delete(_lock_name(machine_id, number))
    return lock


def _outrun() -> LockedError:
    return LockedError(
        "another backup or prune of this machine has just begun",
        hint="Wait until it has ended, then run the command again.",
    )


def is_stale(owner: LockRecord, *, now: float) -> bool:
    """Whether a lock's holder is provably dead on this host, or has not renewed it within the lease."""
    if abs(now - owner.time) > LEASE:
        return True
    here = _this_process(owner.machine)
    if owner.boot_id == here.boot_id:
        return owner.namespace == here.namespace and process_start(owner.pid) not in {owner.started, None}
    return here.host_id != "" and owner.host_id == here.host_id  # this host was started again since


def _generations(store: Store, machine_id: str) -> list[int]:
    prefix = f"{LOCKS}{machine_id}/"
    found: list[int] = []
    for entry in store.entries(prefix):
        number = entry.name.removeprefix(prefix)
        if len(number) == 16 and all(digit in "0123456789abcdef" for digit in number):
            found.append(int(number, 16))
        if len(found) > _MAX_LOCKS:
            raise UnavailableError(f"there are too many locks in {prefix}", hint="Delete that folder.")
    return found


def _read_lock(store: Store, name: str) -> LockRecord | None:
    """Return who holds a lock; None if it is gone meanwhile, or is no lock and so nobody's."""
    try:
        owner = decode_json(name, get_object(store, name, MAX_KEY_OBJECT), LockRecord)
    except DamagedError:
        return None
    return owner if owner.host.isprintable() and len(owner.host) <= _LONGEST_HOST else None


def _this_process(machine_id: str) -> LockRecord:
    return LockRecord(
        machine=machine_id,
        host=socket.gethostname(),
        host_id=read_text("/etc/machine-id"),
        boot_id=read_text("/proc/sys/kernel/random/boot_id"),
        namespace=str(Path("/proc/self/ns/pid").readlink()),
        pid=os.getpid(),
        started=process_start(os.getpid()) or 0,
        time=time.time(),
        token=secrets.token_hex(16),
    )


def _lock_name(machine_id: str, generation: int) -> str:
    return f"{LOCKS}{machine_id}/{generation:016x}"
