"""A repository: a store with a config, and the keys that live in it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from remetal.errors import DamagedError, RefusedError
from remetal.repository.cipher import KEY_SIZE
from remetal.repository.config import (
    DEFAULT_CHUNK_SIZE,
    FORMAT,
    Config,
    check_chunk_size,
    encode_config,
    read_config,
)
from remetal.repository.kit import RecoveryKit, parse_kit
from remetal.repository.machines import (
    MachineKeys,
    create_machine,
    load_keys,
    open_secrets,
    read_machines,
    save_keys,
    seal_secrets,
)
from remetal.repository.objects import CONFIG, HELP, HISTORY, INDEX, MACHINES, PACKS, RECIPIENTS, SLOTS
from remetal.repository.recipients import (
    MAX_RECIPIENTS,
    RecipientKey,
    RecipientRecord,
    put_recipient,
    read_recipients,
    read_revoked,
)
from remetal.repository.retired import read_retired
from remetal.repository.slots import need_room_for_slot, put_slot, read_slots, try_slot, unlock
from remetal.storage import AlreadyExistsError, NotFoundError, Store


@dataclass(frozen=True, slots=True)
class Repository:
    """An open repository: where it is, and what its config says."""

    store: Store
    config: Config


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One line of `list_keys`. `of` is the recipient of a passphrase.

    `kind` is `recipient`, `revoked` (a recipient that counts no more), `passphrase`, `machine` or `retired` (a machine
    whose keys count no more). `successor` is the machine that goes on in the place of a retired one.
    """

    kind: str
    id: str
    created: str
    name: str = ""
    of: str = ""
    successor: str = ""


def utc_now() -> str:
    """Return the present time, UTC, in ISO 8601 to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def init_repository(
    store: Store, *, passphrase: str, chunk_size: int = DEFAULT_CHUNK_SIZE, parity: bool = True
) -> tuple[Repository, RecoveryKit]:
    """Make a repository with its first recipient, and return it with the kit to print.

    `chunk_size` is in bytes, a power of two from 64 KiB to 4 MiB; `parity` says whether packs are to be protected by
    parity. The config is written last: before that there is no repository. Raises RefusedError if the store holds one
    already, UsageError for an empty passphrase.
    """
    check_chunk_size(chunk_size)
    _clear_place(store)
    seed = secrets.token_bytes(KEY_SIZE)
    key = RecipientKey(RecipientKey("", seed).id, seed)
    created = utc_now()
    config = Config(format=FORMAT, id=key.id, chunk_size=chunk_size, created=created, parity=parity)
    put_slot(store, key, passphrase, created=created)
    put_recipient(store, key, certifier=key, created=created)
    try:
        store.put(CONFIG, [encode_config(config)])
    except AlreadyExistsError as error:
        raise RefusedError(
            f"somebody else has just made a repository at {store.location}", hint="Use it, or choose another place."
        ) from error
    repository = Repository(store, config)
    return repository, make_kit(repository, key)


def _clear_place(store: Store) -> None:
    """Make sure that the store holds no repository, nor the beginnings of one."""
    try:
        store.get(CONFIG, size=1)
    except NotFoundError:
        pass
    else:
        raise RefusedError(
            f"there is a repository at {store.location} already", hint="Use it, or choose another place."
        )
    for prefix in (PACKS, INDEX, HISTORY, MACHINES):
        if next(store.entries(prefix), None) is not None:
            raise RefusedError(
                f"{store.location} holds a repository whose config is missing",
                hint="Bring the object 'config' back from a copy of the repository, or choose another place.",
            )
    for prefix in (RECIPIENTS, SLOTS):
        for entry in list(store.entries(prefix)):
            store.delete(entry.name)  # left by an init that was cut off: no config ever made it a repository


def open_repository(store: Store) -> Repository:
    """Open a repository.

    Raises RefusedError if there is none or a newer remetal made it, DamagedError if its config is damaged.
    """
    return Repository(store, read_config(store))


def enroll_machine(repository: Repository, name: str, *, pinned: Sequence[RecipientRecord] = ()) -> MachineKeys:
    """Make keys for a new machine and write its public record; the caller saves them (`save_machine_keys`).

    The machine pins the recipients that stand now; one that had keys before, of those that it had `pinned`. Raises
    UsageError for an impossible name, DamagedError if the repository's first recipient is not to be found.
    """
    return create_machine(
        repository.store,
        repository.config.id,
        repository.config.chunk_size,
        name,
        _still_active(repository, pinned) if pinned else active_recipients(repository),
        utc_now(),
    )


def trusted_recipients(repository: Repository) -> list[RecipientRecord]:
    """Return the recipients that the repository's id vouches for, the first one first. Raises DamagedError."""
    recipients, problems = read_recipients(repository.store, repository.config.id)
    if not recipients:
        said = f": {problems[0]}" if problems else ""
        raise DamagedError(f"the repository's first recipient is missing or damaged{said}", hint=HELP)
    return recipients


