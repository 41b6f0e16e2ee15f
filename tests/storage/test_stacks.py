"""Whole storage stacks: built by the standard tools, captured, restored onto other disks, checked, compared.

Each test is one case of `lab.stacks`: a stack and the target that it is restored onto. They run two at a time behind
the tests, which wait for their own one. Without `-m matrix` it is a share that holds every layer once; `make
test-storage` runs all of them and writes docs/reference/storage.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from hashlib import shake_128
from pathlib import Path
from typing import Any

import pytest

from lab.stacks.arrays import Array
from lab.stacks.catalog import STACKS
from lab.stacks.findings import Findings, compare_findings
from lab.stacks.model import Disk, Stack, Variant
from lab.stacks.page import PAGE, all_cases, quick_cases
from lab.stacks.run import BACKUP, Case, CaseFailedError, Result, build_stack, reopen_stack, started_cases
from lab.stacks.tables import Table

_QUICK = frozenset(quick_cases())


@pytest.fixture(scope="session")
def futures(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, Future[Result]]]:
    """What will come of the cases that this session asks for."""
    found = (getattr(item, "callspec", None) for item in request.session.items)
    named = [each.params.get("case") for each in found if each is not None]
    cases = [case for case in named if isinstance(case, Case)]  # other tests have cases of other kinds
    with started_cases(cases, tmp_path_factory.mktemp("stacks")) as running:
        yield running


def _params() -> Iterator[object]:
    for case in all_cases():
        marks = [pytest.mark.storage, *([] if case in _QUICK else [pytest.mark.matrix])]
        yield pytest.param(case, marks=marks, id=f"{case.stack}-{case.variant}")


@pytest.mark.parametrize("case", list(_params()))
def test_stack(case: Case, futures: dict[Case, Future[Result]]) -> None:
    result = futures[case].result()
    assert result.refused or result.checks or not result.files


@pytest.mark.storage
def test_damage_fails_with_its_place(tmp_path: Path) -> None:
    stack, folder = STACKS["whole-disk-ext4"], tmp_path / "built"
    build_stack(stack, folder, site=None)
    disk = folder / "a.img"
    content = bytearray(disk.read_bytes())
    content[content.index(shake_128(b"a").digest(4096))] ^= 1
    disk.write_bytes(content)
    with pytest.raises(CaseFailedError, match=r"stack whole-disk-ext4, variant same, phase 'compare': a: /awkward/"):
        reopen_stack(stack, folder)
    content[1024:2048] = bytes(1024)
    disk.write_bytes(content)
    with pytest.raises(
        CaseFailedError, match=r"reopen, phase 'check': `e2fsck -fn /dev/ubda` ended with 8:\next2fs_open2: "
    ):
        reopen_stack(stack, folder)


def test_page_is_of_these_stacks_and_tells_of_no_failure() -> None:
    page = PAGE.read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    shown = {row[0].strip("| `"): row[1].replace("\\|", "|") for row in rows if len(row) == 7}
    assert shown == {stack.name: stack.about for stack in STACKS.values()}
    assert "**failed**" not in page


def _found(**sizes: int) -> Findings:
    file = {"type": "file", "content": "abc"}
    return Findings({"a:1 UUID": "1"}, {"a:1 place": "2048+4096"}, {"a:1": 100, **sizes}, [], {"a:1": {"/file": file}})


def _variant(name: str, **more: Any) -> Variant:
    return Variant(name, (Disk(64),), **more)


def test_comparison_sees_every_kind_of_difference() -> None:
    before = _found()
    assert compare_findings(before, _found(), _variant("same")) == []
    after = _found()
    after.kept["a:1 UUID"] = "2"
    after.manifests["a:1"]["/file"]["content"] = "abd"
    assert compare_findings(before, after, _variant("larger")) == [
        "a:1 UUID: '1' became '2'",
        "a:1: /file: content abc became abd",
    ]
    after = _found(**{"a:1": 200})
    after.exact["a:1 place"] = "2048+8192"
    assert compare_findings(before, after, _variant("larger", grown=("a:1",))) == []
    assert len(compare_findings(before, after, _variant("same"))) == 2
    assert compare_findings(before, _found(), _variant("larger", grown=("a:1",))) == [
        "a:1: should have grown from 100 bytes, and has 100"
    ]
    after = _found()
    del after.manifests["a:1"]
    assert compare_findings(before, after, _variant("smaller")) == ["a:1: /file: missing (file)"]


def test_comparison_follows_what_moved() -> None:
    after = Findings({"b:2 UUID": "1"}, {}, {"b:2": 100}, [], {"b:2": _found().manifests["a:1"]})
    assert compare_findings(_found(), after, _variant("one disk", moved={"a:1": "b:2"})) == []
    assert compare_findings(_found(), after, _variant("one disk", moved={"a:1": "b:2"}, changes=("b:2 UUID",))) == []
    after.kept["b:2 UUID"] = "3"
    assert compare_findings(_found(), after, _variant("one disk", moved={"a:1": "b:2"})) != []
    assert compare_findings(_found(), after, _variant("one disk", moved={"a:1": "b:2"}, changes=("b:2 UUID",))) == []


def test_enough_stacks() -> None:
    assert len(STACKS) >= 40
    assert all(STACKS[case.stack].variant(case.variant) for case in _QUICK)


def test_quick_share_holds_every_layer() -> None:
    quick = [STACKS[case.stack] for case in _QUICK]
    assert {word for stack in STACKS.values() for word in _layers(stack)} - _RECOGNISED <= {
        word for stack in quick for word in _layers(stack)
    }


_RECOGNISED = frozenset({"Bcache", "Integrity", "MultipathMember", "Mark", "ClassicSnapshot"})
"""What is not opened, only recognised."""


def _layers(stack: Stack) -> Iterator[str]:
    """Yield by words what a stack has in it: kinds of layers, file systems, levels and metadata of arrays."""
    for layer in stack.layers:
        yield type(layer).__name__
        for word in ("type", "level", "metadata", "version", "label"):
            value = getattr(layer, word, "")
            if (
                value
                and (isinstance(layer, Array) or word != "metadata")
                and (isinstance(layer, Table) or word != "label")
            ):
                yield f"{type(layer).__name__} {word} {value}"


def test_names_of_cases_are_unique() -> None:
    cases = all_cases()
    assert len(set(cases)) == len(cases)
    assert all(case.variant == BACKUP or STACKS[case.stack].variant(case.variant).disks for case in cases)
