"""Running the stacks from outside: disk files, boots of User Mode Linux, and the verdict on every case."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lab.stacks.catalog import STACKS
from lab.stacks.findings import compare_findings, load_findings
from lab.stacks.guest import REMETAL, Job
from lab.stacks.machine import file_size
from lab.stacks.model import SAME, Stack, Variant, disk_places
from lab.uml import UmlFailedError, python_argv, run_in_uml
from remetal.errors import RemetalError
from remetal.units import GIB

BACKUP = "backup"
"""The name under which a stack gives the sentence with which its capture must be refused."""

AT_ONCE = 2
"""How many kernels run beside each other."""

_MEMORY = 1 * GIB
_TIMEOUT = 900.0
_SHOWN = 40
"""How many differences one failure shows."""


class Case(NamedTuple):
    """A stack and one of its variants, or `backup` where its capture is refused."""

    stack: str
    variant: str


class CaseFailedError(RemetalError):
    """A case went wrong: which stack, which variant, which phase, and what was said."""


@dataclass
class Result:
    """What came of one case. `done` says by words what remetal did; bytes, seconds by phase."""

    stack: str
    variant: str
    done: tuple[str, ...] = ()
    refused: str = ""
    checks: tuple[str, ...] = ()
    files: int = 0
    captured: int = 0
    written: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """Return the result as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, line: str) -> Result:
        """Return the result that a line tells."""
        found = json.loads(line)
        return cls(**found | {"done": tuple(found["done"]), "checks": tuple(found["checks"])})


@contextmanager
def started_cases(cases: Iterable[Case], work: Path) -> Iterator[dict[Case, Future[Result]]]:
    """Run cases in a new folder, some stacks at a time, and yield what will come of each: a Result or CaseFailedError.

    Every stack is built and captured once. Leaving the block drops what has not begun.
    """
    wanted: dict[str, dict[str, Future[Result]]] = {}
    for case in cases:
        wanted.setdefault(case.stack, {})[case.variant] = Future()
    prepare_site(work / "site")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, futures in wanted.items():
            pool.submit(_run_stack, STACKS[name], futures, work)
        try:
            yield {Case(name, variant): each for name, futures in wanted.items() for variant, each in futures.items()}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run_stack(stack: Stack, futures: Mapping[str, Future[Result]], work: Path) -> None:
    """Run the cases of one stack, one after the other."""
    folder = work / stack.name
    built: Result | BaseException
    try:
        built = build_stack(stack, folder, site=work / "site")
        if not built.refused:
            _drop_disks(folder)
    except BaseException as error:  # noqa: BLE001 - it is raised again where the result is asked for
        built = error
    for name, future in futures.items():
        try:
            if isinstance(built, BaseException):
                raise built
            future.set_result(built if name == BACKUP else restore_stack(stack, stack.variant(name), folder))
        except BaseException as error:  # noqa: BLE001 - as above
            future.set_exception(error)


def cases_of(stack: Stack) -> tuple[Case, ...]:
    """Return all cases of a stack."""
    if BACKUP in stack.refusals:
        return (Case(stack.name, BACKUP),)
    return tuple(Case(stack.name, variant.name) for variant in stack.variants())


