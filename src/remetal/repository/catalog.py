"""The catalog: what somebody with a key sees of machines, snapshots and chunks, with everything verified."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import msgspec.structs

from remetal.errors import DamagedError, RefusedError
from remetal.repository.history import (
    LEDGER,
    Envelope,
    Gone,
    check_chain,
    entry_name,
    history_folder,
    is_gone,
    names_signer,
    open_envelope,
    sequence_of,
)
from remetal.repository.ledgers import MAX_LEDGER, Ledger, open_ledger
from remetal.repository.machines import (
    Domain,
    Head,
    MachineKeys,
    MachineRecord,
    find_secrets,
    open_secrets,
    read_machines,
)
from remetal.repository.objects import HISTORY, damaged, get_object
from remetal.repository.recipients import RecipientKey, read_recipients, read_revoked
from remetal.repository.repository import Repository
from remetal.repository.retired import Retired, Vouched, read_retired
from remetal.repository.snapshots import MAX_SNAPSHOT, Snapshot, open_snapshot

_FOLDER = re.compile(rf"{HISTORY}([0-9a-f]{{32}})/")


@dataclass(frozen=True, slots=True)
class MachineAccess:
    """A machine's public record together with its opened secrets."""

    machine: MachineRecord
    domain: Domain


@dataclass(frozen=True, slots=True)
class Ledgers:
    """The newest ledger of a machine's history, if there is one; `certain` unless a newer one may be unreadable."""

    newest: Ledger | None = None
    certain: bool = True

    @property
    def gone(self) -> tuple[Gone, ...]:
        """What was forgotten."""
        return self.newest.body.gone if self.newest is not None else ()


@dataclass(frozen=True, slots=True)
class History:
    """All that stands of a machine's history, in order, and a sentence for everything that is not as it should be.

    `names` are those of all entries, forgotten ones that are still there included.
    """

    names: list[str]
    ledgers: Ledgers
    envelopes: list[Envelope]
    snapshots: list[Snapshot]
    problems: list[str]


@dataclass(slots=True)
class Catalog:
    """Verified snapshots, oldest first, and in `problems` a sentence for everything that is not as it should be.

    `closed` are those of the problems that keep machines from being opened at all. `ledgers` are by machine, as
    `machines` are; `retired` are those whose keys count no more.
    """

    repository: Repository
    machines: dict[str, MachineAccess]
    ledgers: dict[str, Ledgers] = field(default_factory=dict)
    retired: Mapping[str, Retired] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    closed: Sequence[str] = ()
    _snapshots: list[Snapshot] = field(default_factory=list)

    def snapshots(self) -> list[Snapshot]:
        """Return the verified snapshots of all machines that the key gives access to, oldest first."""
        return list(self._snapshots)


def open_catalog(repository: Repository, keys: MachineKeys | RecipientKey) -> Catalog:
    """Read and verify all snapshots: with a machine's keys its own, with a recipient's key those of all machines.

    Damage does not raise: what can be verified is listed, what cannot is told in `problems`.
    Raises RefusedError if the keys belong to another repository.
    """
    catalog = Catalog(repository, {})
    if isinstance(keys, MachineKeys):
        check_keys(repository, keys)
        catalog.machines[keys.machine_id] = MachineAccess(keys.stored.record, keys.domain)
    else:
        _open_machines(catalog, keys)
    vouched = read_vouched(repository)
    catalog.retired = vouched.retired
    for access in catalog.machines.values():
        history = read_history(repository, access, vouched)
        catalog.ledgers[access.machine.id] = history.ledgers
        catalog._snapshots += history.snapshots
        catalog.problems += history.problems
    if isinstance(keys, MachineKeys):
        present = {(each.sequence, each.id) for each in catalog.snapshots()}
        problem = head_problem(keys.stored.head, present, catalog.ledgers[keys.machine_id].gone)
        catalog.problems += [problem] if problem else []
    catalog._snapshots.sort(key=lambda each: (each.time, each.machine_id, each.sequence))
    return catalog


def check_keys(repository: Repository, keys: MachineKeys) -> None:
    """Raise RefusedError unless the keys were made for this repository as it is."""
    if keys.repository_id != repository.config.id or keys.stored.chunk_size != repository.config.chunk_size:
        raise RefusedError(
            f"{repository.store.location} is not the repository that this machine was enrolled in",
            hint="Check the location; if it is right, somebody has put another repository there.",
        )


