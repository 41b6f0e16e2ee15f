"""Addresses of repositories that lie elsewhere, and what must not stand in them: everybody on this machine can list the
command lines of others, and messages show the address again.
"""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from remetal.errors import UsageError


def split_address(location: str, example: str, *, secrets: str, user: bool = False) -> SplitResult:
    """Split an address that is written like `example`; `secrets` says where passwords and keys belong.

    Raises UsageError, which shows nothing of the address, if it is none, and if a password stands in it, a user where
    the kind of repository knows none (`user`), or something behind a `?` or `#`.
    """
    try:
        parts = urlsplit(location)
        port = parts.port
    except ValueError:  # what it says may be a part of a password
        raise _no_address(example, secrets) from None
    if parts.password is not None or (parts.username is not None and not user):
        raise UsageError(
            "a password or a key must not stand in the address of a repository: everybody on this machine reads it",
            hint=f"Write {example}. {secrets}",
        )
    if port == 0 or (parts.scheme != "file" and not parts.hostname):
        raise _no_address(example, secrets)
    if parts.query or parts.fragment:
        raise UsageError(
            "the address of a repository must not have a part behind a '?' or '#'",
            hint=f"Write {example}; %3F and %23 stand for these two in a folder's name. {secrets}",
        )
    return parts


def _no_address(example: str, secrets: str) -> UsageError:
    return UsageError("the address of the repository is not a good one", hint=f"Write {example}. {secrets}")
