"""The recovery medium's settings: nothing is assembled by itself there, and remetal opens everything all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.uml import python_argv
from tests.real_disks import MIB, blank
from tests.storage.conftest import Uml

pytestmark = pytest.mark.storage


def test_nothing_is_assembled_on_the_medium_but_by_remetal(uml: Uml, tmp_path: Path) -> None:
    disks = [blank(tmp_path / f"{letter}.img", 96 * MIB) for letter in "abcd"]
    code = (
        "from tests.storage import medium_inside as inside\n"
        "inside.prepare()\n"
        "inside.use_the_mediums_settings()\n"
        "inside.nothing_is_assembled_by_itself()\n"
        "inside.remetal_opens_it_all_the_same()\n"
        "inside.what_was_restored_is_whole()\n"
        "print('all well')\n"
    )
    outcome = uml(python_argv(code), disks=disks, timeout=280)
    assert outcome.stdout.endswith("all well\n")
