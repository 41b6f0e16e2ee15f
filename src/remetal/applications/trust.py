"""Who may change what is obeyed as root: the file of hooks, and the programs and options that it names.

The look itself is the keeper's, which runs some of them when we are gone.
"""

from __future__ import annotations

from pathlib import Path

from remetal.errors import RefusedError
from remetal.system.keeper import find_weakness


def check_owner(path: Path, *, missing: bool = False) -> None:
    """Raise RefusedError if somebody other than root, or who runs us, owns what is obeyed as root, or may change it.

    The same holds for every folder and every symbolic link on the way to it: who may write there may put another file
    in its place, but for folders such as /tmp in which nobody can touch what others own. Raises OSError; not if what
    is `missing` may be, but then for the folders that lead to where it may be put.
    """
    try:
        found = find_weakness(path)
    except FileNotFoundError:
        if not missing:
            raise
        return
    if found is not None:
        place, why = found
        raise RefusedError(
            f"{path} would be obeyed as root, but {place} {why}",
            hint=f"Let it be root's alone: chown -h root {place} && chmod go-w {place}",
        )


def need_trusted(path: Path) -> None:
    """Raise RefusedError for what others may change, or may put there if it is missing, and for what cannot be told."""
    try:
        check_owner(path, missing=True)
    except OSError as error:
        raise RefusedError(f"cannot look at {path}: {error.strerror}") from error
