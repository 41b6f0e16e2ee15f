"""Options that open LUKS containers, and asking for their passphrases."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from remetal.cli.options import read_bytes
from remetal.cli.output import clean
from remetal.errors import UsageError
from remetal.layout.keys import Key
from remetal.layout.model import SpaceId

if TYPE_CHECKING:
    from remetal.layout.model import Luks
    from remetal.workflows.passphrases import AskPassphrase

_LONGEST_KEY_FILE = 8 << 20
"""Size in bytes of the longest key file that cryptsetup(8) takes."""

LuksPassphrases = Annotated[
    tuple[str, ...],
    Parameter(
        name="--luks-passphrase-file",
        help="Open LUKS containers with the passphrase in the first line of this file: all of them, or the one on the "
        "space SPACE (such as sda:3); may be repeated.",
        metavar="[SPACE=]FILE",
        negative="",
    ),
]
LuksKeyFiles = Annotated[
    tuple[str, ...],
    Parameter(
        name="--luks-key-file",
        help="Open LUKS containers with this key file, all of whose bytes count; may be repeated.",
        metavar="[SPACE=]FILE",
        negative="",
    ),
]


def read_luks_keys(passphrases: Sequence[str], key_files: Sequence[str]) -> tuple[Key, ...]:
    """Return the keys that the options for LUKS containers name. Raises UsageError if a file cannot be read."""
    keys = []
    for word in passphrases:
        space, path = _split_space(word)
        lines = read_bytes(path).splitlines()
        if not lines or not lines[0]:
            raise UsageError(f"the first line of {path} is empty", hint="Write the passphrase into its first line.")
        keys.append(Key(lines[0], space))
    for word in key_files:
        space, path = _split_space(word)
        data = read_bytes(path, _LONGEST_KEY_FILE)
        if not 0 < len(data) <= _LONGEST_KEY_FILE:
            raise UsageError(f"{path} is no key file: it is {'too long' if data else 'empty'}")
        keys.append(Key(data, space))
    return tuple(keys)


def _split_space(word: str) -> tuple[SpaceId, Path]:
    """Return the space and the file of `[SPACE=]FILE`; a file whose own name holds `=` is taken as it is."""
    space, equals, path = word.partition("=")
    if not equals or Path(word).exists():
        return "", Path(word)
    return space, Path(path)


def type_luks_passphrase(container: Luks, wrong: int, *, enter: str) -> bytes | None:
    """Ask on the terminal for the passphrase of a LUKS container; `enter` says what an empty answer does.

    `wrong` is how many answers were wrong. Returns None for an empty answer.
    """
    words = [f"LUKS container on {clean(container.on)}", f"UUID {clean(container.uuid)}"]
    words += [f"label {clean(container.label)}"] if container.label else []
    if wrong:
        print("That opens none of its key slots.", file=sys.stderr)  # noqa: T201
    try:
        typed = getpass(f"Passphrase of the {', '.join(words)} (Enter: {enter}): ")
    except EOFError:
        return None
    return os.fsencode(typed) or None


def find_asker(enter: str) -> AskPassphrase | None:
    """Return what asks for passphrases of LUKS containers, or None if there is no terminal; `enter` as above."""
    return partial(type_luks_passphrase, enter=enter) if sys.stdin.isatty() else None
