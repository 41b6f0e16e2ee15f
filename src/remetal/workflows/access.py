"""Opening a repository and its keys the way a person names them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from remetal.errors import DamagedError, RefusedError, UsageError
from remetal.ids import SHORT, match_prefix, short
from remetal.repository.catalog import Catalog, open_catalog
from remetal.repository.machines import MachineKeys, state_folder
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import (
    Repository,
    load_machine_keys,
    open_repository,
    unlock_with_kit,
    unlock_with_passphrase,
)
from remetal.repository.retired import Retired, find_line, find_successors
from remetal.repository.snapshots import Snapshot
from remetal.workflows.stores import opened_store


@dataclass(frozen=True, slots=True)
class Secret:
    """What opens a recipient's private key: the passphrase, or the text of the printed recovery kit."""

    passphrase: str | None = None
    kit: str | None = None


@contextmanager
def opened_repository(location: str, *, urgent: bool = False, read_only: bool = False) -> Iterator[Repository]:
    """Open the repository at `location` for the length of a block; see `opened_store`.

    Raises UnavailableError if it cannot be reached, RefusedError if there is none or its format is newer.
    """
    with opened_store(location, urgent=urgent, read_only=read_only) as opened:
        yield open_repository(opened.store)


def unlock(repository: Repository, secret: Secret) -> RecipientKey:
    """Open the recipient's private key. Raises RefusedError if the secret is wrong or missing."""
    if secret.kit is not None:
        return unlock_with_kit(repository, secret.kit)
    if secret.passphrase is not None:
        return unlock_with_passphrase(repository, secret.passphrase)
    raise RefusedError(
        "this needs the repository's passphrase or its recovery kit",
        hint="Type the passphrase when asked, or give --passphrase-file or --kit-file.",
    )


def find_local_keys(repository: Repository) -> list[MachineKeys]:
    """Return the keys of the machines that back up to this repository from here, by name."""
    names = sorted(folder.name for folder in machines_folder().glob("*/"))
    found = [load_machine_keys(machines_folder() / name, repository) for name in names]
    return [keys for keys in found if keys is not None]


def machines_folder() -> Path:
    """Return the folder that holds one folder of keys for each machine that is backed up from this host."""
    return state_folder() / "machines"


def local_problems(repository: Repository, machines: Iterable[MachineKeys]) -> list[str]:
    """Return what this host's machines miss in the repository: they remember the last snapshot that they made."""
    return [problem for keys in machines for problem in open_catalog(repository, keys).problems]


def open_records(repository: Repository, key: RecipientKey | None) -> list[Catalog]:
    """Open the records that may be read: all with a recipient's key, else those of this host's machines.

    Raises RefusedError if there is neither a key nor a machine of this host in the repository.
    """
    if key is not None:
        return [open_catalog(repository, key)]
    local = find_local_keys(repository)
    if not local:
        raise RefusedError(
            "this host has no machine keys for the repository, so its records stay closed",
            hint="Give the repository's passphrase: --passphrase-file FILE, or type it when asked.",
        )
    return [open_catalog(repository, keys) for keys in local]


def select_snapshot(
    snapshots: Sequence[Snapshot],
    wanted: str,
    machine: str | None,
    retired: Mapping[str, Retired],
    problems: Sequence[str] = (),
) -> Snapshot:
    """Return the snapshot that a person means: an id's prefix, or `latest` with a machine where several exist.

    A machine that was `retired` and its successor are one. `problems` are what was wrong while they were read.
    Raises UsageError if none or several fit, DamagedError if there is none at all and something was wrong.
    """
    if not snapshots and problems:
        raise DamagedError(
            f"no snapshot can be read: {problems[0]}{f', and {len(problems) - 1} more' if len(problems) > 1 else ''}",
            hint="Run `remetal check` to see all that is wrong; use a copy of the repository if there is one.",
        )
    candidates = [
        each for each in snapshots if machine is None or is_of_machine(machine, each.machine, each.machine_id)
    ]
    if not candidates:
        known = ", ".join(sorted({each.machine for each in snapshots}))
        raise UsageError(
            f"there is no snapshot of machine '{machine}'"
            if machine is not None
            else "the repository has no snapshot yet",
            hint=f"It has snapshots of: {known}." if known else "Make one with `remetal backup`.",
        )
    if wanted != "latest":
        chosen = match_prefix(wanted, (each.id for each in candidates), what="snapshot")
        return next(each for each in candidates if each.id == chosen)
    names = {find_line(each.machine_id, retired): each.machine for each in candidates}
    if len(names) > 1:
        machines = ", ".join(f"{name} ({short(identity)})" for identity, name in sorted(names.items()))
        one_name = len(set(names.values())) == 1
        raise UsageError(
            f"'latest' is ambiguous, because there are several machines: {machines}",
            hint="They share a name, as after a loss of the machine's keys: add --machine with an id in brackets, "
            "or give a snapshot's id (`remetal snapshots`)."
            if one_name
            else "Add --machine NAME, or give a snapshot's id.",
        )
    behind = min(len(find_successors(each.machine_id, retired)) for each in candidates)
    return [each for each in candidates if len(find_successors(each.machine_id, retired)) == behind][-1]


def is_of_machine(wanted: str, name: str, machine_id: str) -> bool:
    """Whether a person means the machine of this name and id: by its name, or by 12 digits of its id at least."""
    return wanted == name or (len(wanted) >= SHORT and machine_id.startswith(wanted.lower()))


@dataclass(frozen=True, slots=True)
class Listing:
    """The snapshots that may be read, oldest first, and what is wrong with their chains."""

    snapshots: tuple[Snapshot, ...]
    problems: tuple[str, ...]
    retired: Mapping[str, Retired]


def list_snapshots(location: str, secret: Secret | None, machine: str | None = None) -> Listing:
    """Return the snapshots of the repository at `location`, of one machine if it is named."""
    with opened_repository(location, read_only=True) as repository:
        return _read_records(repository, secret, machine)


def find_snapshot(location: str, secret: Secret | None, wanted: str, machine: str | None = None) -> Snapshot:
    """Return one snapshot by an id's prefix or `latest`. Raises UsageError if none or several fit."""
    listing = list_snapshots(location, secret)
    return select_snapshot(listing.snapshots, wanted, machine, listing.retired, listing.problems)


def _read_records(repository: Repository, secret: Secret | None, machine: str | None) -> Listing:
    catalogs = open_records(repository, unlock(repository, secret) if secret is not None else None)
    snapshots = [
        each
        for catalog in catalogs
        for each in catalog.snapshots()
        if machine is None or is_of_machine(machine, each.machine, each.machine_id)
    ]
    snapshots.sort(key=lambda each: (each.time, each.sequence))
    problems = [problem for catalog in catalogs for problem in catalog.problems]
    problems += local_problems(repository, find_local_keys(repository))
    return Listing(tuple(snapshots), tuple(dict.fromkeys(problems)), catalogs[0].retired)
