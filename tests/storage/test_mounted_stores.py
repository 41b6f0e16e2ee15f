"""Repositories on disks and servers that have to be mounted: in User Mode Linux, whose kernel knows them all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lab import CHECKOUT
from lab.uml import run_in_uml
from remetal.units import GIB, MIB
from tests.storage.stores_inside import DISKS

_NO_FILE_SYSTEM = "names_that_break or it_is_a_store or ranges or prefix"
"""Tests of the contract that show nothing about a file system."""
_SHOWN = 18
"""How many others there are."""


@pytest.mark.storage
@pytest.mark.timeout(1000)
def test_stores_that_have_to_be_mounted_keep_the_contract(tmp_path: Path) -> None:
    disks = [tmp_path / f"{name}.img" for name in ("served", *DISKS)]
    for disk in disks:
        with disk.open("wb") as file:
            file.truncate(320 * MIB)
    argv = [sys.executable, "-m", "tests.storage.stores_inside", "-k", f"not ({_NO_FILE_SYSTEM})"]
    paths = f"{CHECKOUT / 'src'}:{CHECKOUT}"
    outcome = run_in_uml(argv, disks=disks, memory=GIB, timeout=900, env={"PYTHONPATH": paths}, allowed=range(256))
    assert outcome.returncode == 0, f"{outcome.stdout}\n{outcome.stderr}"
    assert f"{_SHOWN * (len(DISKS) + 3)} passed" in outcome.stdout