def active_recipients(repository: Repository) -> list[RecipientRecord]:
    """Return the recipients that are to be sealed to: all that were not revoked. Raises DamagedError.

    Of more than there may be only the first are returned, in the order in which others vouch for them.
    """
    recipients = trusted_recipients(repository)
    revoked, _ = read_revoked(repository.store, repository.config.id, recipients)
    return [each for each in recipients if each.id not in revoked][:MAX_RECIPIENTS]


def new_recipients(repository: Repository, keys: MachineKeys) -> list[RecipientRecord]:
    """Return the recipients that this machine does not seal its packs to yet."""
    pinned = {each.id for each in keys.stored.recipients}
    return [each for each in active_recipients(repository) if each.id not in pinned]


def accept_recipients(repository: Repository, keys: MachineKeys) -> list[RecipientRecord]:
    """Let this machine seal to the repository's new recipients from now on, and return those.

    This is the deliberate act that a new recipient needs on each machine; older packs stay closed to it.
    """
    fresh = new_recipients(repository, keys)
    for recipient in fresh:
        seal_secrets(repository.store, keys.domain, recipient, repository.config.id)
    keys.stored = msgspec.structs.replace(keys.stored, recipients=(*keys.stored.recipients, *fresh))
    if keys.path is not None:
        save_keys(keys.path.parent, keys)
    return fresh


def drop_revoked(repository: Repository, keys: MachineKeys) -> list[RecipientRecord]:
    """Let this machine seal no more to recipients that were revoked, and return those.

    One at least always stays. Raises RefusedError if that could only be one that was revoked.
    """
    staying = _still_active(repository, keys.stored.recipients)
    if len(staying) == len(keys.stored.recipients):
        return []
    dropped = [each for each in keys.stored.recipients if each not in staying]
    keys.stored = msgspec.structs.replace(keys.stored, recipients=staying)
    if keys.path is not None:
        save_keys(keys.path.parent, keys)
    return dropped


def _still_active(repository: Repository, pinned: Sequence[RecipientRecord]) -> tuple[RecipientRecord, ...]:
    """Return the recipients that were not revoked; all if the repository has none that was not.

    Raises RefusedError if it has some, and none of them is among those that are pinned.
    """
    active = {each.id for each in active_recipients(repository)}
    staying = tuple(each for each in pinned if each.id in active)
    if not staying and active:
        raise RefusedError(
            "every recipient that this machine seals to was removed: nobody could open this backup",
            hint="Compare the id of the recipient that took its place with its recovery kit (`remetal key list`), and "
            "accept it: remetal key accept",
        )
    return staying or tuple(pinned)


def load_machine_keys(state: Path, repository: Repository) -> MachineKeys | None:
    """Return the keys this machine keeps for the repository, or None. Raises RefusedError if they are unusable."""
    return load_keys(state, repository.config.id)


def save_machine_keys(state: Path, keys: MachineKeys) -> None:
    """Keep the keys in the state folder, for the owner only. Raises RefusedError if that fails."""
    save_keys(state, keys)


def unlock_with_passphrase(repository: Repository, passphrase: str) -> RecipientKey:
    """Return the recipient's key that a passphrase opens. Raises RefusedError if it opens none."""
    return unlock(repository.store, repository.config.id, passphrase)[0]


def unlock_with_kit(repository: Repository, text: str) -> RecipientKey:
    """Return the recipient's key that is on a recovery kit.

    Raises RefusedError for a typing error (naming the line) and for a kit of another repository.
    """
    repository_id, seed = parse_kit(text)
    if repository_id != repository.config.id:
        raise RefusedError(
            f"the recovery kit is for the repository {repository_id}, this one is {repository.config.id}",
            hint="Use this repository's kit; the id is printed on it.",
        )
    return RecipientKey(repository_id, seed)


