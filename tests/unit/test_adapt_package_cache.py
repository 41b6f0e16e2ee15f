"""Packages without content are removed from apt's cache, wherever it lies, and nothing else is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from remetal.adapt.package_cache import adapt_package_cache
from remetal.adapt.restored import Restored
from remetal.adapt.roots import find_systems
from remetal.events import silent
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.adapt_disks import DATA_UUID, LINUX, ROOT_UUID, ext4, layout_of, make_ext4, partition, read_table, sh

PACKAGE = b"!<arch>\ndebian-binary"
CACHE = "cache/apt/archives"
KEPT = {f"{CACHE}/whole.deb": PACKAGE, f"{CACHE}/lock": b"", f"{CACHE}/empty.txt": bytes(99), "lib/empty.deb": bytes(9)}
EMPTY = {f"{CACHE}/zeros.deb": bytes(5000), f"{CACHE}/nothing.deb": b"", f"{CACHE}/old.deb": b"somebody else's"}


@dataclass
class Machine:
    restored: Restored
    var: Span

    def adapt(self) -> list[tuple[str, str]]:
        (system,) = find_systems(self.restored, silent)
        return [(each.path, each.what) for each in adapt_package_cache(system, self.restored).changes]

    def names(self) -> set[str]:
        with attach_loop(self.var) as loop, mounted(loop, options=["ro", "noload"]) as var:
            return {str(path.relative_to(var)) for path in var.rglob("*") if not path.is_dir()}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    root, var = tmp_path / "root", tmp_path / "var"
    for name, data in {**KEPT, **EMPTY}.items():
        (var / name).parent.mkdir(parents=True, exist_ok=True)
        (var / name).write_bytes(data)
    (var / CACHE / "link.deb").symlink_to("/etc/fstab")
    for name in ("etc", "var"):
        (root / name).mkdir(parents=True)
    (root / "etc/os-release").write_text("ID=debian\n")
    (root / "etc/fstab").write_text(f"UUID={ROOT_UUID} / ext4 defaults 0 1\nUUID={DATA_UUID} /var ext4 defaults 0 2\n")
    disk = tmp_path / "disk.img"
    partition(disk, 64 * MIB, f"label: gpt\nsize=24M,type={LINUX}\nsize=24M,type={LINUX}\n")
    table = read_table(disk, "sda")
    make_ext4(disk, table.partitions[0], root, uuid=ROOT_UUID)
    make_ext4(disk, table.partitions[1], var, uuid=DATA_UUID)
    layout = layout_of(disk, {1: ext4(1, uuid=ROOT_UUID), 2: ext4(2, uuid=DATA_UUID)})
    _, start, size = layout.place("sda:2")
    return Machine(Restored(source=layout, result=layout, devices={"sda": disk}), Span(disk, start, size))


def test_packages_without_content_are_removed_once(machine: Machine) -> None:
    assert machine.names() == {*KEPT, *EMPTY, f"{CACHE}/link.deb"}
    ((path, what),) = machine.adapt()
    assert path == "/var/cache/apt/archives"
    assert "3 packages without content" in what
    assert machine.names() == {*KEPT, f"{CACHE}/link.deb"}
    with attach_loop(machine.var) as loop:
        sh("e2fsck", "-fn", loop)
    content = machine.var.path.read_bytes()
    assert machine.adapt() == []
    assert machine.var.path.read_bytes() == content
