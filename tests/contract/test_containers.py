"""What every kind of container promises: arrays, volume groups and LUKS, by the real kernel and their real tools.

A new kind is a further entry in the table of samples (`containers_inside`). Each sample has a boot of its own, in which
all checks are tried; `make test` runs a few, and `make matrix` the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.uml import python_argv, run_in_uml
from remetal.layout.layers import CONTAINERS
from remetal.layout.model import Luks, MdArray, VolumeGroup
from remetal.units import MIB
from tests.contract.containers_inside import CHECKS, DISK_SIZE, DISKS, SAMPLES
from tests.real_disks import blank

pytestmark = pytest.mark.storage

_QUICK = {"lvm-linear-on-two", "luks2"}


def _params() -> Iterator[object]:
    for name in SAMPLES:
        yield pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.matrix])


@pytest.mark.parametrize("sample", list(_params()))
def test_container(tmp_path: Path, sample: str) -> None:
    disks = [blank(tmp_path / f"{index}.img", DISK_SIZE) for index in range(DISKS)]
    code = f"from tests.contract import containers_inside as inside\ninside.main({sample!r})"
    done = run_in_uml(python_argv(code), disks=disks, memory=512 * MIB, timeout=300)
    outcome: dict[str, str] = json.loads(done.stdout)
    assert outcome == dict.fromkeys(CHECKS, "")


def test_every_kind_has_samples() -> None:
    assert set(CONTAINERS) == {MdArray, VolumeGroup, Luks}
    assert set(SAMPLES) >= _QUICK
    for word in ("raid", "linear", "lvm", "luks1", "luks2"):
        assert any(name.startswith(word) for name in SAMPLES)
