"""The disks of a machine as the kernel shows them: several paths to one, several members of one, and blank ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.uml import python_argv
from tests.real_disks import MIB, blank
from tests.storage.conftest import Uml

pytestmark = pytest.mark.storage


def test_disks_that_several_devices_show(uml: Uml, tmp_path: Path) -> None:
    disks = [blank(tmp_path / f"{letter}.img", 96 * MIB) for letter in "abcde"]
    code = (
        "from tests.storage import machine_inside as inside\n"
        "inside.a_multipath_disk_is_one_disk()\n"
        "inside.a_node_of_its_own_does_as_well()\n"
        "inside.a_blank_disk_is_shown_as_empty()\n"
        "inside.a_firmware_raid_is_one_disk()\n"
        "print('all well')\n"
    )
    outcome = uml(python_argv(code), disks=disks, timeout=200)
    assert outcome.stdout.endswith("all well\n")
