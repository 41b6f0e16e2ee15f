"""Machines: the secrets that a machine keeps, and what the repository knows of it.

A machine's id is a hash of its signing key, so nobody can put another key in its place. Its two secrets, the id
key (chunk ids) and the catalog key (index, maps, snapshot bodies), are sealed to every recipient and bound to
the signed record by a commitment. None of this opens a pack. Specification: docs/format/keys.md.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from remetal.errors import DamagedError, RefusedError, UsageError
from remetal.repository.cipher import (
    KEY_SIZE,
    SEALS,
    SIGNATURE_SIZE,
    WRAPPING,
    CipherError,
    derive,
    sign,
    verify,
    verify_key,
)
from remetal.repository.objects import (
    MACHINES,
    MAX_KEY_OBJECT,
    SECRETS,
    Record,
    check_moment,
    damaged,
    decode_json,
    encode_json,
    encode_lines,
    get_named,
    put_named,
    split_lines,
)
from remetal.repository.recipients import RecipientKey, RecipientRecord, check_recipient
from remetal.storage import Store

MAX_MACHINES = 10_000
_CONTEXT = b"remetal 1 machine record\0"


@dataclass(frozen=True, slots=True)
class Domain:
    """The secrets of one machine: who has them computes its chunk ids and reads its catalog."""

    machine_id: str
    id_key: bytes = field(repr=False)
    catalog_key: bytes = field(repr=False)

    def record_key(self, kind: str) -> bytes:
        """Return the 64-byte AES-SIV key for `index`, `map` or `snapshot` objects."""
        return derive(f"catalog {kind}", self.catalog_key, size=64)

    @property
    def commitment(self) -> bytes:
        """What the public machine record says of the secrets without telling them."""
        return derive("machine secrets commitment", self.id_key + self.catalog_key)


class MachineRecord(Record, frozen=True, kw_only=True):
    """The public record of a machine, signed by its own key."""

    id: str
    repository: str
    name: str
    verify_key: bytes
    commitment: bytes
    created: str


class Head(Record, frozen=True, kw_only=True):
    """The newest snapshot that this machine remembers to have made."""

    sequence: int
    id: str


class MachineSecrets(Record, frozen=True, kw_only=True):
    """The file that a machine keeps about one repository, as it is stored."""

    version: int
    record: MachineRecord
    chunk_size: int
    id_key: bytes
    catalog_key: bytes
    signing_seed: bytes
    recipients: tuple[RecipientRecord, ...]
    head: Head | None = None


@dataclass
class MachineKeys:
    """A machine's own keys. `path` is the file they live in once they have been saved or loaded."""

    stored: MachineSecrets = field(repr=False)
    path: Path | None = None

    @property
    def machine_id(self) -> str:
        """The machine's id, 32 hexadecimal digits."""
        return self.stored.record.id

    @property
    def name(self) -> str:
        """The name that people gave the machine."""
        return self.stored.record.name

    @property
    def repository_id(self) -> str:
        """The repository that these keys belong to."""
        return self.stored.record.repository

    @property
    def domain(self) -> Domain:
        """The machine's secrets for chunk ids and the catalog."""
        return Domain(self.machine_id, self.stored.id_key, self.stored.catalog_key)

    def remember(self, head: Head) -> None:
        """Note the newest snapshot, so that its disappearance is noticed; durable if the keys have a file."""
        self.stored = msgspec.structs.replace(self.stored, head=head)
        if self.path is not None:
            _write_private(self.path, encode_json(self.stored))


def machine_id(signing_public: bytes) -> str:
    """Return the id of a machine: 128 bits of hash over its signing key, in hexadecimal."""
    return derive("machine id", signing_public, size=16).hex()


