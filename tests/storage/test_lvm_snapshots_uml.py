"""Mounted logical volumes are read from LVM snapshots that are of the same moment as all others, or of none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lab import CHECKOUT
from tests.real_disks import MIB, blank
from tests.storage.conftest import Uml

pytestmark = pytest.mark.storage


@pytest.mark.parametrize(
    "cases",
    [
        ["all_are_of_one_moment"],
        ["one_that_overflows_is_no_image", "a_pool_that_fills_up_ends_it"],
        pytest.param(
            [
                "where_there_is_no_room_it_is_captured_without",
                "one_that_vanishes_is_no_image",
                "who_is_ended_leaves_nothing_for_long",
            ],
            marks=pytest.mark.matrix,
        ),
    ],
    ids=lambda cases: cases[0],
)
def test_lvm_snapshots(uml: Uml, tmp_path: Path, cases: list[str]) -> None:
    code = "from tests.storage import lvm_snapshots_inside as inside\ninside.prepare()\n"
    code += "".join(f"inside.{case}()\n" for case in cases) + "print('all well')\n"
    paths = f"{CHECKOUT / 'src'}:{CHECKOUT}"
    disk = blank(tmp_path / "a.img", 1300 * MIB)
    argv = [sys.executable, "-c", code]
    outcome = uml(argv, disks=[disk], memory=768 * MIB, timeout=1000, env={"PYTHONPATH": paths})
    assert outcome.stdout.endswith("all well\n")
