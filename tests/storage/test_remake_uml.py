"""File systems made anew that the host's kernel does not mount; through FUSE, under an older kernel than the host's."""

from __future__ import annotations

import pytest

from lab.uml import python_argv
from remetal.units import MIB
from tests.storage.conftest import Uml

pytestmark = pytest.mark.storage


@pytest.mark.parametrize("work", ["fat", "fat_attributes", "flash", "old_xfs"])
def test_made_anew(uml: Uml, work: str) -> None:
    code = (
        "import subprocess\n"
        "from pathlib import Path\n"
        "from tests.storage import remake_inside as inside\n"
        "folder = Path('/run/remake')\n"
        "folder.mkdir()\n"
        "subprocess.run(['mount', '-t', 'tmpfs', 'remake', folder], check=True)\n"
        f"inside.{work}(folder)\n"
        "print('all well')\n"
    )
    outcome = uml(python_argv(code), memory=1536 * MIB, timeout=280)
    assert outcome.stdout.endswith("all well\n")
