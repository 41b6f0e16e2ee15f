"""Forgetting what need not be kept, and deleting what nothing needs any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from remetal.errors import DamagedError, RefusedError, RemetalError, UnavailableError, UsageError
from remetal.events import Report, Step, Warn, silent
from remetal.repository.catalog import Catalog, open_catalog
from remetal.repository.forget import forget_snapshots
from remetal.repository.objects import HELP
from remetal.repository.prune import PruneResult, prune_machine
from remetal.repository.retention import Policy, check_policy, choose_kept
from remetal.repository.retired import find_line, find_successors
from remetal.repository.snapshots import Snapshot
from remetal.workflows.access import Secret, is_of_machine, opened_repository, select_snapshot, unlock


class Policies(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy of each machine, by its name or id; without a default the other machines keep all they have."""

    default: Policy | None = None
    machines: dict[str, Policy] = {}


@dataclass(frozen=True, slots=True)
class Decided:
    """A snapshot, and why it is kept; one without reasons is forgotten."""

    snapshot: Snapshot
    reasons: tuple[str, ...]


def read_policies(path: Path) -> Policies:
    """Read policies from a TOML file. Raises UsageError if it cannot be read or says what it cannot."""
    try:
        policies = msgspec.toml.decode(path.read_bytes(), type=Policies)
        for policy in (*policies.machines.values(), *([policies.default] if policies.default else [])):
            check_policy(policy)
    except OSError as error:
        raise UsageError(f"cannot read the policies in {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(
            f"{path} holds no policies: {error}",
            hint="It should look so: [default], keep-daily = 7, [machines.db1], keep-hourly = 48.",
        ) from error
    return policies


def forget_by_policy(
    location: str,
    secret: Secret,
    policies: Policies,
    *,
    machine: str | None = None,
    dry_run: bool = False,
    report: Report = silent,
) -> tuple[list[Decided], RemetalError | None]:
    """Forget what the policies do not keep, of all machines or of one, and return what was decided of each snapshot.

    With it comes the error for what could not be read and was passed over. Nothing is forgotten with `dry_run`. Raises
    RefusedError if the secret is wrong, UsageError if no machine of that name is there, DamagedError if the history of
    a machine of which something is to be forgotten is not whole.
    """
    for policy in (*policies.machines.values(), *([policies.default] if policies.default else [])):
        check_policy(policy)
    with opened_repository(location, urgent=True) as repository:
        key = unlock(repository, secret)
        catalog = open_catalog(repository, key)
        _need_known(policies, catalog)
        decided: list[Decided] = []
        for line in dict.fromkeys(find_line(each, catalog.retired) for each in find_machines(catalog, machine)):
            mine = [each for each in catalog.snapshots() if find_line(each.machine_id, catalog.retired) == line]
            own = _policy_of(policies, line, catalog.machines[line].machine.name) if line in catalog.machines else None
            reasons: Mapping[str, tuple[str, ...]] = {each.id: ("no policy",) for each in mine}
            if own is not None:
                reasons = choose_kept(mine, own, catalog.retired)
            decided += [Decided(each, reasons.get(each.id, ())) for each in mine]
        passed_over = _pass_over(catalog.problems if machine is None else (), report)
        going = [each.snapshot.id for each in decided if not each.reasons]
        if going and not dry_run:
            report(Step(f"Forgetting {len(going)} snapshots"))
            forget_snapshots(repository, key, going)
        return decided, passed_over


def forget_named(
    location: str,
    secret: Secret,
    names: Sequence[str],
    *,
    machine: str | None = None,
    even_newest: bool = False,
    dry_run: bool = False,
) -> list[Decided]:
    """Forget the snapshots that ids' prefixes name, and return them.

    Raises RefusedError, having forgotten none, if one is a machine's newest and `even_newest` is not said.
    """
    with opened_repository(location, urgent=True) as repository:
        key = unlock(repository, secret)
        catalog = open_catalog(repository, key)
        snapshots, retired = catalog.snapshots(), catalog.retired
        chosen = {each.id: each for each in (select_snapshot(snapshots, name, machine, retired) for name in names)}
        made = sorted(snapshots, key=lambda each: (-len(find_successors(each.machine_id, retired)), each.sequence))
        newest = {find_line(each.machine_id, retired): each for each in made}
        for each in newest.values():
            if each.id in chosen and not even_newest:
                raise RefusedError(
                    f"snapshot {each.id[:12]} is the newest of machine '{each.machine}'",
                    hint="Add --even-newest if it is to be forgotten all the same.",
                )
        if not dry_run:
            forget_snapshots(repository, key, list(chosen))
        return [Decided(each, ()) for each in chosen.values()]


