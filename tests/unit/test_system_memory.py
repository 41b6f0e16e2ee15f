"""How much memory may be taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from remetal.system import memory
from remetal.system.memory import probe_available
from remetal.units import GIB, MIB


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 4 GiB to take, and the folder of its control groups."""
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable:    4194304 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def write(place: Path, **values: object) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "memory.stat").touch()
    for name, value in values.items():
        (place / name.replace("__", ".")).write_text(f"{value}\n")


def test_it_is_what_the_machine_has_where_nothing_else_is_said(groups: Path) -> None:
    assert probe_available() == 4 * GIB
    (groups.parent / "cgroup").write_text("0::/system.slice/backup.service\n")
    write(groups / "system.slice/backup.service", memory__max="max", memory__current=5)
    assert probe_available() == 4 * GIB


def test_a_service_or_the_slice_above_it_may_have_less(groups: Path) -> None:
    (groups.parent / "cgroup").write_text("0::/system.slice/backup.service\n")
    write(groups / "system.slice/backup.service", memory__max=512 * MIB, memory__current=100 * MIB)
    assert probe_available() == 412 * MIB
    write(groups / "system.slice", memory__max=GIB, memory__current=GIB - MIB)
    assert probe_available() == MIB
    write(groups / "system.slice", memory__max=GIB, memory__current=2 * GIB)
    assert probe_available() == 0


def test_what_the_kernel_caches_of_files_is_to_be_had(groups: Path) -> None:
    (groups.parent / "cgroup").write_text("0::/backup.service\n")
    write(groups / "backup.service", memory__max=512 * MIB, memory__current=512 * MIB)
    stat = f"anon {MIB}\nfile {400 * MIB}\ninactive_file {300 * MIB}\nactive_file {90 * MIB}\nfile_mapped 1\n"
    (groups / "backup.service/memory.stat").write_text(stat)
    assert probe_available() == 390 * MIB


def test_the_first_version_of_control_groups_counts_as_well(groups: Path) -> None:
    (groups.parent / "cgroup").write_text("9:name=systemd:/\n4:memory:/here\n3:cpuset:/\n")
    write(groups / "memory/here", memory__limit_in_bytes=300 * MIB, memory__usage_in_bytes=MIB)
    write(groups / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=GIB)
    assert probe_available() == 299 * MIB
