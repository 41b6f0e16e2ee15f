"""The whole adaptation on real disk files: GRUB laid by its own installer, ext4 by mkfs, FAT by mtools."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from remetal.adapt import Adaptation, adapt_system
from remetal.adapt.grub_bios import probe_chain
from remetal.adapt.grub_images import SECTOR, CoreImageError
from remetal.adapt.restored import Restored
from remetal.adapt.roots import find_systems, open_root
from remetal.events import Event, Warn, silent
from remetal.layout.model import GptTable, Layer, Layout
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.adapt_disks import (
    BIOS_BOOT,
    BOOT_UUID,
    DATA_UUID,
    ESP,
    LINUX,
    PC_MODULES,
    ROOT_UUID,
    ext4,
    layout_of,
    make_core,
    make_esp,
    make_ext4,
    partition,
    raw,
    setup_grub,
    sh,
    vfat,
)

MODULES = "biosdisk part_gpt part_msdos ext2 search_fs_uuid"
FSTAB = f"# static\nUUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\nUUID=1234-ABCD /boot/efi vfat umask=0077 0 1\n"


def make_tree(folder: Path, core: bytes, fstab: str) -> Path:
    """Make the files of a small installed system."""
    grub = folder / "boot/grub/i386-pc"
    grub.mkdir(parents=True)
    (folder / "etc").mkdir()
    (folder / "usr/lib").mkdir(parents=True)
    (folder / "boot/efi").mkdir()
    (folder / "usr/lib/os-release").write_text('ID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n')
    (folder / "etc/os-release").symlink_to("../usr/lib/os-release")
    (folder / "etc/fstab").write_text(fstab)
    (grub / "core.img").write_bytes(core)
    shutil.copy(PC_MODULES / "boot.img", grub / "boot.img")
    return folder


def make_core_image(tmp_path: Path, *, uuid: str = ROOT_UUID, part: str = "gpt3") -> bytes:
    config = f"search.fs_uuid {uuid} root hd0,{part} \nset prefix=($root)'/boot/grub'\n"
    return make_core(tmp_path / "core.img", prefix=f"(,{part})/boot/grub", modules=MODULES, config=config)


class Machine:
    """A GPT disk file with a BIOS boot partition, an ESP and a root, as a restore would leave it."""

    def __init__(self, tmp_path: Path, *, fstab: str = FSTAB, files: Mapping[str, bytes] | None = None) -> None:
        self.disk = tmp_path / "disk.img"
        self.core = make_core_image(tmp_path)
        partition(
            self.disk,
            128 * MIB,
            f"label: gpt\nstart=2048,size=2048,type={BIOS_BOOT}\nsize=40M,type={ESP}\nsize=32M,type={LINUX}\n"
            f"size=16M,type={LINUX}\n",
        )
        self.volumes: dict[int, Layer] = {1: raw(1), 2: vfat(2), 3: ext4(3)}
        self.layout = layout_of(self.disk, self.volumes)
        parts = self.table.partitions
        setup_grub(self.disk, self.core, tmp_path)
        make_esp(self.disk, parts[1], files if files is not None else {"/EFI/debian/grubx64.efi": b"grub"})
        make_ext4(self.disk, parts[2], make_tree(tmp_path / "root", self.core, fstab))
        self.events: list[Event] = []

    @property
    def table(self) -> GptTable:
        table = self.layout.layers[0]
        assert isinstance(table, GptTable)
        return table

    def adapt(self, *, firmware: str | None = None, source: Layout | None = None) -> Adaptation:
        return adapt_system(
            source or self.layout, self.layout, {"sda": self.disk}, firmware=firmware, report=self.events.append
        )

    def warnings(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Warn)]

    def span(self, number: int) -> Span:
        _, start, size = self.layout.place(f"sda:{number}")
        return Span(self.disk, start, size)

    def write(self, sector: int, data: bytes) -> None:
        with self.disk.open("r+b") as file:
            file.seek(sector * SECTOR)
            file.write(data)

    def read(self, sector: int, count: int = 1) -> bytes:
        with self.disk.open("rb") as file:
            file.seek(sector * SECTOR)
            return file.read(count * SECTOR)

    def check(self) -> None:
        with open_disk(self.disk) as device:
            probe_chain(device, 0, self.layout, "sda")
        with attach_loop(self.span(3)) as loop:
            sh("e2fsck", "-fn", loop)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_system_that_fits_gets_its_fallback_and_then_nothing_more(machine: Machine) -> None:
    done = machine.adapt()
    assert [change.path for change in done.changes] == ["/EFI/BOOT/BOOTX64.EFI"]
    assert any("the initramfs was left as it is" in note for note in done.notes)
    before = machine.disk.read_bytes()
    done = machine.adapt()
    assert (done.changes, done.bytes_written) == ((), 0)
    assert machine.disk.read_bytes() == before
    assert machine.warnings() == []


def test_an_fstab_of_kernel_names_is_rewritten_in_place(tmp_path: Path) -> None:
    old = "# mine\n/dev/sda3  /  ext4 defaults 0 1\n/dev/sdz9 /z ext4 nofail\n"
    machine = Machine(tmp_path, fstab=old)
    with attach_loop(machine.span(3), writable=True) as loop, mounted(loop) as root:
        (root / "etc/fstab").chmod(0o640)
        inode = (root / "etc/fstab").stat().st_ino
    done = machine.adapt()
    (change,) = [change for change in done.changes if change.path == "/etc/fstab"]
    assert f"+UUID={ROOT_UUID}  /  ext4 defaults 0 1" in change.diff
    with attach_loop(machine.span(3)) as loop, mounted(loop, options=["ro", "noload"]) as root:
        assert (root / "etc/fstab").read_text() == old.replace("/dev/sda3", f"UUID={ROOT_UUID}")
        status = (root / "etc/fstab").stat()
        assert (status.st_mode & 0o777, status.st_ino) == (0o640, inode)
    machine.check()
    before = machine.disk.read_bytes()
    assert machine.adapt().changes == ()
    assert machine.disk.read_bytes() == before


def test_an_fstab_that_is_a_link_out_of_the_system_is_not_followed(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    outside = tmp_path / "outside"
    outside.write_text("/dev/sda3 / ext4\n")
    with attach_loop(machine.span(3), writable=True) as loop, mounted(loop) as root:
        (root / "etc/fstab").unlink()
        (root / "etc/fstab").symlink_to(f"../../../../../../../../..{outside}")
    assert any("no installed system" in note for note in machine.adapt().notes)
    assert outside.read_text() == "/dev/sda3 / ext4\n"


def test_a_broken_core_is_laid_anew_from_the_installed_system(machine: Machine) -> None:
    place = machine.table.partitions[0].start // SECTOR
    machine.write(place + 20, bytes(range(256)) * 20)
    done = machine.adapt()
    (change,) = [change for change in done.changes if change.path == "sector 0 of sda"]
    assert "laid anew" in change.what
    machine.check()
    assert machine.read(place + 1, 20) == machine.core[SECTOR : 21 * SECTOR]
    before = machine.disk.read_bytes()
    assert machine.adapt().changes == ()
    assert machine.disk.read_bytes() == before


def test_a_boot_sector_that_points_nowhere_is_laid_anew(machine: Machine) -> None:
    sector = bytearray(machine.read(0))
    sector[0x5C:0x64] = (9).to_bytes(8, "little")
    machine.write(0, bytes(sector))
    assert any(change.path == "sector 0 of sda" for change in machine.adapt().changes)
    machine.check()
    assert machine.read(0)[0x1B8:] == bytes(sector)[0x1B8:]


def test_a_core_that_searches_for_what_is_gone_is_only_reported(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.volumes[3] = ext4(3, uuid=DATA_UUID)
    machine.layout = layout_of(machine.disk, machine.volumes)
    before = machine.read(0, 4096)
    done = machine.adapt()
    assert any(ROOT_UUID in note and "could not be verified" in note for note in done.notes)
    assert len(machine.warnings()) == 1
    assert machine.read(0, 4096) == before


def test_a_moved_bios_boot_partition_takes_its_sector_numbers_along(tmp_path: Path) -> None:
    """The restore has put the partition's bytes elsewhere; the numbers in them still name the old place."""
    machine = Machine(tmp_path)
    source = machine.layout
    size = 2048
    content = machine.read(2048, size)
    other = source.place("sda:4")[1] // SECTOR
    script = sh("sfdisk", "--dump", machine.disk).replace(
        "start=        2048, size=        2048", f"start={other}, size={size}"
    )
    script = "\n".join(line for line in script.splitlines() if "disk.img4" not in line)
    sh("sfdisk", "--quiet", machine.disk, text=script)
    machine.write(other, content)
    machine.write(2048, bytes(SECTOR * size))
    machine.layout = layout_of(machine.disk, machine.volumes)
    assert machine.layout.place("sda:1")[1] == other * SECTOR
    with open_disk(machine.disk) as device, pytest.raises(CoreImageError):
        probe_chain(device, 0, machine.layout, "sda")
    done = machine.adapt(source=source)
    (change,) = [change for change in done.changes if change.path == "sector 0 of sda"]
    assert "follow the partition" in change.what
    machine.check()
    assert machine.read(other + 1, size - 1) == content[SECTOR:]
    assert machine.adapt(source=source).changes == ()


