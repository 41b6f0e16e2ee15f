"""Looking for what is left out never waits for a frozen file system, on a kernel where closing a file does."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.uml import python_argv
from tests.storage.conftest import Uml
from tests.storage.leftout_inside import SIZE

pytestmark = pytest.mark.storage


@pytest.mark.parametrize(("files", "given_up"), [(100, False), (500, True)], ids=["some", "too many"])
def test_nobody_waits_for_files_to_be_closed(uml: Uml, tmp_path: Path, files: int, given_up: bool) -> None:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    uml(
        python_argv(f"from tests.storage.leftout_inside import prove\nprove({files}, given_up={given_up})"),
        disks=[disk],
    )
