"""What was found on a machine: what its tools say, which checks they passed, and every file; kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from lab.manifest import Manifest, compare_manifests
from lab.stacks.machine import Machine
from lab.stacks.model import SAME, Layer, Space, Variant

T = TypeVar("T")


@dataclass
class Findings:
    """`kept`, `exact` and `sizes` as in `model.Facts`, the checks that were passed, and the manifests by place."""

    kept: dict[str, str] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    sizes: dict[Space, int] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    manifests: dict[str, Manifest] = field(default_factory=dict)

    @property
    def files(self) -> int:
        """How many files, folders and everything else there are."""
        return sum(len(manifest) for manifest in self.manifests.values())

    def describe(self, layer: Layer, machine: Machine) -> None:
        """Add what the tools say of an open layer, and its files."""
        facts = layer.describe(machine)
        self.kept |= facts.kept
        self.exact |= facts.exact
        self.sizes |= facts.sizes
        self.manifests |= dict(layer.manifests(machine))

    def save(self, path: Path) -> None:
        """Write everything to a file."""
        path.write_text(json.dumps(asdict(self)))


def load_findings(path: Path) -> Findings:
    """Read what `Findings.save` wrote."""
    return Findings(**json.loads(path.read_text()))


def compare_findings(before: Findings, after: Findings, variant: Variant) -> list[str]:
    """Return one readable line for every difference that the variant does not allow."""
    differences = list(_compare_facts(_moved(before.kept, variant), after.kept, variant.changes))
    if variant.name == SAME:
        differences += _compare_facts(before.exact, after.exact, ())
    differences += _compare_sizes(_moved(before.sizes, variant), after.sizes, variant)
    expected = _moved(before.manifests, variant)
    for place in sorted(expected.keys() | after.manifests.keys()):
        lines = compare_manifests(expected.get(place, {}), after.manifests.get(place, {}))
        differences += [f"{place}: {line}" for line in lines]
    return differences


def _moved(found: Mapping[str, T], variant: Variant) -> dict[str, T]:
    """Return what was found by the spaces where it should be now."""
    return {_new_name(name, variant): each for name, each in found.items()}


def _new_name(name: str, variant: Variant) -> str:
    space, blank, rest = name.partition(" ")
    return f"{variant.moved.get(space, space)}{blank}{rest}"


def _compare_facts(before: Mapping[str, str], after: Mapping[str, str], changes: tuple[str, ...]) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, "(nothing)"), after.get(name, "(nothing)")
        if old != new and not name.startswith(changes):
            yield f"{name}: {old!r} became {new!r}"


def _compare_sizes(before: Mapping[Space, int], after: Mapping[Space, int], variant: Variant) -> Iterator[str]:
    for space in sorted(before):
        old, new = before[space], after.get(space, 0)
        if space in variant.grown and new <= old:
            yield f"{space}: should have grown from {old} bytes, and has {new}"
        if variant.name == SAME and new != old:
            yield f"{space}: had {old} bytes, and has {new}"
