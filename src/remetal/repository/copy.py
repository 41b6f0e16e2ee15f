"""Copying a repository to another store, object by object: no key is needed, and nothing is opened.

A copy is the same repository in another place: it has the same id, keys and histories, machines and recipients use
either. Objects are copied in the order in which they build on one another, so whoever reads the copy meanwhile sees
whole snapshots only; a copy that is cut off goes on where it was.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TypeVar

from remetal.errors import DamagedError, RefusedError, UnavailableError
from remetal.events import Progress, Report, Step, silent
from remetal.repository.catalog import entry_names, find_ledgers, read_entry, read_vouched
from remetal.repository.chunks import find_packs
from remetal.repository.cipher import digest
from remetal.repository.config import Config, encode_config, read_config
from remetal.repository.groups import GroupIndex
from remetal.repository.history import is_gone, sequence_of
from remetal.repository.ledgers import MAX_LEDGER, split_packs
from remetal.repository.machines import MachineRecord, read_machines
from remetal.repository.named import NamedObjects, gather
from remetal.repository.objects import (
    CONFIG,
    HISTORY,
    INDEX,
    KEYS,
    MAPS,
    PACKS,
    PARITY,
    SLOTS,
    damaged,
    get_named,
    hash_in_name,
    is_there,
    largest,
    pack_name,
    put_once,
)
from remetal.repository.parity import find_groups, parity_folder, rebuild_from
from remetal.repository.protect import Sorting
from remetal.repository.repository import Repository
from remetal.repository.snapshots import MAX_SNAPSHOT
from remetal.storage import Entry, NotFoundError, RetainedError, Store, UnreadableError

AT_ONCE = 4
"""Objects under way at the same time; each may take 64 MiB."""
_NAMES_AT_ONCE = 1 << 12
_NEEDED = (*KEYS, PACKS, INDEX, MAPS)
"""What a history relies on."""
_Item = TypeVar("_Item")
_PACK = re.compile(rf"{PACKS}([0-9a-f]{{32}})/[0-9a-f]{{2}}/[0-9a-f]{{64}}")
_OWNER = re.compile(rf"{HISTORY}([0-9a-f]{{32}})/")


@dataclass(slots=True)
class CopyResult:
    """What was copied, what was there already, what was deleted, and a sentence for each object that is damaged.

    `retained` would be deleted if the store did not protect it yet.
    """

    objects: int = 0
    bytes: int = 0
    there: int = 0
    deleted: int = 0
    retained: int = 0
    problems: list[str] = field(default_factory=list)


def copy_repository(source: Store, target: Store, *, delete: bool = False, report: Report = silent) -> CopyResult:
    """Copy everything that the target lacks, and return what was done.

    `delete` also deletes at the target what the source's newest ledgers say is gone or doomed, parity that was
    replaced, and passphrases that were removed. Objects whose bytes are not what was written are told, and not copied,
    but for packs that parity can rebuild: those are whole at the target. Raises RefusedError if the target holds
    another repository, DamagedError if the source's config or a machine's history is not readable, UnavailableError if
    a store fails or does not list what it holds.
    """
    repository = Repository(source, read_config(source))
    fresh = _check_target(source, target, repository.config)
    result = CopyResult()
    rebuilding = _Rebuilding(source)
    machines = {each.id: each for each in read_machines(source, repository.config.id)[0]}
    history = [entry for entry in source.entries(HISTORY) if sequence_of(entry.name)]
    for what, prefixes in (
        ("keys", KEYS),
        ("packs", (PACKS,)),
        ("parity", (PARITY,)),
        ("index and maps", (INDEX, MAPS)),
    ):
        report(Step(f"Copying {what}"))
        _copy_all(source, target, what, prefixes, result, rebuilding, report)
    _copy_rest(source, target, result, rebuilding)
    _need_listed(source, history)
    report(Step("Copying histories"))
    _copy_history(repository, target, machines, history, result)
    if fresh:
        target.put(CONFIG, [encode_config(repository.config)])
        result.objects += 1
    if delete:
        report(Step("Deleting what is gone"))
        lacking = _count_lacking(source, target)
        _need_listed(source, history)
        if lacking:
            result.problems.append(
                f"nothing was deleted at {target.location}, since {lacking} objects that {source.location} has are not "
                "there: what is to go may be all that is left of them"
            )
        else:
            _delete_gone(repository, target, machines.values(), result)
    return result


def _check_target(source: Store, target: Store, config: Config) -> bool:
    """Return whether the target has no config yet. Raises RefusedError if it holds another repository."""
    try:
        target.get(CONFIG, size=1)
    except NotFoundError:
        theirs = _sizes_by_name(target, ("",))
        ours = sum(size >= 0 for _, size in _with_sizes(source.entries(""), theirs)) if theirs else 0
        if ours < len(theirs):  # names have ids and hashes in them: nobody else has such
            raise RefusedError(
                f"{target.location} holds something else already", hint="Choose an empty place for the copy."
            ) from None
        return True
    if read_config(target) != config:
        raise RefusedError(
            f"{target.location} holds another repository than {source.location}",
            hint="A copy is the same repository in another place; choose an empty one.",
        )
    return False


def _copy_all(
    source: Store,
    target: Store,
    what: str,
    prefixes: Sequence[str],
    result: CopyResult,
    rebuilding: _Rebuilding,
    report: Report,
) -> None:
    """Copy objects that are named after their content, several at once.

    The source is listed twice, first to know how much there is to do: there may be more names than fit into memory.
    """
    there = _sizes_by_name(target, prefixes)

    def listed() -> Iterator[tuple[Entry, int]]:
        entries = chain.from_iterable(source.entries(prefix) for prefix in prefixes)
        return _with_sizes((entry for entry in entries if hash_in_name(entry.name)), there)

    total = done = 0
    for entry, size in listed():
        total += entry.size if entry.size != size else 0
        result.there += entry.size == size

    def copy(lacking: tuple[Entry, int]) -> str:
        entry, size = lacking
        return _copy_named(source, target, entry, size >= 0, rebuilding)

    for (entry, _), problem in _spread(((entry, size) for entry, size in listed() if entry.size != size), copy):
        done += entry.size
        if problem:
            result.problems.append(problem)
        else:
            result.objects += 1
            result.bytes += entry.size
        report(Progress(what, done, max(total, done, 1)))


def _copy_rest(source: Store, target: Store, result: CopyResult, rebuilding: _Rebuilding) -> None:
    """Look once more, and copy what the source did not list before: histories rely on all of it.

    A ledger also says what is not to be relied on any more, of which the target may have nothing else.
    """
    rest = CopyResult()
    _copy_all(source, target, "the rest", _NEEDED, rest, rebuilding, silent)
    result.objects += rest.objects
    result.bytes += rest.bytes
    result.problems = list(dict.fromkeys([*result.problems, *rest.problems]))


def _need_listed(source: Store, history: Sequence[Entry]) -> None:
    """Raise UnavailableError if the source lists less than it did before, though nothing was deleted.

    What it has listed meanwhile is not to be believed then: a history would be copied without what it relies on.
    """
    listed = {entry.name for entry in source.entries(HISTORY)}
    hidden = next((each.name for each in history if each.name not in listed and is_there(source, each.name)), None)
    if hidden is not None:
        raise UnavailableError(
            f"{source.location} lists less than it holds: {hidden} is there, and was listed before",
            hint="Nothing is lost; run the copy again. If it comes again, go around the proxy or cache that answers.",
        )


def _count_lacking(source: Store, target: Store) -> int:
    """Return how many objects of the source are not at the target, because they are damaged."""
    there = _sizes_by_name(target, _NEEDED)
    entries = chain.from_iterable(source.entries(prefix) for prefix in _NEEDED)
    named = (entry for entry in entries if hash_in_name(entry.name))
    return sum(entry.size != size and is_there(source, entry.name) for entry, size in _with_sizes(named, there))


def _sizes_by_name(store: Store, prefixes: Sequence[str]) -> NamedObjects:
    """Return the sizes of a store's objects by the hashes of their names."""
    entries = chain.from_iterable(store.entries(prefix) for prefix in prefixes)
    return gather((_key(entry.name), entry.size) for entry in entries)


