"""The page with the results: what every stack became on every target. The same results give the same page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lab import CHECKOUT
from lab.stacks.catalog import STACKS
from lab.stacks.model import LARGER, SAME, SECTORS, SMALLER, Stack
from lab.stacks.run import BACKUP, Case, Result, cases_of

PAGE = CHECKOUT / "docs" / "reference" / "storage.md"

_HEAD = """# Storage stacks

This page is made by `make test-storage` from what it has seen. Every stack is built by the standard tools on a kernel
of its own (User Mode Linux), filled with files, closed and captured. Each case restores it onto blank disks, assembles
it by the standard tools, lets each layer's own checker look at it, and compares all files with their metadata, and all
identities: UUIDs, labels, names, types, attributes, tags, key slots and tokens, array geometry, subvolumes.

- *same*: disks of the same size; a second restore must write nothing
- *larger*, *smaller*: disks of another size
- *other sectors*: 4096 bytes for 512, or 512 for 4096

*blocks*: the used blocks were written. *grown*: what is larger on the target is used. *re-made*: a file system was made
anew with its features and identity, and its files were copied. *shrunk*: a file system gave up a part of its devices.
*refused*: before anything was touched, with the sentence given below.
"""


def all_cases() -> tuple[Case, ...]:
    """Return every case of every stack, in the order of the page."""
    return tuple(case for stack in STACKS.values() for case in cases_of(stack))


def render_page(results: Mapping[Case, Result]) -> str:
    """Return the page as Markdown. `results` holds every case; one that failed has an empty result."""
    parts = [_HEAD, "## Results\n", *_table(results), "", "## Further targets\n", *_further(results), ""]
    parts += ["## Refusals\n", *_refusals(results), "", "## Checked by\n", *_checks(results)]
    return "\n".join(parts) + "\n"


def _table(results: Mapping[Case, Result]) -> list[str]:
    rows = ["| stack | what it is | same | larger | smaller | other sectors | files |", "|---|---|---|---|---|---|---|"]
    for stack in STACKS.values():
        cells = [_cell(results.get(Case(stack.name, name))) for name in (SAME, LARGER, SMALLER, SECTORS)]
        if BACKUP in stack.refusals:
            cells = ["capture refused", "", "", ""]
        files = max((result.files for case, result in results.items() if case.stack == stack.name), default=0)
        rows.append(_row([f"`{stack.name}`", stack.about, *cells, str(files or "")]))
    return rows


def _further(results: Mapping[Case, Result]) -> list[str]:
    rows = ["| stack | target | result |", "|---|---|---|"]
    return rows + [
        _row([f"`{stack.name}`", variant.name, _cell(results[Case(stack.name, variant.name)])])
        for stack in STACKS.values()
        for variant in stack.more
    ]


def _refusals(results: Mapping[Case, Result]) -> list[str]:
    refused = [(case, result.refused) for case, result in results.items() if result.refused]
    return [f"- `{case.stack}`, {case.variant}: {text}" for case, text in refused] or ["None."]


def _checks(results: Mapping[Case, Result]) -> list[str]:
    rows = ["| stack | checks |", "|---|---|"]
    for stack in STACKS.values():
        checks = dict.fromkeys(check for case in cases_of(stack) for check in results[case].checks)
        if checks:
            rows.append(_row([f"`{stack.name}`", ", ".join(checks)]))
    return rows


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    return "refused" if result.refused else ", ".join(result.done) or "**failed**"


def _row(cells: Sequence[str]) -> str:
    plain = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(plain)} |"


def quick_cases(stacks: Mapping[str, Stack] = STACKS) -> tuple[Case, ...]:
    """Return the cases that `make test` runs."""
    return tuple(Case(stack.name, stack.quick) for stack in stacks.values() if stack.quick)
