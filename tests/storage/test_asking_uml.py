"""People at a terminal are asked for what only they know: passphrases of LUKS containers, and whether they mean it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.uml import python_argv
from tests.real_disks import MIB, blank
from tests.storage.conftest import Uml

pytestmark = pytest.mark.storage


def test_people_are_asked_for_what_only_they_know(uml: Uml, tmp_path: Path) -> None:
    disks = [blank(tmp_path / f"{letter}.img", 96 * MIB) for letter in "abc"]
    code = (
        "from tests.storage import asking_inside as inside\n"
        "inside.prepare()\n"
        "inside.a_backup_asks()\n"
        "inside.a_restore_asks()\n"
        "inside.the_dialogue_asks()\n"
        "inside.an_answer_brings_the_key()\n"
        "print('all well')\n"
    )
    outcome = uml(python_argv(code), disks=disks, timeout=280)
    assert outcome.stdout.endswith("all well\n")