def prepare_site(folder: Path) -> None:
    """Make a repository and its recovery kit, which every stack gets a copy of. (A kit opens at once.)"""
    folder.mkdir(parents=True)
    secret = folder / "passphrase"
    secret.write_text("the lab's own passphrase\n")
    argv = (REMETAL, "init", "--json", "--repo", folder / "repository", "--passphrase-file", secret)
    done = subprocess.run(argv, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    (folder / "kit").write_text(json.loads(done.stdout)["kit"])


def build_stack(stack: Stack, folder: Path, *, site: Path | None) -> Result:
    """Build a stack's machine in a new folder; with a site (see `prepare_site`) it is also backed up.

    Raises CaseFailedError if it cannot be built or captured. A refusal that the stack expects is a result.
    """
    if site is None:
        folder.mkdir(parents=True)
    else:
        shutil.copytree(site, folder)
    report = _boot(stack, _source(stack), "build" if site is None else "capture", folder, folder)
    expected = stack.refusals.get(BACKUP, "") if site is not None else ""
    _check_refusal(stack, BACKUP, report["refused"], expected)
    return Result(
        stack.name,
        BACKUP,
        refused=report["refused"],
        captured=report["captured"].get("used", 0),
        seconds=report["seconds"],
    )


def reopen_stack(stack: Stack, folder: Path) -> Result:
    """Boot the built machine again: without remetal, everything must be as it was. Raises CaseFailedError."""
    out = folder / "reopened"
    report = _boot(stack, _source(stack), "reopen", folder, out, disks_in=folder)
    return _judge(stack, Variant(SAME, stack.disks), folder, out, report)


def restore_stack(stack: Stack, variant: Variant, folder: Path) -> Result:
    """Restore a captured stack onto blank disks, assemble, check and compare it. Raises CaseFailedError."""
    out = folder / re.sub("[^a-z]+", "-", variant.name)  # the kernel's command line takes no blanks and commas
    try:
        report = _boot(stack, variant, "restore", folder, out)
        _check_refusal(stack, variant.name, report["refused"], variant.refusal)
        if report["refused"]:
            _check_untouched(stack, variant, out)
            return Result(stack.name, variant.name, refused=report["refused"], seconds=report["seconds"])
        if report["again"]:
            _fail(stack.name, variant.name, "restore again", f"a second restore wrote {report['again']} bytes")
        return _judge(stack, variant, folder, out, report)
    finally:
        _drop_disks(out)


def _judge(stack: Stack, variant: Variant, folder: Path, out: Path, report: dict[str, Any]) -> Result:
    before, after = load_findings(folder / "before.json"), load_findings(out / "after.json")
    differences = compare_findings(before, after, variant)
    if differences:
        more = [f"and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
        _fail(stack.name, variant.name, "compare", "\n".join([*differences[:_SHOWN], *more]))
    return Result(
        stack.name,
        variant.name,
        done=tuple(_describe_plan(report["plan"])),
        checks=tuple(dict.fromkeys(after.checks)),
        files=after.files,
        written=report["written"],
        seconds=report["seconds"],
    )


def _describe_plan(plan: dict[str, Any]) -> list[str]:
    """Return by words what a plan does with the stack's content."""
    steps = {step["step"] for step in plan.get("steps", ())}
    return list(dict.fromkeys(word for step, word in _STEPS.items() if step in steps))


_STEPS = {
    "write-image": "blocks",
    "grow": "grown",
    "grow-spanning": "grown",
    "remake": "re-made",
    "copy-files": "re-made",
    "shrink": "shrunk",
}


def _check_refusal(stack: Stack, variant: str, refused: str, expected: str) -> None:
    if bool(refused) != bool(expected) or expected not in refused:
        said = f"remetal refused: {refused}" if refused else f"remetal did not refuse; it should say: {expected}"
        _fail(stack.name, variant, "plan", said)


def _check_untouched(stack: Stack, variant: Variant, out: Path) -> None:
    """Fail if a refused restore has written anything: the disk files must still be one hole."""
    for path in sorted(out.glob("*.img")):
        with path.open("rb") as file:
            try:
                place = os.lseek(file.fileno(), 0, os.SEEK_DATA)
            except OSError:  # ENXIO: no data
                continue
        _fail(stack.name, variant.name, "plan", f"remetal refused, and had written to {path.name} at byte {place}")


def _source(stack: Stack) -> Variant:
    """Return the machine as it is built."""
    return Variant("", stack.disks)


def _boot(
    stack: Stack, variant: Variant, work: str, folder: Path, out: Path, disks_in: Path | None = None
) -> dict[str, Any]:
    """Boot once for a job and return its report. Blank disk files are made in `out`, unless others are given."""
    out.mkdir(exist_ok=True)
    places = disk_places(stack, variant)
    files = [(disks_in or out) / f"{letter}.img" for letter, _ in places]
    if disks_in is None:
        for path, (_, disk) in zip(files, places, strict=True):
            path.touch()
            os.truncate(path, file_size(disk.bytes, disk.sector))
    job = out / "job.json"
    job.write_text(json.dumps(asdict(Job(stack.name, variant.name, work, str(folder), str(out)))))
    argv = python_argv(f"from lab.stacks.guest import main\nsys.exit(main({str(job)!r}))")
    try:
        run_in_uml(argv, disks=files, memory=_MEMORY, timeout=_TIMEOUT, log=out / "console.log")
    except UmlFailedError as error:
        failure = out / "failure.json"
        if failure.exists():
            found = json.loads(failure.read_text())
            _fail(stack.name, variant.name or work, found["phase"], found["said"])
        phase = (out / "phase").read_text() if (out / "phase").exists() else "boot"
        _fail(stack.name, variant.name or work, phase, f"{error.message}\n{error.hint}")
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def _drop_disks(folder: Path) -> None:
    for path in folder.glob("*.img"):
        path.unlink()


def _fail(stack: str, variant: str, phase: str, said: str) -> None:
    raise CaseFailedError(f"stack {stack}, variant {variant}, phase '{phase}': {said}")
