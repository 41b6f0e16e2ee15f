"""Names of things: random ids, and finding one by the prefix a person typed."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from remetal.errors import UsageError

SHORT = 12
"""How many hexadecimal digits of an id are shown to people."""


def new_id() -> str:
    """Return 128 random bits as 32 lower-case hexadecimal digits."""
    return secrets.token_hex(16)


def short(identifier: str) -> str:
    """Return the part of an id that is shown to people."""
    return identifier[:SHORT]


def match_prefix(prefix: str, identifiers: Iterable[str], *, what: str) -> str:
    """Return the one identifier that starts with `prefix`.

    `what` names the kind of thing in errors ("snapshot"). Raises UsageError if none or several match.
    """
    wanted = prefix.lower()
    found = sorted({identifier for identifier in identifiers if identifier.startswith(wanted)}) if wanted else []
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"no {what} starts with '{prefix}'", hint=f"List them with `remetal {what}s`.")
    raise UsageError(
        f"'{prefix}' fits {len(found)} {what}s: {', '.join(short(each) for each in found[:8])}",
        hint="Type more digits.",
    )