def test_a_blank_boot_sector_is_filled_for_a_bios_machine_only(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write(0, bytes(440))
    place = machine.table.partitions[0].start // SECTOR
    machine.write(place, bytes(200 * SECTOR))
    assert not [change for change in machine.adapt().changes if "sector" in change.path]
    assert not any(machine.read(0)[:440])
    (change,) = machine.adapt(firmware="bios").changes
    assert "no boot code" in change.what
    machine.check()


def test_foreign_boot_code_is_never_touched(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write(0, b"\xfa\x33\xc0" + bytes(437))
    before = machine.read(0, 4096)
    done = machine.adapt(firmware="bios")
    assert not [change for change in done.changes if "sector" in change.path]
    assert machine.read(0, 4096) == before


def test_looking_at_a_system_with_a_separate_boot_writes_nothing(tmp_path: Path) -> None:
    """/boot is named by its kernel name: only the rewritten fstab tells where it is."""
    machine = Machine(tmp_path, fstab="/dev/vda3 / ext4\n/dev/vda4 /boot ext2\n")
    folder = tmp_path / "boot"
    (folder / "grub/i386-pc").mkdir(parents=True)
    (folder / "grub/i386-pc/marker").write_text("here")
    make_ext4(machine.disk, machine.table.partitions[3], folder, uuid=BOOT_UUID, kind="ext2")
    machine.volumes[4] = ext4(4, uuid=BOOT_UUID, kind="ext2")
    machine.layout = layout_of(machine.disk, machine.volumes)
    before = machine.disk.read_bytes()
    restored = Restored(source=machine.layout, result=machine.layout, devices={"sda": machine.disk})
    (system,) = find_systems(restored, silent)
    assert system.name == "Debian GNU/Linux 12 (bookworm)"
    assert system.mounts == {"/": "sda:3", "/boot": "sda:4"}
    with open_root(system, restored) as root:
        assert (root / "boot/grub/i386-pc/marker").read_text() == "here"
    assert machine.disk.read_bytes() == before


def test_an_xfs_root_is_read_and_written_though_its_twin_is_mounted(tmp_path: Path) -> None:
    disk = tmp_path / "x.img"
    partition(disk, 330 * MIB, f"label: gpt\nsize=320M,type={LINUX}\n")
    layout = layout_of(disk, {1: ext4(1, kind="xfs")})
    span = Span(disk, *layout.place("sda:1")[1:])
    with attach_loop(span, writable=True) as loop:
        sh("mkfs.xfs", "-q", "-m", f"uuid={ROOT_UUID}", loop)
        with mounted(loop) as root:
            make_tree(root / "new", b"", "/dev/sda1 / xfs defaults 0 1\n")
            for each in (root / "new").iterdir():
                each.rename(root / each.name)
    twin = tmp_path / "twin.img"
    shutil.copy(disk, twin)
    with attach_loop(Span(twin, span.start, span.size), writable=True) as loop, mounted(loop):
        done = adapt_system(layout, layout, {"sda": disk}, firmware=None)
    assert [change.path for change in done.changes] == ["/etc/fstab"]
    assert adapt_system(layout, layout, {"sda": disk}, firmware=None).changes == ()
    with attach_loop(span) as loop:
        sh("xfs_repair", "-n", loop)


def test_a_volume_that_cannot_be_mounted_is_reported_and_passed_over(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write(machine.table.partitions[2].start // SECTOR, bytes(MIB))
    done = machine.adapt()
    assert any("no installed system" in note for note in done.notes)
    assert any("cannot look into sda:3" in text for text in machine.warnings())


def test_a_disk_without_anything_known(tmp_path: Path) -> None:
    disk = tmp_path / "d.img"
    partition(disk, 32 * MIB, f"label: gpt\nsize=16M,type={LINUX}\n")
    before = disk.read_bytes()
    done = adapt_system(layout_of(disk, {1: raw(1)}), layout_of(disk, {1: raw(1)}), {"sda": disk}, firmware=None)
    assert (done.changes, done.bytes_written, len(done.notes)) == ((), 0, 1)
    assert disk.read_bytes() == before
