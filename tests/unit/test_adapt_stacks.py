"""Boot loaders on stacks: an EFI system partition on a mirror, GRUB on every disk of a group, GRUB without its array.

What the kernel would open stands in disk files of its own, as it does while a restore has it open.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from remetal.adapt import adapt_system
from remetal.adapt.efi import adapt_efi
from remetal.adapt.firmware import find_boot_device, find_partitions
from remetal.adapt.grub_bios import probe_chain
from remetal.adapt.grub_images import SECTOR
from remetal.adapt.identity import Gone, Identities
from remetal.adapt.nvram import probe_entries, probe_order
from remetal.adapt.restored import Restored
from remetal.adapt.roots import System
from remetal.adapt.text import TextPlan
from remetal.events import silent
from remetal.layout.model import (
    ArrayMember,
    Disk,
    FileSystem,
    GptTable,
    Layout,
    LogicalVolume,
    MdArray,
    Partition,
    PhysicalVolume,
    SpaceId,
    VolumeGroup,
)
from remetal.system.blockdev import open_disk
from remetal.units import MIB
from tests.adapt_disks import (
    BIOS_BOOT,
    ESP,
    ESP_UUID,
    LINUX,
    PC_MODULES,
    ROOT_UUID,
    make_core,
    make_esp,
    make_ext4,
    partition,
    raw,
    read_table,
    sh,
    vfat,
)

ARRAY = "3aaa0122:29827cfa:5331ad66:ca767371"
VG, LV = "aBcDeF-0123-4567-89ab-cDeF-0123-456789", "zYxWvU-0123-4567-89ab-cDeF-0123-456789"


def mirror(*spaces: SpaceId, offset: int = 0, level: str = "raid1") -> MdArray:
    members = tuple(ArrayMember(space=space, slot=slot, data_offset=offset) for slot, space in enumerate(spaces))
    metadata = "1.2" if offset else "1.0"
    return MdArray(
        device="md/m", size=40 * MIB, members=members, uuid=ARRAY, level=level, metadata=metadata, slots=len(spaces)
    )


def table_of(path: Path, name: SpaceId) -> GptTable:
    table = read_table(path, name)
    assert isinstance(table, GptTable)
    return table


def cut_out(disk: Path, table: GptTable, number: int, place: Path) -> Path:
    """Put a partition's bytes into a file of their own."""
    part = next(each for each in table.partitions if each.number == number)
    with disk.open("rb") as file:
        file.seek(part.start)
        place.write_bytes(file.read(part.size))
    return place


def two_disks(folder: Path, script: str, *, size: int = 64) -> tuple[dict[SpaceId, Path], list[GptTable]]:
    devices = {name: folder / f"{name}.img" for name in ("sda", "sdb")}
    for path in devices.values():
        partition(path, size * MIB, script)
    return devices, [table_of(path, name) for name, path in devices.items()]


def disks_of(devices: dict[SpaceId, Path]) -> tuple[Disk, ...]:
    return tuple(Disk(name=name, size=path.stat().st_size) for name, path in devices.items())


def make_efivars(folder: Path) -> Path:
    efivars = folder / "efivars"
    efivars.mkdir()
    (efivars / "Timeout-8be4df61-93ca-11d2-aa0d-00e098032b8c").write_bytes(bytes(6))
    return efivars


def test_an_esp_on_a_mirror_gets_an_entry_for_each_disk(tmp_path: Path) -> None:
    devices, tables = two_disks(tmp_path, f"label: gpt\nstart=2048,size=40M,type={ESP}\nsize=4M,type={LINUX}\n")
    make_esp(devices["sda"], tables[0].partitions[0], {"/EFI/debian/grubx64.efi": b"grub"})
    opened = devices | {"md/m": cut_out(devices["sda"], tables[0], 1, tmp_path / "md.img")}
    esp = FileSystem(on="md/m", type="vfat", size=MIB, used=0, block_size=512, uuid=ESP_UUID)
    layout = Layout(disks=disks_of(devices), layers=(*tables, mirror("sda:1", "sdb:1"), esp))
    restored = Restored(source=layout, result=layout, devices=opened)
    efivars = make_efivars(tmp_path)
    done = adapt_efi(restored, (), firmware="uefi", report=silent, efivars=efivars)
    assert [change.path for change in done.changes] == ["/EFI/BOOT/BOOTX64.EFI", "NVRAM"]
    entries = probe_entries(efivars)
    assert [entries[number].place.signature for number in probe_order(efivars)] == [  # type: ignore[union-attr]
        table.partitions[0].uuid.lower() for table in tables
    ]
    assert sh("mtype", "-i", opened["md/m"], "::/EFI/BOOT/BOOTX64.EFI") == "grub"
    assert adapt_efi(restored, (), firmware="uefi", report=silent, efivars=efivars).changes == ()


