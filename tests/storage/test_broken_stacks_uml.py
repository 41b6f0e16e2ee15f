"""Containers that lack members, are there twice, or stay locked: refused with the right code, or carried as is."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.uml import python_argv
from tests.real_disks import blank
from tests.storage.broken_stacks_inside import DISK_SIZE, DISKS
from tests.storage.conftest import Uml

pytestmark = pytest.mark.storage

WORKS = (
    "two_groups_of_one_name",
    "what_lacks_members",
    "copies_of_a_member",
    "a_container_that_nobody_opens",
    "open_sources_stay_what_they_are",
    "open_twins_are_refused",
)


@pytest.mark.parametrize("work", WORKS)
def test_broken_stacks(uml: Uml, tmp_path: Path, work: str) -> None:
    disks = [blank(tmp_path / disk.name, DISK_SIZE) for disk in DISKS]
    code = (
        "from tests.storage import broken_stacks_inside as inside\n"
        "inside.prepare()\n"
        f"inside.{work}()\n"
        "print('all well')\n"
    )
    outcome = uml(python_argv(code), disks=disks, timeout=280)
    assert outcome.stdout.endswith("all well\n")
