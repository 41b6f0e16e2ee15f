"""Options that several commands share, and reading the secrets that they name."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from getpass import getpass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from remetal.errors import RefusedError, UsageError
from remetal.workflows.access import Secret

DEFAULTS = Parameter(show_default=False)
"""How parameters are shown that say nothing else: defaults stand in their help where they matter."""

_LONGEST_SECRET = 1 << 20
"""Size in bytes above which nothing can be a passphrase or a recovery kit."""

GENERAL = Group("General options", sort_key=90)

Repo = Annotated[
    str,
    Parameter(
        name=["--repo", "-r"],
        env_var="REMETAL_REPO",
        help="The repository: a folder such as /mnt/usb/backup, usb:LABEL/FOLDER, nfs://HOST/EXPORT/FOLDER, "
        "smb://USER@HOST/SHARE/FOLDER, sftp://USER@HOST/FOLDER, s3://BUCKET/PREFIX, or (to read only) "
        "https://HOST/FOLDER.",
        metavar="REPOSITORY",
    ),
]

Machine = Annotated[
    str | None,
    Parameter(name=["--machine"], help="The machine's name or id.", metavar="NAME"),
]


Drivers = Annotated[
    Path | None,
    Parameter(
        name="--drivers",
        help="Add the drivers in this folder, modules (.ko) or packages (.deb, .rpm), to the system.",
        metavar="DIR",
    ),
]


@Parameter(name="*", group=GENERAL)
@dataclass(frozen=True)
class Output:
    """How a command talks."""

    json: Annotated[
        bool, Parameter(name="--json", negative="", help="Print the result as JSON on standard output.")
    ] = False
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative="", help="Print the result and errors only.")] = (
        False
    )
    debug: Annotated[bool, Parameter(name="--debug", negative="", help="Show a traceback when something fails.")] = (
        False
    )


@Parameter(name="*")
@dataclass(frozen=True)
class Credentials:
    """Where the secret comes from that opens the repository's private key."""

    passphrase_file: Annotated[
        Path | None,
        Parameter(
            name="--passphrase-file",
            env_var="REMETAL_PASSPHRASE_FILE",
            help="Read the passphrase from the first line of this file instead of asking.",
            metavar="FILE",
        ),
    ] = None
    kit_file: Annotated[
        Path | None,
        Parameter(
            name="--kit-file",
            help="Open the repository with the text of its recovery kit from this file.",
            metavar="FILE",
        ),
    ] = None


def find_secret(credentials: Credentials) -> Secret | None:
    """Return the secret that the options name, or None if they name none.

    A kit goes before the passphrase file that the environment names: who types --kit-file has no good passphrase.
    """
    if credentials.kit_file is not None:
        default = os.environ.get("REMETAL_PASSPHRASE_FILE")
        if credentials.passphrase_file is not None and (not default or Path(default) != credentials.passphrase_file):
            raise UsageError("--passphrase-file and --kit-file exclude each other", hint="Give one of them.")
        return Secret(kit=_read_text(credentials.kit_file))
    if credentials.passphrase_file is not None and credentials.passphrase_file != Path():  # no empty variable
        lines = _read_text(credentials.passphrase_file).splitlines()
        if not lines or not lines[0]:
            raise UsageError(
                f"the first line of {credentials.passphrase_file} is empty",
                hint="Write the passphrase into the file's first line, or leave the option away to be asked for it.",
            )
        return Secret(passphrase=lines[0])
    return None


def need_secret(credentials: Credentials) -> Secret:
    """Return the secret that the options name, or ask for the passphrase on the terminal.

    Raises RefusedError if there is nobody to ask.
    """
    secret = find_secret(credentials)
    if secret is not None:
        return secret
    if not sys.stdin.isatty():
        raise RefusedError(
            "the repository's passphrase is needed, and there is no terminal to ask for it",
            hint="Give --passphrase-file FILE or --kit-file FILE, or set REMETAL_PASSPHRASE_FILE.",
        )
    return Secret(passphrase=getpass("Passphrase of the repository: "))


def new_passphrase(file: Path | None, *, what: str) -> str:
    """Return a new passphrase from a file's first line, or asked for twice. Raises UsageError, RefusedError."""
    secret = find_secret(Credentials(passphrase_file=file))
    if secret is not None and secret.passphrase is not None:
        return secret.passphrase
    if not sys.stdin.isatty():
        raise RefusedError(
            f"a passphrase for {what} is needed, and there is no terminal to ask for it",
            hint="Give it in a file, whose first line is read.",
        )
    first = getpass(f"New passphrase for {what}: ")
    if not first:
        raise UsageError("an empty passphrase protects nothing")
    if getpass("The same again: ") != first:
        raise UsageError("the two passphrases differ")
    return first


def read_bytes(path: Path, longest: int = _LONGEST_SECRET) -> bytes:
    """Return a file's bytes; of one that is too long, one byte more than the longest has."""
    try:
        with path.open("rb") as file:
            return file.read(longest + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {os.strerror(error.errno or 0)}", hint="Check the file's name, owner and mode."
        ) from error


def _read_text(path: Path) -> str:
    data = read_bytes(path)
    try:
        if len(data) <= _LONGEST_SECRET:
            return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    raise UsageError(
        f"{path} is not a text file with a passphrase or a recovery kit", hint="It should be short, and in UTF-8."
    )