def create_machine(
    store: Store, repository_id: str, chunk_size: int, name: str, recipients: Sequence[RecipientRecord], created: str
) -> MachineKeys:
    """Make a machine's keys, write its record and its sealed secrets, and return the keys (not yet saved).

    Raises UsageError for an impossible name.
    """
    check_machine_name(name)
    signing_seed = secrets.token_bytes(KEY_SIZE)
    identity = machine_id(verify_key(signing_seed))
    domain = Domain(identity, secrets.token_bytes(KEY_SIZE), secrets.token_bytes(KEY_SIZE))
    record = MachineRecord(
        id=identity,
        repository=repository_id,
        name=name,
        verify_key=verify_key(signing_seed),
        commitment=domain.commitment,
        created=created,
    )
    stored = MachineSecrets(
        version=1,
        record=record,
        chunk_size=chunk_size,
        id_key=domain.id_key,
        catalog_key=domain.catalog_key,
        signing_seed=signing_seed,
        recipients=tuple(recipients),
    )
    for recipient in recipients:
        seal_secrets(store, domain, recipient, repository_id)
    signature = sign(signing_seed, _CONTEXT, encode_json(record))
    put_named(store, f"{MACHINES}{identity}.", encode_lines(record, signature))
    return MachineKeys(stored)


def check_machine_name(name: str) -> None:
    """Raise UsageError unless `name` is 1 to 64 printable characters that can also name a folder."""
    printable = not any(unicodedata.category(each)[0] == "C" for each in name)
    if not name.strip() or len(name) > 64 or not printable or "/" in name or name.startswith("."):
        raise UsageError(
            f"{name!r} cannot be the name of a machine",
            hint="Use up to 64 printable characters, no slash, and no dot in front.",
        )


def seal_secrets(store: Store, domain: Domain, recipient: RecipientRecord, repository_id: str) -> None:
    """Give a recipient access to a machine's catalog, and to the meaning of its chunk ids.

    It is done twice, since nobody but the recipient can look whether it was done well.
    """
    info = _secrets_info(repository_id, domain.machine_id, recipient.id)
    sealed = b"".join(recipient.kem.seal(info, domain.id_key + domain.catalog_key) for _ in range(SEALS))
    put_named(store, f"{SECRETS}{domain.machine_id}.{recipient.id}.", sealed)


def open_secrets(
    store: Store, machine: MachineRecord, key: RecipientKey, names: Mapping[str, Sequence[str]] | None = None
) -> Domain:
    """Return a machine's secrets with a recipient's key; `names` is what `find_secrets` found, for whoever needs many.

    Raises DamagedError if they are missing, damaged, or not those that the machine's record commits to.
    """
    prefix = f"{SECRETS}{machine.id}.{key.id}."
    found = [entry.name for entry in store.entries(prefix)] if names is None else names.get(machine.id, ())
    if not found:
        raise damaged(prefix, f"the secrets of machine '{machine.name}' are not there for this key")
    problem: DamagedError | None = None
    for name in found[:4]:
        try:
            return _open_secrets(store, name, machine, key)
        except DamagedError as error:
            problem = error
    assert problem is not None
    raise problem


def find_secrets(store: Store, key: RecipientKey) -> dict[str, list[str]]:
    """Return the names of the secrets that are sealed to a recipient, by machine."""
    found: dict[str, list[str]] = {}
    for entry in store.entries(SECRETS):
        machine, _, rest = entry.name.removeprefix(SECRETS).partition(".")
        if rest.startswith(f"{key.id}."):
            found.setdefault(machine, []).append(entry.name)
    return found


def _open_secrets(store: Store, name: str, machine: MachineRecord, key: RecipientKey) -> Domain:
    size = 2 * KEY_SIZE + WRAPPING
    sealed = get_named(store, name, SEALS * size)
    opened: list[Domain] = []
    for start in range(0, len(sealed), size):
        with suppress(CipherError):
            plain = key.kem.open(_secrets_info(machine.repository, machine.id, key.id), sealed[start : start + size])
            opened.append(Domain(machine.id, plain[:KEY_SIZE], plain[KEY_SIZE:]))
    if not opened:
        raise damaged(name, "it does not open with the key it is made for")
    for domain in opened:
        if domain.commitment == machine.commitment:
            return domain
    raise damaged(name, f"it holds other secrets than machine '{machine.name}' has")


