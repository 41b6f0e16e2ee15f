"""The layout on real block devices: partitions that the kernel scans, arrays, mappings, mounts, swap."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.uml import python_argv
from tests.real_disks import MIB, blank
from tests.storage.conftest import Uml

pytestmark = pytest.mark.storage


def test_layout_on_block_devices(uml: Uml, tmp_path: Path) -> None:
    disks = [blank(tmp_path / "a.img", 128 * MIB), blank(tmp_path / "b.img", 200 * MIB)]
    code = (
        "from tests.storage import layout_inside as inside\n"
        "inside.disks_of_this_kernel()\n"
        "inside.restore_onto_larger_disk()\n"
        "inside.uses_through_every_layer()\n"
        "print('all well')\n"
    )
    outcome = uml(python_argv(code), disks=disks, timeout=200)
    assert outcome.stdout.endswith("all well\n")