def test_an_esp_that_the_firmware_cannot_find_on_its_disks_is_none(tmp_path: Path) -> None:
    devices, tables = two_disks(tmp_path, f"label: gpt\nstart=2048,size=40M,type={ESP}\n")
    esp = FileSystem(on="md/m", type="vfat", size=MIB, used=0, block_size=512, uuid=ESP_UUID)
    layout = Layout(disks=disks_of(devices), layers=(*tables, mirror("sda:1", "sdb:1", offset=MIB), esp))
    restored = Restored(source=layout, result=layout, devices=devices | {"md/m": tmp_path / "md.img"})
    system = System("md/m", "Debian", ("debian",), TextPlan("/etc/fstab", ""), {"/boot/efi": "md/m"})
    done = adapt_efi(restored, (system,), firmware="uefi", report=silent, efivars=tmp_path)
    assert "no EFI system partition" in done.notes[0]


def test_an_image_of_grub_that_looks_for_a_dissolved_array_is_told(tmp_path: Path) -> None:
    """One that its own installer made for a /boot on an array has the array's UUID in it."""
    disk = tmp_path / "sda.img"
    partition(disk, 96 * MIB, f"label: gpt\nstart=2048,size=40M,type={ESP}\nsize=32M,type={LINUX}\n")
    table = table_of(disk, "sda")
    modules = "part_gpt mdraid1x ext2 search_fs_uuid"
    prefix = f"(mduuid/{ARRAY.replace(':', '')})/grub"
    image = make_core(tmp_path / "grub.efi", prefix=prefix, modules=modules, target="x86_64-efi")
    signed = make_core(tmp_path / "signed.efi", prefix="/EFI/debian", modules=modules, target="x86_64-efi")
    entry = b"linux /x\ninitrd /y\noptions root=/dev/md/m quiet\n"
    make_esp(
        disk,
        table.partitions[0],
        {"/EFI/debian/grubx64.efi": image, "/EFI/other/grubx64.efi": signed, "/loader/entries/a.conf": entry},
    )
    root = FileSystem(on="sda:2", type="ext4", size=MIB, used=0, block_size=4096, uuid=ROOT_UUID)
    layout = Layout(disks=disks_of({"sda": disk}), layers=(table, vfat(1), root))
    restored = Restored(source=layout, result=layout, devices={"sda": disk}, moved={"md/m": "sda:2"})
    why = "the array was dissolved; its content stands on sda:2"
    identities = Identities(gone=(Gone(space="md/m", kind="md", uuid=ARRAY, why=why),))
    system = System("sda:2", "Debian", ("debian",), TextPlan("/etc/fstab", ""), {}, identities=identities)
    (note,) = adapt_efi(restored, (system,), firmware=None, report=silent).notes
    assert "/EFI/debian/grubx64.efi" in note
    assert why in note
    assert f"mount UUID={ROOT_UUID} /mnt" in note
    assert "grub-install --target=x86_64-efi" in note
    other = System("sda:2", "Other", ("other",), TextPlan("/etc/fstab", ""), {}, identities=identities)
    assert adapt_efi(restored, (other,), firmware=None, report=silent).notes == ()


class Group:
    """Two GPT disks with a BIOS boot partition each, and a group with the root of a system on both."""

    def __init__(self, folder: Path, *, prefix: str, config: str = "") -> None:
        script = f"label: gpt\nstart=2048,size=2048,type={BIOS_BOOT}\nsize=48M,type={LINUX}\n"
        self.devices, tables = two_disks(folder, script)
        modules = "biosdisk part_gpt lvm mdraid1x ext2 search_fs_uuid"
        self.core = make_core(folder / "core.img", prefix=prefix, modules=modules, config=config)
        tree = folder / "tree"
        images = tree / "boot/grub/i386-pc"
        images.mkdir(parents=True)
        (tree / "etc").mkdir()
        (tree / "etc/fstab").write_text("/dev/mapper/vg0-root / ext4 defaults 0 1\n")
        (tree / "etc/os-release").write_text("ID=fedora\n")
        (images / "core.img").write_bytes(self.core)
        shutil.copy(PC_MODULES / "boot.img", images / "boot.img")
        holder = folder / "holder.img"
        partition(holder, 40 * MIB, f"label: gpt\nsize=32M,type={LINUX}\n")
        table = table_of(holder, "holder")
        make_ext4(holder, table.partitions[0], tree)
        self.devices["vg0/root"] = cut_out(holder, table, 1, folder / "root.img")
        members = tuple(
            PhysicalVolume(space=f"{name}:2", name=name, uuid=f"{name}-0123", data_start=MIB, extents=11)
            for name in ("sda", "sdb")
        )
        volume = LogicalVolume(name="root", uuid=LV, size=32 * MIB, kind="linear")
        group = VolumeGroup(name="vg0", uuid=VG, extent_size=4 * MIB, members=members, volumes=(volume,), metadata="")
        root = FileSystem(on="vg0/root", type="ext4", size=32 * MIB, used=0, block_size=1024, uuid=ROOT_UUID)
        disks = disks_of({name: self.devices[name] for name in ("sda", "sdb")})
        self.layout = Layout(disks=disks, layers=(*tables, raw(1), raw(1, name="sdb"), group, root))

    def adapt(self, firmware: str | None = "bios") -> tuple[list[str], tuple[str, ...]]:
        done = adapt_system(self.layout, self.layout, self.devices, firmware=firmware)
        return [change.path for change in done.changes], done.notes