def read_machines(store: Store, repository_id: str) -> tuple[list[MachineRecord], list[str]]:
    """Return the machines whose records are whole and signed, and what is wrong with the others."""
    machines: dict[str, MachineRecord] = {}
    problems: list[str] = []
    for count, entry in enumerate(store.entries(MACHINES)):
        if count >= MAX_MACHINES:
            problems.append(f"{MACHINES} holds more than {MAX_MACHINES} machines")
            break
        try:
            text, signature = split_lines(entry.name, get_named(store, entry.name, MAX_KEY_OBJECT), SIGNATURE_SIZE)
            record = decode_json(entry.name, text, MachineRecord)
            check_machine(entry.name, record, repository_id)
            verify(record.verify_key, signature, _CONTEXT, text)
        except DamagedError as error:
            problems.append(error.message)
        except CipherError:
            problems.append(f"the object {entry.name} is not signed by the machine it describes")
        else:
            machines[record.id] = record
    return list(machines.values()), problems


def check_machine(name: str, record: MachineRecord, repository_id: str) -> None:
    """Raise DamagedError unless the record's key is what its id says, and its name fit to be shown."""
    sizes = (len(record.verify_key), len(record.commitment)) == (KEY_SIZE, KEY_SIZE)
    if not sizes or record.id != machine_id(record.verify_key):
        raise damaged(name, "its key is not that of its id")
    if record.repository != repository_id:
        raise damaged(name, "it belongs to another repository")
    check_moment(name, record.created)
    try:
        check_machine_name(record.name)
    except UsageError as error:
        raise damaged(name, error.message) from error


def state_folder() -> Path:
    """Return the folder where this machine keeps its keys: `$REMETAL_STATE`, or /var/lib/remetal."""
    return Path(os.environ.get("REMETAL_STATE") or "/var/lib/remetal")


def load_keys(state: Path, repository_id: str) -> MachineKeys | None:
    """Return the keys that this machine keeps for a repository, or None if it has none.

    Raises RefusedError for a file that cannot be read or is not what remetal wrote.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", repository_id):
        return None
    path = state / f"{repository_id}.json"
    try:
        stored = decode_json(str(path), path.read_bytes(), MachineSecrets)
        _check_secrets(str(path), stored, repository_id)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RefusedError(
            f"this machine's keys in {path} cannot be read: {os.strerror(error.errno or 0)}",
            hint="Run as root, or name the folder that holds the keys with REMETAL_STATE.",
        ) from error
    except DamagedError as error:
        raise RefusedError(
            f"this machine's keys in {path} cannot be used: {error}",
            hint="Bring the file back from a copy, or move it away: the next backup enrolls this machine anew.",
        ) from error
    return MachineKeys(stored, path)


def check_state(state: Path) -> None:
    """Raise RefusedError unless keys can be saved in the state folder, which is made."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(state, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(state, error) from error


def _unwritable(path: Path, error: OSError) -> RefusedError:
    return RefusedError(
        f"this machine's keys cannot be written to {path}: {os.strerror(error.errno or 0)}",
        hint="Make the folder writable for root, or choose another with REMETAL_STATE.",
    )


def save_keys(state: Path, keys: MachineKeys) -> None:
    """Write the keys to the state folder, readable by the owner only, whole or not at all.

    Raises RefusedError if that fails.
    """
    path = state / f"{keys.repository_id}.json"
    _write_private(path, encode_json(keys.stored))
    keys.path = path


def _check_secrets(name: str, stored: MachineSecrets, repository_id: str) -> None:
    check_machine(name, stored.record, repository_id)
    domain = Domain(stored.record.id, stored.id_key, stored.catalog_key)
    lengths = {len(stored.id_key), len(stored.catalog_key), len(stored.signing_seed)}
    if stored.version != 1 or lengths != {KEY_SIZE} or not stored.recipients:
        raise damaged(name, "its keys are incomplete")
    if verify_key(stored.signing_seed) != stored.record.verify_key or domain.commitment != stored.record.commitment:
        raise damaged(name, "its keys do not belong together")
    for recipient in stored.recipients:
        check_recipient(name, recipient, repository_id)


def _write_private(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # it holds secrets
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _unwritable(path, error) from error


def _secrets_info(repository_id: str, machine: str, recipient: str) -> bytes:
    return f"remetal 1 machine secrets {repository_id} {machine} {recipient}".encode()
