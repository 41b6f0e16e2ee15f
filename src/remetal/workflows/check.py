"""Checking a repository as deeply as the keys at hand allow."""

from __future__ import annotations

import time
from dataclasses import dataclass

from remetal.events import Report, silent
from remetal.repository.check import check_repository
from remetal.workflows.access import Secret, find_local_keys, local_problems, opened_repository, unlock


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was looked at, how deeply, and a sentence for each thing that is wrong.

    `repairable` packs are damaged or missing, and parity can rebuild them; `unprotected` ones have no parity.
    """

    depth: str
    objects: int
    bytes: int
    snapshots: int
    chunks_read: int
    repairable: int
    unprotected: int
    problems: tuple[str, ...]
    seconds: float


def check_all(location: str, secret: Secret | None, *, read_data: bool, report: Report = silent) -> CheckReport:
    """Check the repository at `location`: with the secret, else with this host's machine keys, else without any key.

    Raises RefusedError if the secret is wrong, UnavailableError if the repository cannot be read.
    """
    began = time.monotonic()
    with opened_repository(location, read_only=True) as repository:
        machines = find_local_keys(repository)
        remembered = local_problems(repository, machines)
        if secret is not None:
            depth = "every chunk decoded" if read_data else "with the repository's key"
            key = unlock(repository, secret)
            results = [check_repository(repository, keys=key, read_data=read_data, report=report)]
        else:
            depth = f"with the keys of {', '.join(each.name for each in machines)}" if machines else "without any key"
            each_key = machines or (None,)
            results = [check_repository(repository, keys=keys, report=report) for keys in each_key]
    return CheckReport(
        depth=depth,
        objects=results[0].objects,
        bytes=results[0].bytes,
        snapshots=sum(each.snapshots for each in results),
        chunks_read=sum(each.chunks_read for each in results),
        repairable=results[0].repairable,
        unprotected=results[0].unprotected,
        problems=tuple(dict.fromkeys([*(problem for each in results for problem in each.problems), *remembered])),
        seconds=time.monotonic() - began,
    )
