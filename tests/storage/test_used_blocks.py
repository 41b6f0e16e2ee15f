"""The maps of used blocks, held against file systems that were worked in: what they leave out is not missed.

Every image is made, aged, and copied used block by used block onto garbage; its own checker has to find nothing, and
every file has to be the same. Where partclone's map can be trusted, ours has to hold all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lab.uml import python_argv
from remetal.units import GIB
from tests.storage.aging import KINDS, prove, prove_growth
from tests.storage.conftest import Uml

pytestmark = pytest.mark.storage

AT_HOME = [name for name, kind in KINDS.items() if kind.at_home]
INSIDE = [name for name, kind in KINDS.items() if not kind.at_home]
SHARE = range(2)
BATCHES = [range(first, first + 10) for first in range(2, 52, 10)]
_MEMORY = "/dev/shm"


def prove_here(name: str, seeds: Sequence[int], folder: Path) -> None:
    """Prove the map for an image of each seed."""
    for seed in seeds:
        prove(name, seed, folder, oracle=True)


def prove_inside(uml: Uml, names: Sequence[str], seeds: Sequence[int]) -> None:
    """The same for file systems that the host's kernel does not mount."""
    run_inside(uml, *(f"prove({name!r}, {seed}, Path({_MEMORY!r}), oracle=True)" for name in names for seed in seeds))


def run_inside(uml: Uml, *lines: str) -> None:
    """Run lines of Python in a kernel of our own; the images lie in its memory."""
    head = ("from pathlib import Path", "from tests.storage.aging import prove, prove_growth")
    uml(python_argv("\n".join([*head, *lines])), memory=GIB, timeout=1100)


@pytest.mark.parametrize("name", AT_HOME)
def test_used_blocks_are_all_that_a_file_system_needs(tmp_path: Path, name: str) -> None:
    prove_here(name, SHARE, tmp_path)


def test_used_blocks_are_all_that_fat_and_f2fs_need(uml: Uml) -> None:
    prove_inside(uml, INSIDE, SHARE)


@pytest.mark.matrix
@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
@pytest.mark.parametrize("name", KINDS)
def test_used_blocks_of_fifty_more(uml: Uml, tmp_path: Path, name: str, seeds: Sequence[int]) -> None:
    if name in AT_HOME:
        prove_here(name, seeds, tmp_path)
    else:
        prove_inside(uml, [name], seeds)


@pytest.mark.parametrize("name", [name for name in AT_HOME if name != "xfs"])
def test_a_map_that_lacks_blocks_is_noticed(tmp_path: Path, name: str) -> None:
    """By the checker, by the driver, or by what the files hold."""
    with pytest.raises((AssertionError, OSError)):
        prove(name, 0, tmp_path, spoil=True)


@pytest.mark.parametrize("factor", [1.2, 5.0])
def test_an_aged_ntfs_grows(tmp_path: Path, factor: float) -> None:
    prove_growth("ntfs", 0, tmp_path, factor)


def test_an_aged_f2fs_grows(uml: Uml) -> None:
    """By thirty times, so that its tables get larger, and what lies behind them moves."""
    run_inside(uml, *(f"prove_growth('f2fs', 1, Path({_MEMORY!r}), {factor})" for factor in (1.2, 30.0)))


@pytest.mark.matrix
def test_more_aged_file_systems_grow(uml: Uml, tmp_path: Path) -> None:
    for seed in range(2, 12):
        prove_growth("ntfs", seed, tmp_path, 1.1 + seed / 4)
    run_inside(uml, *(f"prove_growth('f2fs', {seed}, Path({_MEMORY!r}), {1.1 + seed})" for seed in range(2, 12)))


def test_an_f2fs_that_goes_on_from_its_last_checkpoint(uml: Uml) -> None:
    run_inside(
        uml,
        "from tests.storage import f2fs_inside as inside",
        f"inside.restore_onto_a_later_state(Path({_MEMORY!r}))",
        f"inside.copy_while_mounted(Path({_MEMORY!r}))",
        f"inside.grow_what_was_not_unmounted(Path({_MEMORY!r}))",
    )