def _with_sizes(entries: Iterable[Entry], there: NamedObjects) -> Iterator[tuple[Entry, int]]:
    """Yield each entry with the size that the object of its name has in the other store, -1 if there is none."""
    left = iter(entries)
    while group := list(islice(left, _NAMES_AT_ONCE)):
        yield from zip(group, there.sizes([_key(entry.name) for entry in group]), strict=True)


def _key(name: str) -> bytes:
    return digest(name.encode())


def _spread(items: Iterable[_Item], work: Callable[[_Item], str]) -> Iterator[tuple[_Item, str]]:
    """Yield each item with what `work` returned for it, in order."""
    waiting: deque[tuple[_Item, Future[str]]] = deque()
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="copy") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > AT_ONCE:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _copy_named(source: Store, target: Store, entry: Entry, replace: bool, rebuilding: _Rebuilding) -> str:
    """Copy one object, replacing one of another size; return what is wrong with it, if anything is.

    A damaged pack is copied as it was written, if parity can tell what that was.
    """
    problem = ""
    try:
        data = get_named(source, entry.name, largest(entry.name))
    except DamagedError as error:
        if not is_there(source, entry.name):
            return ""  # deleted meanwhile: nothing that stays needs it
        rebuilt = rebuilding.rebuild(entry.name)
        if rebuilt is None:
            return error.message
        problem, data = f"{error.message}; the copy is whole, because parity told what it was", rebuilt
    if replace:
        target.delete(entry.name)
    put_once(target, entry.name, [data])
    return problem


