"""`remetal repair`: making a lost or damaged index anew."""

from __future__ import annotations

from remetal.cli.options import Credentials, Output, Repo, need_secret
from remetal.cli.output import print_result, reporting
from remetal.repository.check import rebuild_index
from remetal.workflows.access import opened_repository, unlock


def repair(*, repo: Repo, credentials: Credentials = Credentials(), output: Output = Output()) -> None:
    """Make the index anew for packs that no readable index object knows, from the packs' own tables of contents.

    Use it when `remetal check` says that chunks are in no index: index objects were damaged or deleted while the packs
    are whole. It only adds objects; nothing is changed or removed.
    """
    with opened_repository(repo) as repository, reporting(output) as report:
        count = rebuild_index(repository, unlock(repository, need_secret(credentials)), report=report)
    found = f"{count} pack{'' if count == 1 else 's'} that no index object knew" if count else "nothing to do"
    print_result(output, {"packs": count}, f"Repaired the index: {found}.")
