"""Copying a repository to another store, object by object: no key is needed, and nothing is opened.

A copy is the same repository in another place: it has the same id, keys and histories, machines and recipients use
either. Objects are copied in the order in which they build on one another, so whoever reads the copy meanwhile sees
whole snapshots only; a copy that is cut off goes on where it was.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from remetal.errors import DamagedError, RefusedError
from remetal.events import Progress, Report, Step, silent
from remetal.repository.catalog import entry_names, find_ledgers, read_entry, read_vouched
from remetal.repository.cipher import digest
from remetal.repository.config import Config, decode_config, encode_config, read_config
from remetal.repository.history import is_gone, sequence_of
from remetal.repository.ledgers import MAX_LEDGER, split_packs
from remetal.repository.machines import MachineRecord, read_machines
from remetal.repository.objects import (
    CONFIG,
    HISTORY,
    INDEX,
    KEYS,
    MAPS,
    PACKS,
    SLOTS,
    damaged,
    hash_in_name,
    pack_name,
    put_once,
)
from remetal.repository.repository import Repository
from remetal.repository.snapshots import MAX_SNAPSHOT
from remetal.storage import Entry, NotFoundError, Store

_AT_ONCE = 4
"""Objects under way at the same time; each may take 64 MiB."""
_OWNER = re.compile(rf"{HISTORY}([0-9a-f]{{32}})/")


@dataclass(slots=True)
class CopyResult:
    """What was copied, what was there already, what was deleted, and a sentence for each object that is damaged."""

    objects: int = 0
    bytes: int = 0
    there: int = 0
    deleted: int = 0
    problems: list[str] = field(default_factory=list)


def copy_repository(source: Store, target: Store, *, delete: bool = False, report: Report = silent) -> CopyResult:
    """Copy everything that the target lacks, and return what was done.

    `delete` also deletes at the target what the source's newest ledgers say is gone or doomed, and passphrases that
    were removed. Objects whose bytes are not what was written are not copied, and told. Raises RefusedError if the
    target holds another repository, DamagedError if the source's config or a machine's history is not readable.
    """
    repository = Repository(source, read_config(source))
    fresh = _check_target(source, target, repository.config)
    result = CopyResult()
    machines = {each.id: each for each in read_machines(source, repository.config.id)[0]}
    history = [entry for entry in source.entries(HISTORY) if sequence_of(entry.name)]
    for what, prefixes in (("keys", KEYS), ("packs", (PACKS,)), ("index and maps", (INDEX, MAPS))):
        report(Step(f"Copying {what}"))
        entries = [entry for prefix in prefixes for entry in source.entries(prefix) if hash_in_name(entry.name)]
        _copy_all(source, target, what, entries, result, report)
    report(Step("Copying histories"))
    _copy_history(repository, target, machines, history, result)
    if fresh:
        target.put(CONFIG, [encode_config(repository.config)])
        result.objects += 1
    if delete:
        report(Step("Deleting what is gone"))
        _delete_gone(repository, target, machines.values(), result)
    return result


def _check_target(source: Store, target: Store, config: Config) -> bool:
    """Return whether the target has no config yet. Raises RefusedError if it holds another repository."""
    try:
        there = target.get(CONFIG)
    except NotFoundError:
        ours = {entry.name for entry in source.entries("")}  # names with ids and hashes: nobody else has such
        if any(entry.name not in ours for entry in target.entries("")):
            raise RefusedError(
                f"{target.location} holds something else already", hint="Choose an empty place for the copy."
            ) from None
        return True
    if decode_config(there) != config:
        raise RefusedError(
            f"{target.location} holds another repository than {source.location}",
            hint="A copy is the same repository in another place; choose an empty one.",
        )
    return False


def _copy_all(
    source: Store, target: Store, what: str, entries: list[Entry], result: CopyResult, report: Report
) -> None:
    """Copy objects that are named after their content, several at once."""
    prefixes = {entry.name.split("/")[0] + "/" for entry in entries}
    there = {entry.name: entry.size for prefix in prefixes for entry in target.entries(prefix)}
    lacking = [entry for entry in entries if there.get(entry.name) != entry.size]
    result.there += len(entries) - len(lacking)
    total, done = sum(entry.size for entry in lacking), 0
    for entry, problem in _spread(lacking, lambda each: _copy_named(source, target, each, each.name in there)):
        done += entry.size
        if problem:
            result.problems.append(problem)
        else:
            result.objects += 1
            result.bytes += entry.size
        report(Progress(what, done, max(total, 1)))


def _spread(entries: Iterable[Entry], work: Callable[[Entry], str]) -> Iterator[tuple[Entry, str]]:
    """Yield each entry with what `work` returned for it, in order."""
    waiting: deque[tuple[Entry, Future[str]]] = deque()
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="copy") as pool:
        try:
            for entry in entries:
                waiting.append((entry, pool.submit(work, entry)))
                if len(waiting) > _AT_ONCE:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _copy_named(source: Store, target: Store, entry: Entry, replace: bool) -> str:
    """Copy one object, replacing one of another size; return what is wrong with it, if anything is."""
    try:
        data = source.get(entry.name)
    except NotFoundError:
        return ""  # deleted meanwhile: nothing that stays needs it
    if digest(data) != hash_in_name(entry.name):
        return damaged(entry.name, "it is not what was written: its hash differs").message
    if replace:
        target.delete(entry.name)
    put_once(target, entry.name, [data])
    return ""


def _copy_history(
    repository: Repository,
    target: Store,
    machines: dict[str, MachineRecord],
    history: list[Entry],
    result: CopyResult,
) -> None:
    """Copy the entries that were there before anything else was looked at, oldest first."""
    recipients = read_vouched(repository)
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
            data = read_entry(repository, entry.name, machine, recipients)[1]
        except DamagedError as error:
            if _exists(repository.store, entry.name):
                result.problems.append(error.message)
            continue
        target.put(entry.name, [data])
        result.objects += 1
        result.bytes += len(data)


def _exists(store: Store, name: str) -> bool:
    try:
        store.get(name, size=1)
    except NotFoundError:
        return False
    return True


def _compare(source: Store, target: Store, entry: Entry, result: CopyResult) -> None:
    """Tell if both places have gone on by themselves: then each has a snapshot of the same number."""
    limit = max(MAX_SNAPSHOT, MAX_LEDGER)
    try:
        same = source.get(entry.name, size=limit) == target.get(entry.name, size=limit)
    except NotFoundError:
        return
    if not same:
        result.problems.append(
            f"{entry.name} is another entry at {target.location}: both places were backed up to, or it is damaged there"
        )


def _delete_gone(repository: Repository, target: Store, machines: Iterable[MachineRecord], result: CopyResult) -> None:
    """Delete at the target what the ledgers that are there say, and passphrases that the source no longer has."""
    copied = Repository(target, repository.config)
    recipients = read_vouched(copied)
    names: list[str] = []
    for machine in machines:
        entries, problems = entry_names(copied, machine.id), list[str]()
        ledgers = find_ledgers(copied, machine, recipients, entries, problems)
        if problems or ledgers.newest is None:
            continue
        doomed = ledgers.newest.body.doomed
        names += [name for name in entries if is_gone(sequence_of(name), ledgers.gone)]
        names += [*doomed.names, *(pack_name(machine.id, each) for each in split_packs(doomed.packs))]
    kept = {entry.name for entry in repository.store.entries(SLOTS)}
    if kept:
        names += [entry.name for entry in target.entries(SLOTS) if entry.name not in kept]
    present = {entry.name for entry in target.entries("")}
    for name in names:
        if name in present:
            target.delete(name)
            result.deleted += 1
