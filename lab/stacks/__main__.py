"""`python -m lab.stacks`: run the storage stacks, two at a time, and write the page with the results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import CHECKOUT
from lab.stacks.catalog import STACKS
from lab.stacks.model import Stack
from lab.stacks.page import PAGE, all_cases, quick_cases, render_page
from lab.stacks.run import (
    AT_ONCE,
    BACKUP,
    Case,
    CaseFailedError,
    Result,
    build_stack,
    cases_of,
    reopen_stack,
    started_cases,
)

RESULTS = CHECKOUT / "out" / "storage" / "results.jsonl"


def main() -> int:
    """Parse the words, run, report; the exit code says whether every case was as described."""
    parser = argparse.ArgumentParser(prog="python -m lab.stacks", description=__doc__)
    parser.add_argument("stacks", nargs="*", help="names of stacks, or STACK/VARIANT; everything by default")
    parser.add_argument("--quick", action="store_true", help="the share that `make test` runs")
    parser.add_argument("--self-test", action="store_true", help="build and reopen only, without remetal")
    parser.add_argument("--resume", action="store_true", help="leave out what passed in the run before")
    parser.add_argument("--work", type=Path, help="keep logs and findings in this new folder")
    words = parser.parse_args()
    chosen = [case for word in words.stacks for case in _parse_case(word)]
    chosen = chosen or list(quick_cases() if words.quick else all_cases())
    with _work_folder(words.work) as work:
        if words.self_test:
            return _self_test([STACKS[name] for name in dict.fromkeys(case.stack for case in chosen)], work)
        return _run(chosen, work, _load_results() if words.resume else {})


def _parse_case(word: str) -> tuple[Case, ...]:
    stack, _, variant = word.partition("/")
    return (Case(stack, variant),) if variant else cases_of(STACKS[stack])


@contextmanager
def _work_folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with TemporaryDirectory(prefix="lab-stacks-") as place:
        yield Path(place)


def _load_results() -> dict[Case, Result]:
    """Return what passed in the run before, as far as it still is a case."""
    if not RESULTS.exists():
        return {}
    found = [Result.parse(line) for line in RESULTS.read_text().splitlines()]
    passed = {Case(each.stack, each.variant): each for each in found}
    return {case: passed[case] for case in all_cases() if case in passed}


def _run(chosen: Sequence[Case], work: Path, results: dict[Case, Result]) -> int:
    """Run the cases that have no results yet; the page is written when every case of every stack has one."""
    began, failures = time.monotonic(), 0
    cases = [case for case in chosen if case not in results]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("".join(f"{each.line()}\n" for each in results.values()))
    with started_cases(cases, work) as futures, RESULTS.open("a") as lines:
        for case, future in futures.items():
            try:
                results[case] = future.result()
            except CaseFailedError as error:
                failures += 1
                results[case] = Result(case.stack, case.variant)
                print(f"FAILED {error.message}")
            else:
                lines.write(results[case].line() + "\n")
                lines.flush()
                _show(results[case])
            sys.stdout.flush()
    print(f"{len(cases)} cases, {failures} failed, {time.monotonic() - began:.0f} s; see {RESULTS}")
    if len(results) == len(all_cases()):
        PAGE.write_text(render_page({case: results[case] for case in all_cases()}))
        print(f"wrote {PAGE}")
    return 1 if failures else 0


def _show(result: Result) -> None:
    done = f"refused: {result.refused.splitlines()[0]}" if result.refused else ", ".join(result.done)
    seconds = sum(result.seconds.values())
    print(f"{result.stack}/{result.variant}: {done} ({result.files} files, {seconds:.0f} s)")


def _self_test(stacks: Sequence[Stack], work: Path) -> int:
    """Build every stack, boot again, and find it as it was; remetal takes no part."""
    failures = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for said in pool.map(lambda stack: _reopen(stack, work / stack.name), stacks):
            print(said, flush=True)
            failures += said.startswith("FAILED")
    return 1 if failures else 0


def _reopen(stack: Stack, folder: Path) -> str:
    try:
        built = build_stack(stack, folder, site=None)
        found = reopen_stack(stack, folder) if BACKUP not in stack.refusals else built
    except CaseFailedError as error:
        return f"FAILED {error.message}"
    seconds = [sum(each.seconds.values()) for each in (built, found)]
    return f"{stack.name}: {found.files} files, {', '.join(found.checks)} ({seconds[0]:.0f} s + {seconds[1]:.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
