"""A fresh site for every test, and one machine's disk for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.site import Site, build_disk


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A fresh site with an initialised repository."""
    site = Site(tmp_path)
    site.remetal("init", "--quiet")
    return site


@pytest.fixture(scope="session")
def machine_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine's disk with five partitions; made once, never changed by a test."""
    disk = tmp_path_factory.mktemp("machine") / "m.img"
    build_disk(disk)
    return disk
