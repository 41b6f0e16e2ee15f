"""Storage stacks, described: disks, the layers on them, and the other disks that they are restored onto.

Spaces are named as remetal names them, with letters for the disks in their order: `a` the first disk, `a:1` its first
partition, `md/root` an array, `vg/home` a logical volume, `a:2:luks` the plain side of a container, `md/root:1` a
partition inside an array.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lab.manifest import Manifest
from lab.stacks.machine import Machine
from remetal.units import MIB

Space: TypeAlias = str

SAME, LARGER, SMALLER, SECTORS = "same", "larger", "smaller", "sectors"
VARIANTS = (SAME, LARGER, SMALLER, SECTORS)
"""The targets that a stack is restored onto, unless it says that one makes no sense."""

Opened: TypeAlias = Literal["passphrase", "key file", "escrow", "nobody"]


@dataclass(frozen=True)
class Disk:
    """A disk of `size` MiB with logical sectors of `sector` bytes."""

    size: int
    sector: int = 512

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return self.size * MIB


@dataclass(frozen=True)
class Facts:
    """What the standard tools say of a layer, by a readable name.

    `kept` must be the same on any target, `exact` only where all sizes are, and `sizes` are those of file systems
    and the like in bytes, which a larger target may raise.
    """

    kept: Mapping[str, str] = field(default_factory=dict)
    exact: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


class Layer:
    """One layer: a frozen description that knows the standard tools for it. All methods run inside."""

    def build(self, machine: Machine) -> None:
        """Make the layer; what it provides is there afterwards."""

    def fill(self, machine: Machine) -> None:
        """Put files into the layer, if it holds any."""

    def check_closed(self, machine: Machine) -> Iterator[str]:
        """Yield what was checked before the layer is opened. Raises LabFailedError if a checker complains."""
        return iter(())

    def open(self, machine: Machine) -> None:
        """Assemble the layer as an administrator would; what it provides is there afterwards."""

    def check(self, machine: Machine) -> Iterator[str]:
        """Yield what was checked while everything is open and nothing mounted; raises as `check_closed`."""
        return iter(())

    def describe(self, machine: Machine) -> Facts:
        """Return what the tools say of the open layer."""
        return Facts()

    def manifests(self, machine: Machine) -> Iterator[tuple[str, Manifest]]:
        """Yield the files of the layer: a readable place, and the manifest of the tree there."""
        return iter(())

    def close(self, machine: Machine) -> None:
        """Take the layer apart, so that nothing uses what it stands on."""


@dataclass(frozen=True)
class Variant:
    """One target: its disks in the order of the stack's own, and what must come of it.

    `refusal` is a part of the sentence with which remetal must refuse; empty where the restore must succeed.
    `options` are further words for `remetal plan` and `remetal restore`, with spaces as the model names them. `order`
    says for every disk the place at which the machine has it; empty for their own order. `lacking` are the letters of
    disks that the target has not (nor are they in `disks`). Where the target's layers differ, `layers` are they,
    `moved` tells where content went, by its former space, and `changes` are the beginnings of facts that may differ.
    """

    name: str
    disks: tuple[Disk, ...]
    refusal: str = ""
    options: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    grown: tuple[Space, ...] = ()
    lacking: str = ""
    layers: tuple[Layer, ...] = ()
    moved: Mapping[Space, Space] = field(default_factory=dict)
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """A machine's storage, and what it is restored onto.

    `larger`, `smaller` and `sectors` replace the targets that are computed; `without` are variants that make no
    sense. `refusals` gives, by variant, a part of the sentence that must be said; for `backup`, that of the capture.
    `grows` are the spaces whose file systems must be larger on the larger target. `quick` is the variant that
    `make test` runs, if any. `options` are words for plan and restore by variant.
    """

    name: str
    about: str
    disks: tuple[Disk, ...]
    layers: tuple[Layer, ...]
    larger: tuple[Disk, ...] = ()
    smaller: tuple[Disk, ...] = ()
    without: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    grows: tuple[Space, ...] = ()
    quick: str = ""
    opened: Opened = "passphrase"
    more: tuple[Variant, ...] = ()

    @property
    def letters(self) -> str:
        """The names of the disks."""
        return string.ascii_lowercase[: len(self.disks)]

    def variants(self) -> tuple[Variant, ...]:
        """Return the targets, in a fixed order."""
        disks = {
            SAME: self.disks,
            LARGER: self.larger or tuple(_scaled(disk, 3, 2) for disk in self.disks),
            SMALLER: self.smaller or tuple(_scaled(disk, 4, 5) for disk in self.disks),
            SECTORS: tuple(Disk(disk.size, 4096 if disk.sector == 512 else 512) for disk in self.disks),
        }
        usual = tuple(
            Variant(
                name,
                disks[name],
                refusal=self.refusals.get(name, ""),
                options=self.options.get(name, ()),
                grown=self.grows if name == LARGER else (),
            )
            for name in VARIANTS
            if name not in self.without
        )
        return (*usual, *self.more)

    def variant(self, name: str) -> Variant:
        """Return the variant of that name; KeyError if there is none."""
        for each in self.variants():
            if each.name == name:
                return each
        raise KeyError(name)


def disk_places(stack: Stack, variant: Variant) -> list[tuple[str, Disk]]:
    """Return the letters of the target's disks and the disks, in the order in which the machine has them."""
    letters = [letter for letter in stack.letters if letter not in variant.lacking]
    order = variant.order or range(len(letters))
    places = sorted(zip(order, letters, variant.disks, strict=True))
    return [(letter, disk) for _, letter, disk in places]


def _scaled(disk: Disk, numerator: int, denominator: int) -> Disk:
    return Disk(disk.size * numerator // denominator, disk.sector)