def test_grub_is_laid_on_every_blank_disk_of_a_group(tmp_path: Path) -> None:
    machine = Group(tmp_path, prefix=f"(lvmid/{VG}/{LV})/boot/grub")
    changes, notes = machine.adapt()
    assert changes == ["sector 0 of sda", "sector 0 of sdb"]
    assert len(notes) == 1
    for name in ("sda", "sdb"):
        with open_disk(machine.devices[name]) as disk:
            assert probe_chain(disk, 0, machine.layout, name).core.prefix == f"(lvmid/{VG}/{LV})/boot/grub"
    assert machine.adapt() == ([], notes)
    place = 2048 * SECTOR + 20 * SECTOR
    with machine.devices["sdb"].open("r+b") as file:
        file.seek(place)
        file.write(bytes(range(256)) * 20)
    assert machine.adapt(None)[0] == ["sector 0 of sdb"]


def test_a_core_that_looks_for_an_array_that_is_no_more_is_told_with_the_command(tmp_path: Path) -> None:
    machine = Group(tmp_path, prefix=f"(lvmid/{VG}/{LV})/boot/grub")
    machine.adapt()
    groups = [layer for layer in machine.layout.layers if isinstance(layer, VolumeGroup)]
    renamed = VolumeGroup(
        name="vg0",
        uuid=f"X{VG[1:]}",
        extent_size=4 * MIB,
        members=groups[0].members,
        volumes=groups[0].volumes,
        metadata="",
    )
    layers = tuple(renamed if layer is groups[0] else layer for layer in machine.layout.layers)
    machine.layout = Layout(disks=machine.layout.disks, layers=layers)
    before = machine.devices["sda"].read_bytes()
    changes, notes = machine.adapt()
    assert changes == []
    (note,) = [note for note in notes if "on sda could not be verified" in note]
    assert f"it looks for its files on (lvmid/{VG}/{LV})/boot/grub" in note
    assert f"vgchange -ay vg0; mount UUID={ROOT_UUID} /mnt; " in note
    assert "chroot /mnt grub2-install DISK" in note
    assert machine.devices["sda"].read_bytes() == before


def test_a_core_that_searches_for_its_file_system_needs_no_array(tmp_path: Path) -> None:
    config = f"search.fs_uuid {ROOT_UUID} root mduuid/{ARRAY}\nset prefix=($root)'/boot/grub'\n"
    machine = Group(tmp_path, prefix=f"(mduuid/{ARRAY})/boot/grub", config=config)
    assert machine.adapt()[0] == ["sector 0 of sda", "sector 0 of sdb"]
    assert machine.adapt()[0] == []


@pytest.mark.parametrize("kept", ["sda", "vg0/root"])
def test_what_was_kept_gets_no_boot_loader(tmp_path: Path, kept: str) -> None:
    machine = Group(tmp_path, prefix=f"(lvmid/{VG}/{LV})/boot/grub")
    before = machine.devices["sda"].read_bytes()
    adapt_system(machine.layout, machine.layout, machine.devices, firmware="bios", kept=[kept])
    assert machine.devices["sda"].read_bytes() == before


def nested(array: MdArray, *names: SpaceId) -> Layout:
    """Return two disks with an array, a table on it, and tables on the named disks."""
    parts = (Partition(number=1, start=MIB, size=MIB, type=ESP, uuid="x"),)
    tables = [
        GptTable(on=name, disk_guid="x", entry_count=128, partitions=parts, protective_mbr=bytes(512))
        for name in (*names, "md/m")
    ]
    return Layout(disks=tuple(Disk(name=name, size=1 << 30) for name in ("sda", "sdb")), layers=(array, *tables))


def test_what_the_firmware_sees_of_arrays() -> None:
    whole = nested(mirror("sda", "sdb"))
    assert find_boot_device(whole, "sda") == find_boot_device(whole, "sdb") == "md/m"
    assert find_partitions(whole, "md/m:1") == ("md/m:1",)
    assert find_partitions(whole, "md/m") == ()
    striped = nested(mirror("sda", "sdb", level="raid0"))
    assert find_boot_device(striped, "sda") == "sda"
    assert find_partitions(striped, "md/m:1") == ()
    inner = nested(mirror("sda:1", "sdb:1"), "sda", "sdb")
    assert find_boot_device(inner, "sda") == "sda"
    assert find_partitions(inner, "md/m") == ("sda:1", "sdb:1")
    assert find_partitions(inner, "md/m:1") == ()
    assert find_partitions(inner, "sda:1") == ("sda:1",)
    assert find_partitions(nested(mirror("sda:1", "sdb:1", offset=MIB), "sda", "sdb"), "md/m") == ()