def list_keys(repository: Repository) -> list[KeyInfo]:
    """Return recipients, passphrases and machines, as far as their records are whole."""
    store, repository_id = repository.store, repository.config.id
    known = read_recipients(store, repository_id)[0]
    revoked, _ = read_revoked(store, repository_id, known)
    recipients = [KeyInfo("revoked" if each.id in revoked else "recipient", each.id, each.created) for each in known]
    slots = read_slots(store, repository_id)[0]
    passphrases = [KeyInfo("passphrase", each.slot.id, each.slot.created, of=each.slot.recipient) for each in slots]
    active = {each.id: each for each in known if each.id not in revoked}
    retired, _ = read_retired(store, repository_id, active)
    machines = [
        KeyInfo("retired", each.id, each.created, each.name, successor=retired[each.id].successor)
        if each.id in retired
        else KeyInfo("machine", each.id, each.created, each.name)
        for each in read_machines(store, repository_id)[0]
    ]
    return recipients + passphrases + machines


def add_passphrase(repository: Repository, key: RecipientKey, passphrase: str) -> str:
    """Add a passphrase for a recipient's key and return the slot's id.

    Raises UsageError for an empty one, RefusedError if there are as many as there may be.
    """
    need_room_for_slot(repository.store, repository.config.id)
    return put_slot(repository.store, key, passphrase, created=utc_now()).id


def remove_passphrase(repository: Repository, passphrase: str, *, even_last: bool = False) -> list[str]:
    """Remove every slot that a passphrase opens and return their ids.

    Raises RefusedError if it opens none, if no other passphrase would be left, and unless `even_last` if a recipient
    that counts would be left without one.
    """
    slots, _ = read_slots(repository.store, repository.config.id)
    opened = [each for each in slots if try_slot(each.slot, passphrase) is not None]
    if not opened:
        raise RefusedError("the passphrase opens nothing in this repository", hint="List the keys: remetal key list")
    if len(opened) == len(slots):
        raise RefusedError(
            "this is the repository's only passphrase", hint="Add another one first: remetal key add-passphrase"
        )
    staying = {each.slot.recipient for each in slots if each not in opened}
    for recipient in () if even_last else active_recipients(repository):
        if recipient.id not in staying and any(each.slot.recipient == recipient.id for each in opened):
            raise RefusedError(
                f"this is the only passphrase of recipient {recipient.id}",
                hint="Add another one first (remetal key add-passphrase), or change it (change-passphrase). If its "
                "recovery kit is to be all that opens it from now on: --even-last.",
            )
    for each in opened:
        repository.store.delete(each.name)
    return [each.slot.id for each in opened]


def change_passphrase(repository: Repository, old: str, new: str) -> None:
    """Put a new passphrase in the place of an old one; between the two steps both are good.

    Raises RefusedError if the old one opens nothing.
    """
    key, stored = unlock(repository.store, repository.config.id, old)
    put_slot(repository.store, key, new, created=utc_now())
    repository.store.delete(stored.name)


def add_recipient(repository: Repository, key: RecipientKey, passphrase: str) -> RecoveryKit:
    """Make another recipient with a passphrase of its own, and return its kit.

    It reads the catalogs of all machines at once, and the packs that a machine writes after the machine's
    administrator has accepted it (`accept_recipients`). Raises DamagedError if a machine's secrets do not open,
    RefusedError if there are as many recipients or passphrases as there may be.
    """
    store, created = repository.store, utc_now()
    if len(active_recipients(repository)) >= MAX_RECIPIENTS:
        raise RefusedError(
            f"the repository has {MAX_RECIPIENTS} recipients, and cannot have more",
            hint="Remove one that is not needed any more: remetal key remove-recipient",
        )
    need_room_for_slot(store, repository.config.id)
    fresh = RecipientKey(repository.config.id, secrets.token_bytes(KEY_SIZE))
    domains = [open_secrets(store, each, key) for each in read_machines(store, repository.config.id)[0]]
    put_slot(store, fresh, passphrase, created=created)
    record = put_recipient(store, fresh, certifier=key, created=created)
    for domain in domains:
        seal_secrets(store, domain, record, repository.config.id)
    return make_kit(repository, fresh)


def make_kit(repository: Repository, key: RecipientKey) -> RecoveryKit:
    """Return the recovery kit of a recipient's key, dated today."""
    return RecoveryKit(
        repository_id=repository.config.id,
        recipient_id=key.id,
        location=repository.store.location,
        created=utc_now(),
        seed=key.seed,
    )