class _Rebuilding:
    """Rebuilds damaged packs of a store from its parity, one after the other."""

    def __init__(self, source: Store) -> None:
        self._source = source
        self._guard = threading.Lock()
        self._index: tuple[str, GroupIndex] | None = None

    def rebuild(self, name: str) -> bytes | None:
        """Return the bytes of a pack as they were, None if parity cannot tell or it is no pack."""
        match, identity = _PACK.fullmatch(name), hash_in_name(name)
        if match is None or identity is None:
            return None
        with self._guard:
            if self._index is None or self._index[0] != match[1]:
                self._index = match[1], GroupIndex(self._source, match[1], [])
            try:
                return rebuild_from(self._source, match[1], self._index[1].of(identity), identity)
            except DamagedError:
                return None


def _copy_history(
    repository: Repository,
    target: Store,
    machines: dict[str, MachineRecord],
    history: list[Entry],
    result: CopyResult,
) -> None:
    """Copy the entries that were there before anything else was looked at, oldest first."""
    vouched = read_vouched(repository)
    there = {entry.name for entry in target.entries(HISTORY)}
    for entry in history:
        if entry.name in there:
            result.there += 1
            _compare(repository.store, target, entry, result)
            continue
        owner = _OWNER.match(entry.name)
        machine = machines.get(owner[1]) if owner else None
        try:
            if machine is None:
                raise damaged(entry.name, "its machine has no record")
            data = read_entry(repository, entry.name, machine, vouched)[1]
        except DamagedError as error:
            if is_there(repository.store, entry.name):
                result.problems.append(error.message)
            continue
        target.put(entry.name, [data])
        result.objects += 1
        result.bytes += len(data)


def _compare(source: Store, target: Store, entry: Entry, result: CopyResult) -> None:
    """Tell if both places have gone on by themselves: then each has a snapshot of the same number."""
    limit = max(MAX_SNAPSHOT, MAX_LEDGER)
    try:
        same = source.get(entry.name, size=limit) == target.get(entry.name, size=limit)
    except NotFoundError:
        return
    except UnreadableError as error:
        result.problems.append(error.message)
        return
    if not same:
        result.problems.append(
            f"{entry.name} is another entry at {target.location}: both places were backed up to, or it is damaged there"
        )


def _delete_gone(repository: Repository, target: Store, machines: Iterable[MachineRecord], result: CopyResult) -> None:
    """Delete at the target what the ledgers that are there say, and passphrases that the source no longer has."""
    copied = Repository(target, repository.config)
    vouched = read_vouched(copied)
    names: list[str] = []
    for machine in machines:
        entries, problems = entry_names(copied, machine.id), list[str]()
        ledgers = find_ledgers(copied, machine, vouched, entries, problems)
        if problems or ledgers.newest is None:
            continue
        doomed = ledgers.newest.body.doomed
        names += [name for name in entries if is_gone(sequence_of(name), ledgers.gone)]
        names += [*doomed.names, *(pack_name(machine.id, each) for each in split_packs(doomed.packs))]
    kept = {entry.name for entry in repository.store.entries(SLOTS)}
    if kept:
        names += [entry.name for entry in target.entries(SLOTS) if entry.name not in kept]
    wanted = set(names)
    present = {entry.name for entry in target.entries("") if entry.name in wanted}
    for name in names:
        if name in present:
            _delete(target, name, result)
    for machine in machines:
        for name in _stale_parity(repository.store, copied, machine.id):
            _delete(target, name, result)


def _delete(target: Store, name: str, result: CopyResult) -> None:
    try:
        target.delete(name)
    except RetainedError:
        result.retained += 1
    else:
        result.deleted += 1


def _stale_parity(source: Store, target: Repository, machine_id: str) -> list[str]:
    """Return parity objects of the target that the source has replaced, and whose packs others protect by now."""
    sorting = Sorting(find_packs(target, machine_id), find_groups(target.store, machine_id, []))
    deque(sorting.fragments(), 0)
    kept = {entry.name for entry in source.entries(parity_folder(machine_id))}
    return [name for name in sorting.obsolete if name not in kept]