def read_vouched(repository: Repository) -> Vouched:
    """Return who may sign entries of histories, and up to which one."""
    store, repository_id = repository.store, repository.config.id
    recipients = {each.id: each for each in read_recipients(store, repository_id)[0]}
    revoked = read_revoked(store, repository_id, list(recipients.values()))[0]
    active = {identity: each for identity, each in recipients.items() if identity not in revoked}
    return Vouched(recipients, read_retired(store, repository_id, active)[0])


def entry_names(repository: Repository, machine_id: str) -> list[str]:
    """Return the names of a machine's entries, oldest first."""
    entries = repository.store.entries(history_folder(machine_id))
    return [entry.name for entry in entries if sequence_of(entry.name)]


def last_number(names: Sequence[str]) -> int:
    """Return the number of the newest of a history's entries, which have these names; 0 if there is none."""
    return sequence_of(names[-1]) if names else 0


def read_entry(repository: Repository, name: str, machine: MachineRecord, vouched: Vouched) -> tuple[Envelope, bytes]:
    """Read an entry of a machine's history, checking form and signature. Raises DamagedError.

    What is not as it should be is read once more, and who may sign it, too: a store may show less than it holds for a
    moment, and an entry that is passed over is one that the next entry does not follow.
    """
    limit = max(MAX_SNAPSHOT, MAX_LEDGER)
    with suppress(DamagedError):
        data = get_object(repository.store, name, limit)
        return open_envelope(name, data, machine, vouched), data
    data = get_object(repository.store, name, limit)
    if not names_signer(data, vouched):
        vouched = read_vouched(repository)
    return open_envelope(name, data, machine, vouched), data


def find_ledgers(
    repository: Repository,
    machine: MachineRecord,
    vouched: Vouched,
    names: list[str],
    problems: list[str],
    head: Head | None = None,
) -> Ledgers:
    """Return the newest ledger of a machine, whose entries have these names. What is wrong is added to `problems`.

    `head` is what the machine remembers as its newest snapshot: that entry is no ledger, even if it is damaged.
    """
    certain = True
    for name in reversed(names):
        try:
            envelope, data = read_entry(repository, name, machine, vouched)
            if envelope.kind != LEDGER:
                if not envelope.ledger:
                    return Ledgers(None, certain)
                pointed = entry_name(machine.id, envelope.ledger)
                envelope, data = read_entry(repository, pointed, machine, vouched)
                if envelope.kind != LEDGER:
                    raise damaged(pointed, "it is no ledger, as a later snapshot says")
            return Ledgers(open_ledger(envelope, data), certain)
        except DamagedError as error:
            problems.append(error.message)
            certain = certain and head is not None and head.sequence == sequence_of(name)
    return Ledgers(None, certain)


@dataclass(frozen=True, slots=True)
class Newest:
    """Where a machine's history stands: its newest readable snapshot, and its ledgers.

    `follows` is what the next entry follows: the last number that is taken, and the id that it links to (empty: none).
    """

    snapshot: Snapshot | None
    follows: Head
    ledgers: Ledgers


def find_newest(repository: Repository, access: MachineAccess, head: Head | None, problems: list[str]) -> Newest:
    """Return where a machine's history stands.

    The next entry follows the newest that is signed, or the snapshot that the machine remembers if that is newer; its
    number is behind all that are taken. Only what is needed is read. What is wrong is added to `problems`.
    """
    machine, vouched = access.machine, read_vouched(repository)
    names = entry_names(repository, machine.id)
    ledgers = find_ledgers(repository, machine, vouched, names, [], head)
    signed: Head | None = None
    snapshot: Snapshot | None = None
    for name in reversed(names):
        try:
            envelope, data = read_entry(repository, name, machine, vouched)
            signed = signed or Head(sequence=envelope.sequence, id=envelope.id)
            if head is not None and head.sequence == envelope.sequence and head.id != envelope.id:
                problems.append(_vanished(head))
            if envelope.kind != LEDGER and not is_gone(envelope.sequence, ledgers.gone):
                snapshot = open_snapshot(envelope, data, machine, access.domain)
                break
        except DamagedError as error:
            problems.append(error.message)
    if head is not None:
        if entry_name(machine.id, head.sequence) not in names and not is_gone(head.sequence, ledgers.gone):
            problems.append(_vanished(head))
        if signed is None or head.sequence > signed.sequence:
            signed = head
    last = last_number(names)
    follows = Head(sequence=max(signed.sequence, last), id=signed.id) if signed else Head(sequence=last, id="")
    return Newest(snapshot, follows, ledgers)