def prune_repository(
    location: str,
    secret: Secret,
    *,
    machine: str | None = None,
    grace: float,
    max_unused: float,
    reseal: bool = False,
    dry_run: bool = False,
    report: Report = silent,
) -> tuple[list[PruneResult], RemetalError | None]:
    """Prune all machines, or one, and return what was done, and the gravest error of those that were passed over.

    A machine that is being backed up, or whose records are damaged, does not keep the others from being pruned.
    """
    results: list[PruneResult] = []
    with opened_repository(location, urgent=True) as repository:
        key = unlock(repository, secret)
        catalog = open_catalog(repository, key)
        worst = _pass_over(catalog.closed if machine is None else (), report)
        for machine_id in find_machines(catalog, machine):
            try:
                results.append(
                    prune_machine(
                        repository,
                        key,
                        machine_id,
                        grace=grace,
                        max_unused=max_unused,
                        reseal=reseal,
                        dry_run=dry_run,
                        report=report,
                    )
                )
            except (DamagedError, UnavailableError) as error:
                report(Warn(f"{catalog.machines[machine_id].machine.name}: {error.message}", error.hint))
                worst = error if worst is None or isinstance(error, DamagedError) else worst
    return results, worst


def _pass_over(problems: Sequence[str], report: Report) -> RemetalError | None:
    """Tell what keeps something from being looked at, and return the error that stands for it, if there is any."""
    for each in problems:
        report(Warn(each, HELP))
    if not problems:
        return None
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return DamagedError(f"what is damaged was passed over: {problems[0]}{more}", hint=HELP)


def find_machines(catalog: Catalog, wanted: str | None) -> list[str]:
    """Return the ids of all machines, or of those that a name or an id means.

    Raises UsageError if there is none, DamagedError if it may be one that cannot be opened.
    """
    machines = {each.machine.id: each.machine.name for each in catalog.machines.values()}
    found = [each for each in machines if wanted is None or is_of_machine(wanted, machines[each], each)]
    if wanted is not None and not found and catalog.closed:
        raise DamagedError(f"machine '{wanted}' is none of those that can be opened: {catalog.closed[0]}", hint=HELP)
    if wanted is not None and not found:
        known = ", ".join(sorted(set(machines.values())))
        raise UsageError(f"there is no machine '{wanted}'", hint=f"The repository has: {known}." if known else "")
    return sorted(found, key=lambda each: (machines[each], each))


def _need_known(policies: Policies, catalog: Catalog) -> None:
    """Raise UsageError for a policy of no machine: whose name was mistyped there would have the default one.

    DamagedError if it may be that of one that cannot be opened.
    """
    machines = {each.machine.id: each.machine.name for each in catalog.machines.values()}
    lines = {find_line(each, catalog.retired) for each in machines} & machines.keys()
    for wanted in policies.machines:
        if not any(is_of_machine(wanted, machines[each], each) for each in lines):
            if catalog.closed:
                raise DamagedError(
                    f"the policy of '{wanted}' is for none of the machines that can be opened: {catalog.closed[0]}",
                    hint=HELP,
                )
            known = ", ".join(sorted({machines[each] for each in lines}))
            raise UsageError(
                f"there is a policy for a machine '{wanted}', which is not in the repository; nothing was forgotten",
                hint=f"The repository has: {known}. One that took the place of another is named by its own name or id."
                if known
                else "The repository has no machine.",
            )


def _policy_of(policies: Policies, machine_id: str, name: str) -> Policy | None:
    own = (policy for wanted, policy in policies.machines.items() if is_of_machine(wanted, name, machine_id))
    return next(own, policies.default)
