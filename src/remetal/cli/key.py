"""`remetal key`: who can open a repository, and how."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from remetal.cli.tables import escape

from remetal.cli.options import DEFAULTS, Credentials, Output, Repo, need_secret, new_passphrase
from remetal.cli.output import print_result
from remetal.cli.tables import key_table
from remetal.errors import UsageError
from remetal.ids import short
from remetal.repository import (
    RecoveryKit,
    accept_recipients,
    add_passphrase,
    add_recipient,
    change_passphrase,
    list_keys,
    make_kit,
    remove_passphrase,
)
from remetal.workflows.access import find_local_keys, opened_repository, unlock

app = App(
    name="key",
    default_parameter=DEFAULTS,
    help="List, add, change and remove the passphrases and recipients of a repository, and print its recovery kit.",
)

NewPassphrase = Annotated[
    Path | None,
    Parameter(
        name="--new-passphrase-file",
        help="Take the new passphrase from the first line of this file instead of asking twice.",
        metavar="FILE",
    ),
]
KitPage = Annotated[
    Path | None,
    Parameter(
        name="--kit-page", help="Also write the recovery kit as a page to print, with a QR code.", metavar="FILE"
    ),
]


@app.command(name="list")
def list_all(*, repo: Repo, output: Output = Output()) -> None:
    """List recipients, passphrases and enrolled machines. No passphrase is needed."""
    with opened_repository(repo) as repository:
        keys = list_keys(repository)
    print_result(output, msgspec.to_builtins(keys), key_table(keys))


@app.command
def kit(
    *,
    repo: Repo,
    kit_page: KitPage = None,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Print the recovery kit again: the private key on paper. Whoever holds it can restore everything."""
    with opened_repository(repo) as repository:
        _print_kit(make_kit(repository, unlock(repository, need_secret(credentials))), kit_page, output)


@app.command(name="add-passphrase")
def add(
    *,
    repo: Repo,
    new_passphrase_file: NewPassphrase = None,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Add a passphrase; those that exist stay good. With --kit-file, this is how a forgotten one is replaced."""
    with opened_repository(repo) as repository:
        key = unlock(repository, need_secret(credentials))
        slot = add_passphrase(repository, key, new_passphrase(new_passphrase_file, what="the repository"))
    print_result(output, {"added": slot}, f"Added passphrase {short(slot)}.")


@app.command(name="change-passphrase")
def change(
    *,
    repo: Repo,
    new_passphrase_file: NewPassphrase = None,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Put a new passphrase in the place of the one that is given. Until the new one is stored, the old one stays."""
    with opened_repository(repo) as repository:
        change_passphrase(
            repository, _passphrase(credentials), new_passphrase(new_passphrase_file, what="the repository")
        )
    print_result(output, {"changed": True}, "Changed the passphrase.")


@app.command(name="remove-passphrase")
def remove(*, repo: Repo, credentials: Credentials = Credentials(), output: Output = Output()) -> None:
    """Remove the passphrase that is given. The last one cannot be removed.

    Whoever kept a copy of the repository can still use the old passphrase on that copy.
    """
    with opened_repository(repo) as repository:
        removed = remove_passphrase(repository, _passphrase(credentials))
    print_result(output, {"removed": removed}, f"Removed passphrase {', '.join(short(slot) for slot in removed)}.")


@app.command(name="add-recipient")
def recipient(
    *,
    repo: Repo,
    new_passphrase_file: NewPassphrase = None,
    kit_page: KitPage = None,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Add a second private key with its own passphrase and recovery kit, as an escrow.

    It opens what machines back up after they have accepted it: run `remetal key accept` on each of them.
    """
    with opened_repository(repo) as repository:
        key = unlock(repository, need_secret(credentials))
        made = add_recipient(repository, key, new_passphrase(new_passphrase_file, what="the new recipient"))
    _print_kit(made, kit_page, output)


@app.command
def accept(*, repo: Repo, output: Output = Output()) -> None:
    """Let this host's machines seal what they back up from now on to the repository's new recipients as well.

    Compare the ids that are printed with the new recipient's recovery kit.
    """
    with opened_repository(repo) as repository:
        machines = find_local_keys(repository)
        if not machines:
            raise UsageError("this host backs up no machine to the repository", hint="Its first backup enrolls it.")
        accepted = {keys.name: [each.id for each in accept_recipients(repository, keys)] for keys in machines}
    lines = [
        f"{escape(name)} now seals to {', '.join(ids)} as well." if ids else f"{escape(name)}: nothing new to accept."
        for name, ids in accepted.items()
    ]
    print_result(output, accepted, *lines)


def write_kit(path: Path, page: str) -> None:
    """Write the kit's page for the owner's eyes only, to a new file. Raises UsageError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UsageError(f"cannot write the recovery kit to {path}: {os.strerror(error.errno or 0)}") from error
    with os.fdopen(fd, "w") as file:
        file.write(page)


def _print_kit(made: RecoveryKit, page: Path | None, output: Output) -> None:
    if page is not None:
        write_kit(page, made.page())
    print_result(output, {"recipient": made.recipient_id, "kit": made.text()}, escape(made.text()))


def _passphrase(credentials: Credentials) -> str:
    secret = need_secret(credentials)
    if secret.passphrase is None:
        raise UsageError("this needs the passphrase itself, not the recovery kit")
    return secret.passphrase