def head_problem(head: Head | None, present: Iterable[tuple[int, str]], gone: Iterable[Gone]) -> str:
    """Return a sentence if the snapshot that a machine remembers as its newest is not there, else nothing."""
    if head is None or (head.sequence, head.id) in set(present) or is_gone(head.sequence, gone):
        return ""
    return _vanished(head)


def _vanished(head: Head) -> str:
    return (
        f"snapshot {head.sequence} ({head.id[:12]}), which this machine has made, is not in the repository: "
        "it was removed, or the repository was set back"
    )


def _open_machines(catalog: Catalog, key: RecipientKey) -> None:
    repository = catalog.repository
    if key.repository_id != repository.config.id:
        raise RefusedError("the key belongs to another repository", hint="Unlock this repository with its own key.")
    machines, problems = read_machines(repository.store, repository.config.id)
    catalog.problems += problems
    names = find_secrets(repository.store, key)
    for machine in machines:
        try:
            domain = open_secrets(repository.store, machine, key, names)
            catalog.machines[machine.id] = MachineAccess(machine, domain)
        except DamagedError as error:
            catalog.problems.append(error.message)
    known = {machine.id for machine in machines}
    found = (_FOLDER.match(entry.name) for entry in repository.store.entries(HISTORY))
    owners = {match[1] for match in found if match}
    catalog.problems += [f"the machine of {HISTORY}{each}/ has no record" for each in sorted(owners - known)]
    catalog.closed = tuple(catalog.problems)


def need_unretired(repository: Repository, machine: MachineRecord) -> None:
    """Raise RefusedError if a machine's keys were retired, so that nothing it adds counts."""
    if machine.id in read_vouched(repository).retired:
        raise RefusedError(
            f"the keys of machine '{machine.name}' ({machine.id[:12]}) were retired by a recipient of the repository",
            hint="Nothing was added. The next backup of this machine enrolls it anew, with new keys.",
        )


def is_void(repository: Repository, machine: MachineRecord, sequence: int) -> bool:
    """Whether an entry that was created just now counts for nothing, because its number had been used before.

    Forgotten entries are deleted once a later ledger names them, so their numbers look free to somebody who has slept.
    """
    names = entry_names(repository, machine.id)
    if not names or sequence_of(names[-1]) <= sequence:
        return False
    ledgers = find_ledgers(repository, machine, read_vouched(repository), names, [])
    return not ledgers.certain or is_gone(sequence, ledgers.gone)


def _share_pages(snapshot: Snapshot, pages: dict[bytes, bytes]) -> Snapshot:
    """Return the same snapshot, but with the very objects that earlier ones have for equal pages of maps."""
    images = (
        msgspec.structs.replace(image, pages=tuple(pages.setdefault(page, page) for page in image.pages))
        for image in snapshot.images
    )
    return replace(snapshot, images=tuple(images))


def read_history(repository: Repository, access: MachineAccess, vouched: Vouched) -> History:
    """Read and verify all that stands of a machine's history."""
    machine, problems = access.machine, list[str]()
    names = entry_names(repository, machine.id)
    ledgers = find_ledgers(repository, machine, vouched, names, problems)
    envelopes: list[Envelope] = []
    snapshots: list[Snapshot] = []
    pages: dict[bytes, bytes] = {}
    for name in names:
        if is_gone(sequence_of(name), ledgers.gone):
            continue
        try:
            envelope, data = read_entry(repository, name, machine, vouched)
            envelopes.append(envelope)
            if envelope.kind != LEDGER:
                snapshots.append(_share_pages(open_snapshot(envelope, data, machine, access.domain), pages))
        except DamagedError as error:
            problems.append(error.message)
    problems += check_chain(envelopes, ledgers.gone, machine.name)
    return History(names, ledgers, envelopes, snapshots, list(dict.fromkeys(problems)))
