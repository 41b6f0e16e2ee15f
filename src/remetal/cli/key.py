"""`remetal key`: who can open a repository, and how."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from remetal.cli.options import DEFAULTS, Credentials, Output, Repo, need_secret, new_passphrase
from remetal.cli.output import print_result, reporting
from remetal.cli.tables import escape, key_table
from remetal.errors import RemetalError, UsageError
from remetal.ids import match_prefix, short
from remetal.repository.kit import RecoveryKit
from remetal.repository.remove import remove_recipient
from remetal.repository.repository import (
    Repository,
    accept_recipients,
    add_passphrase,
    add_recipient,
    change_passphrase,
    list_keys,
    make_kit,
    remove_passphrase,
)
from remetal.repository.retire import retire_machine
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
    with opened_repository(repo, read_only=True) as repository:
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
    with new_kit_page(kit_page) as write_page, opened_repository(repo, read_only=True) as repository:
        made = make_kit(repository, unlock(repository, need_secret(credentials)))
        write_page(made)
    _print_kit(made, output)


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
def remove(
    *,
    repo: Repo,
    even_last: Annotated[
        bool,
        Parameter(
            negative=(), help="Remove it even if it is its recipient's last: only the recovery kit is left then."
        ),
    ] = False,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Remove the passphrase that is given. The repository's last one cannot be removed.

    Whoever kept a copy of the repository can still use the old passphrase on that copy.
    """
    with opened_repository(repo) as repository:
        removed = remove_passphrase(repository, _passphrase(credentials), even_last=even_last)
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

    It opens what machines store after they have accepted it: run `remetal key accept` on each of them. What was stored
    before stays closed to it until `remetal prune --reseal`.
    """
    with new_kit_page(kit_page) as write_page, opened_repository(repo) as repository:
        key = unlock(repository, need_secret(credentials))
        made = add_recipient(repository, key, new_passphrase(new_passphrase_file, what="the new recipient"))
        write_page(made)
    _print_kit(made, output)


@app.command(name="remove-recipient")
def remove_one(
    recipient: str,
    /,
    *,
    repo: Repo,
    abandon: Annotated[
        bool,
        Parameter(negative=(), help="Remove it even if there are packs that it alone opens. What they hold is lost."),
    ] = False,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Remove a recipient: machines seal nothing more to it, and its passphrases are gone.

    Refused while there are packs that none of the others opens. What was sealed to it before stays open to it until
    `remetal prune --reseal` has written that anew, and in copies of the repository for ever.

    Parameters
    ----------
    recipient
        Id of the recipient, or its beginning (`remetal key list`).
    """
    with reporting(output) as report, opened_repository(repo) as repository:
        known = [each.id for each in list_keys(repository) if each.kind in {"recipient", "revoked"}]
        chosen = match_prefix(recipient, known, what="recipient")
        key = unlock(repository, need_secret(credentials))
        remove_recipient(repository, key, chosen, abandon=abandon, report=report)
    print_result(output, {"removed": chosen}, f"Removed recipient {short(chosen)}. Next: remetal prune --reseal")


@app.command(name="retire-machine")
def retire(
    machine: str,
    /,
    *,
    repo: Repo,
    successor: Annotated[
        str | None,
        Parameter(help="Id of the machine that goes on in its place, or its beginning.", metavar="MACHINE"),
    ] = None,
    last: Annotated[
        int | None,
        Parameter(
            help="Where its history is damaged: the number of the last snapshot that counts (`remetal show`). Nothing "
            "is deleted, but what comes after it does not count any more, and no later number can be given.",
            metavar="NUMBER",
        ),
    ] = None,
    credentials: Credentials = Credentials(),
    output: Output = Output(),
) -> None:
    """Let a machine's own keys count no more, for instance after somebody has broken into it.

    Its snapshots up to now stay good. Whatever is signed with these keys afterwards is believed by nobody; run this
    again to delete it. The machine gets new keys, and a new id, with its next backup; compare that id with what the
    machine shows, then run this again with --successor, so that both count as one machine for `latest` and `forget`.

    Parameters
    ----------
    machine
        Id of the machine, or its beginning (`remetal key list`), or its name where only one has it.
    """
    with opened_repository(repo) as repository:
        chosen = _find_machine(repository, machine)
        follower = _find_machine(repository, successor) if successor is not None else ""
        key = unlock(repository, need_secret(credentials))
        done = retire_machine(repository, key, chosen, successor=follower, last=last)
    follows = f" {short(done.successor)} goes on in its place." if done.successor else ""
    print_result(
        output,
        {"retired": chosen, "last": done.last, "successor": done.successor},
        f"Retired machine {short(chosen)}: nothing behind its entry {done.last} counts.{follows}",
    )


def _find_machine(repository: Repository, wanted: str) -> str:
    """Return the id of the machine that a name or the beginning of an id means. Raises UsageError."""
    machines = [each for each in list_keys(repository) if each.kind in {"machine", "retired"}]
    named = [each.id for each in machines if each.name == wanted]
    return named[0] if len(named) == 1 else match_prefix(wanted, [each.id for each in machines], what="machine")


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


@contextmanager
def new_kit_page(path: Path | None) -> Iterator[Callable[[RecoveryKit], None]]:
    """Make the file for the kit's page before anything else happens, and yield what writes the page into it.

    The file is for the owner's eyes only, and goes away again if the block fails. Raises UsageError if it exists
    or cannot be made.
    """
    if path is None:
        yield lambda made: None
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(
            f"cannot write the recovery kit to {path}: {os.strerror(error.errno or 0)}",
            hint="Name a new file in a folder that is there.",
        ) from error
    written = False

    def write(made: RecoveryKit) -> None:
        nonlocal written
        try:
            with os.fdopen(os.dup(fd), "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(made.page())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RemetalError(
                f"the recovery kit could not be written to {path}: {os.strerror(error.errno or 0)}",
                hint="All else is done. Print the kit with `remetal key kit`.",
            ) from error
        written = True

    try:
        yield write
    finally:
        os.close(fd)
        if not written:
            path.unlink(missing_ok=True)


def _print_kit(made: RecoveryKit, output: Output) -> None:
    print_result(
        output,
        {"recipient": made.recipient_id, "kit": made.text()},
        escape(made.text()),
        lost="Print the kit again: remetal key kit",
    )


def _passphrase(credentials: Credentials) -> str:
    secret = need_secret(credentials)
    if secret.passphrase is None:
        raise UsageError("this needs the passphrase itself, not the recovery kit")
    return secret.passphrase
