"""Systems whose root is a subvolume of a btrfs, on one device and on two; snapshots of them are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from remetal.adapt import Adaptation, adapt_system
from remetal.adapt.restored import Restored
from remetal.adapt.roots import System, find_systems, open_root
from remetal.events import Event, Warn, silent
from remetal.layout.model import Disk, FileSystem, Layout, LogicalVolume, Part, PhysicalVolume, VolumeGroup
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.adapt_disks import DATA_UUID, LINUX, ROOT_UUID, make_ext4, partition, read_table, sh

DEBIAN = {"etc/os-release": "ID=debian\n"}


class Machine:
    """Disk files with one partition each, and one btrfs on all of them."""

    def __init__(self, folder: Path, *, disks: int = 1) -> None:
        self.uuid = str(uuid4())
        names = ["sda", "sdb"][:disks]
        self.devices = {name: folder / f"{name}.img" for name in names}
        for path in self.devices.values():
            partition(path, 160 * MIB, f"label: gpt\nsize=150M,type={LINUX}\n")
        tables = {name: read_table(path, name) for name, path in self.devices.items()}
        self.spans = {
            f"{name}:1": Span(path, tables[name].partitions[0].start, tables[name].partitions[0].size)
            for name, path in self.devices.items()
        }
        with ExitStack() as stack:
            loops = [stack.enter_context(attach_loop(span, writable=True)) for span in self.spans.values()]
            profile = ["-d", "raid1", "-m", "raid1"] if disks > 1 else []
            sh("mkfs.btrfs", "-q", "-f", "-U", self.uuid, *profile, *loops)
            forget(loops)
        parts = tuple(
            Part(space=space, number=number, size=span.size)
            for number, (space, span) in enumerate(self.spans.items(), 1)
        )
        volume = FileSystem(on="sda:1", type="btrfs", size=MIB, used=0, block_size=4096, uuid=self.uuid, parts=parts)
        self.layout = Layout(
            disks=tuple(Disk(name=name, size=path.stat().st_size) for name, path in self.devices.items()),
            layers=(*tables.values(), volume),
        )
        self.events: list[Event] = []

    @property
    def restored(self) -> Restored:
        return Restored(source=self.layout, result=self.layout, devices=self.devices)

    @contextmanager
    def top(self) -> Iterator[Path]:
        """Mount the top of the file system, to be written to."""
        with ExitStack() as stack:
            loops = [stack.enter_context(attach_loop(span, writable=True)) for span in self.spans.values()]
            options = ["subvolid=5", *(f"device={loop}" for loop in loops)]
            with mounted(loops[0], kind="btrfs", options=options) as folder:
                yield folder
            forget(loops)

    def adapt(self) -> Adaptation:
        return adapt_system(self.layout, self.layout, self.devices, firmware=None, report=self.events.append)

    def systems(self) -> list[System]:
        return find_systems(self.restored, silent)

    def content(self) -> list[bytes]:
        return [path.read_bytes() for path in self.devices.values()]


def forget(loops: list[Path]) -> None:
    for loop in loops:
        sh("btrfs", "device", "scan", "--forget", loop)


def make_system(root: Path, fstab: str, *, boot: Path | None = None) -> None:
    """Put the files of a small system into a subvolume."""
    for name, text in {
        **DEBIAN,
        "etc/fstab": fstab,
        "etc/default/grub": 'GRUB_CMDLINE_LINUX="resume=/dev/sda1"\n',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (boot or root / "boot").mkdir(parents=True, exist_ok=True)
    (root / "boot").mkdir(exist_ok=True)
    (boot or root / "boot").joinpath("marker").write_text("here")


@pytest.mark.parametrize("disks", [1, 2])
def test_a_root_in_a_subvolume_and_no_snapshot_of_it(tmp_path: Path, disks: int) -> None:
    machine = Machine(tmp_path, disks=disks)
    fstab = "/dev/sda1 / btrfs defaults,subvol=@ 0 0\n/dev/sda1 /boot btrfs subvol=/boot@,ro 0 0\n"
    with machine.top() as top:
        for name in ("@", "boot@"):
            sh("btrfs", "subvolume", "create", top / name)
        make_system(top / "@", fstab, boot=top / "boot@")
        sh("btrfs", "subvolume", "snapshot", "-r", top / "@", top / "@-before")
        sh("btrfs", "subvolume", "snapshot", top / "@", top / "root")
    before = machine.content()
    (system,) = machine.systems()
    assert (system.root, system.subvolumes) == ("sda:1", {"/": "@", "/boot": "boot@"})
    with open_root(system, machine.restored) as root:
        assert (root / "boot/marker").read_text() == "here"
    assert machine.content() == before
    (change, *_) = machine.adapt().changes
    assert change.path == "/etc/fstab"
    with machine.top() as top:
        assert (top / "@/etc/fstab").read_text() == fstab.replace("/dev/sda1", f"UUID={machine.uuid}")
        assert (top / "@-before/etc/fstab").read_text() == (top / "root/etc/fstab").read_text() == fstab
    before = machine.content()
    assert machine.adapt().changes == ()
    assert machine.content() == before
    with ExitStack() as stack:
        loops = [stack.enter_context(attach_loop(span)) for span in machine.spans.values()]
        sh("btrfs", "device", "scan", *loops)
        sh("btrfs", "check", loops[0])
        forget(loops)


def test_the_default_subvolume_is_the_root_where_the_fstab_names_none(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with machine.top() as top:
        sh("btrfs", "subvolume", "create", top / "@")
        (top / "@/.snapshots/1").mkdir(parents=True)
        sh("btrfs", "subvolume", "create", top / "@/.snapshots/1/snapshot")
        make_system(top / "@/.snapshots/1/snapshot", f"UUID={machine.uuid} / btrfs defaults 0 0\n")
        sh("btrfs", "subvolume", "set-default", top / "@/.snapshots/1/snapshot")
    (system,) = machine.systems()
    assert system.subvolumes == {"/": "@/.snapshots/1/snapshot"}
    with open_root(system, machine.restored) as root:
        assert (root / "boot/marker").exists()


def test_a_root_at_the_top_and_another_system_beside_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with machine.top() as top:
        make_system(top, f"UUID={machine.uuid} / btrfs defaults 0 0\n")
        sh("btrfs", "subvolume", "create", top / "fedora")
        make_system(top / "fedora", f"UUID={machine.uuid} / btrfs subvol=fedora 0 0\n")
        (top / "@").symlink_to("/etc")
    assert [system.subvolumes for system in machine.systems()] == [{}, {"/": "fedora"}]


def test_a_btrfs_without_a_device_is_not_looked_into(tmp_path: Path) -> None:
    machine = Machine(tmp_path, disks=2)
    with machine.top() as top:
        make_system(top, "")
    restored = Restored(source=machine.layout, result=machine.layout, devices={"sda": machine.devices["sda"]})
    assert find_systems(restored, silent) == []
    with machine.devices["sdb"].open("r+b") as file:
        file.seek(machine.spans["sdb:1"].start)
        file.write(bytes(MIB))
    assert find_systems(machine.restored, machine.events.append) == []
    assert ["cannot look into sda:1 (btrfs)" in event.text for event in machine.events if isinstance(event, Warn)] == [
        True
    ]


def test_what_was_kept_and_what_is_a_snapshot_is_not_looked_into(tmp_path: Path) -> None:
    """A volume of a group stands in a disk file here, as if the group were open."""
    disks = {name: tmp_path / name for name in ("sda", "root", "snap", "kept")}
    for name in ("root", "snap", "kept"):
        partition(disks[name], 32 * MIB, f"label: gpt\nsize=24M,type={LINUX}\n")
        folder = tmp_path / f"tree-{name}"
        make_system(folder, f"UUID={ROOT_UUID} / ext4 defaults 0 1\n")
        part = read_table(disks[name], name).partitions[0]
        make_ext4(disks[name], part, folder)
        with disks[name].open("r+b") as file:
            file.seek(part.start)
            content = file.read(part.size)
            file.seek(0)
            file.write(content)
    volumes = tuple(
        LogicalVolume(name=name, uuid=DATA_UUID, size=24 * MIB, kind="linear", origin="root" if name == "snap" else "")
        for name in ("root", "snap", "kept")
    )
    member = PhysicalVolume(space="sda", name="pv0", uuid="x", data_start=MIB, extents=64)
    group = VolumeGroup(name="vg", uuid="y", extent_size=4 * MIB, members=(member,), volumes=volumes, metadata="")
    systems = tuple(
        FileSystem(on=f"vg/{name}", type="ext4", size=24 * MIB, used=0, block_size=1024, uuid=ROOT_UUID)
        for name in ("root", "snap", "kept")
    )
    layout = Layout(disks=(Disk(name="sda", size=256 * MIB),), layers=(group, *systems))
    devices = {f"vg/{name}": disks[name] for name in ("root", "snap", "kept")}
    restored = Restored(source=layout, result=layout, devices=devices, kept=frozenset({"vg/kept"}))
    assert [system.root for system in find_systems(restored, silent)] == ["vg/root"]
