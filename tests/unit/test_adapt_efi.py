"""The EFI system partition: what is copied to the fallback path, and what is left alone. Real FAT, real mtools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from remetal.adapt.change import Adaptation
from remetal.adapt.efi import adapt_efi, choose_vendor, find_vendors, parse_csv_label
from remetal.adapt.fat_files import apply_fat_file, probe_fat, read_fat_file
from remetal.adapt.nvram import probe_entries, probe_order
from remetal.adapt.restored import Restored
from remetal.adapt.roots import System
from remetal.adapt.text import TextPlan
from remetal.errors import RemetalError
from remetal.events import silent
from remetal.layout.model import Layout
from remetal.system.blockdev import Span
from remetal.units import MIB
from tests.adapt_disks import ESP, LINUX, ext4, layout_of, make_esp, partition, sh, vfat

CSV = "shimx64.efi,Debian GNU,,This is the boot entry\n".encode("utf-16")
SHIM = {
    "/EFI/debian/shimx64.efi": b"shim" * 1000,
    "/EFI/debian/grubx64.efi": b"grub" * 9000,
    "/EFI/debian/mmx64.efi": b"mok",
    "/EFI/debian/fbx64.efi": b"fallback",
    "/EFI/debian/BOOTX64.CSV": CSV,
    "/EFI/debian/grub.cfg": b"configfile",
}
DEBIAN = System("sda:2", "Debian", ("debian",), TextPlan("/etc/fstab", ""), {"/": "sda:2", "/boot/efi": "sda:1"})


@dataclass(frozen=True)
class Esp:
    """A disk file with an ESP, its layout, and a folder that stands for efivarfs."""

    disk: Path
    layout: Layout
    efivars: Path

    @property
    def span(self) -> Span:
        _, start, size = self.layout.place("sda:1")
        return Span(self.disk, start, size)

    def adapt(self, *systems: System, firmware: str | None = None) -> Adaptation:
        return adapt_efi(
            Restored(source=self.layout, result=self.layout, devices={"sda": self.disk}),
            systems or (DEBIAN,),
            firmware=firmware,
            report=silent,
            efivars=self.efivars,
        )

    def files(self) -> dict[str, bytes]:
        tree = probe_fat(self.span)
        return {path: read_fat_file(self.span, path) for path in tree.paths if not path.endswith("/")}


def make(tmp_path: Path, files: Mapping[str, bytes], *, kind: str = ESP, label: str = "gpt", size: int = 40) -> Esp:
    disk = tmp_path / "disk.img"
    other = LINUX if label == "gpt" else "83"
    partition(disk, (size + 8) * MIB, f"label: {label}\nstart=2048,size={size}M,type={kind}\nsize=4M,type={other}\n")
    layout = layout_of(disk, {1: vfat(1), 2: ext4(2)})
    table = layout.layers[0]
    make_esp(disk, table.partitions[0], files)  # type: ignore[union-attr]
    efivars = tmp_path / "efivars"
    efivars.mkdir()
    (efivars / "Timeout-8be4df61-93ca-11d2-aa0d-00e098032b8c").write_bytes(bytes(6))
    return Esp(disk, layout, efivars)


def test_shim_is_copied_with_what_it_starts_and_without_fbx64(tmp_path: Path) -> None:
    esp = make(tmp_path, SHIM)
    done = esp.adapt()
    files = esp.files()
    assert files["/EFI/BOOT/BOOTX64.EFI"] == SHIM["/EFI/debian/shimx64.efi"]
    assert files["/EFI/BOOT/grubx64.efi"] == SHIM["/EFI/debian/grubx64.efi"]
    assert files["/EFI/BOOT/mmx64.efi"] == b"mok"
    assert {path for path in files if path.startswith("/EFI/BOOT/")} == {change.path for change in done.changes}
    assert {path: files[path] for path in SHIM} == SHIM
    assert done.bytes_written == 4000 + 36000 + 3
    assert done.notes == ()
    sh("fsck.vfat", "-n", partition_copy(esp, tmp_path))


def partition_copy(esp: Esp, tmp_path: Path) -> Path:
    copy = tmp_path / "esp.img"
    with esp.disk.open("rb") as file:
        file.seek(esp.span.start)
        copy.write_bytes(file.read(esp.span.size))
    return copy


def test_a_second_time_not_a_byte_is_written(tmp_path: Path) -> None:
    esp = make(tmp_path, SHIM)
    esp.adapt(firmware="uefi")
    before = esp.disk.read_bytes(), {each.name: each.stat().st_mtime_ns for each in esp.efivars.iterdir()}
    assert esp.adapt(firmware="uefi") == Adaptation()
    assert (esp.disk.read_bytes(), {each.name: each.stat().st_mtime_ns for each in esp.efivars.iterdir()}) == before


def test_a_lone_grub_is_copied_alone(tmp_path: Path) -> None:
    esp = make(tmp_path, {"/EFI/debian/grubx64.efi": b"grub"})
    esp.adapt()
    assert esp.files() == {"/EFI/debian/grubx64.efi": b"grub", "/EFI/BOOT/BOOTX64.EFI": b"grub"}


@pytest.mark.parametrize("beside", [{}, {"/EFI/BOOT/grubx64.efi": b"mine"}])
def test_another_fallback_is_never_replaced(tmp_path: Path, beside: dict[str, bytes]) -> None:
    files = {**SHIM, "/efi/boot/bootx64.efi": b"windows", **beside}
    esp = make(tmp_path, files)
    before = esp.disk.read_bytes()
    assert esp.adapt() == Adaptation()
    assert esp.disk.read_bytes() == before


def test_a_fallback_shim_without_its_grub_is_completed(tmp_path: Path) -> None:
    esp = make(tmp_path, {**SHIM, "/EFI/BOOT/BOOTX64.EFI": SHIM["/EFI/debian/shimx64.efi"]})
    assert {change.path for change in esp.adapt().changes} == {"/EFI/BOOT/grubx64.efi", "/EFI/BOOT/mmx64.efi"}


def test_a_fallback_shim_with_fbx64_is_left(tmp_path: Path) -> None:
    shim = SHIM["/EFI/debian/shimx64.efi"]
    esp = make(tmp_path, {**SHIM, "/EFI/BOOT/BOOTX64.EFI": shim, "/EFI/BOOT/fbx64.efi": b"fallback"})
    assert esp.adapt() == Adaptation()


def test_the_firmware_gets_the_entry_of_the_distribution(tmp_path: Path) -> None:
    esp = make(tmp_path, SHIM)
    done = esp.adapt(firmware="uefi")
    assert done.changes[-1].path == "NVRAM"
    (entry,) = probe_entries(esp.efivars).values()
    assert entry.label == "Debian GNU"
    assert entry.loader == "\\EFI\\debian\\shimx64.efi"
    assert entry.place is not None
    table = esp.layout.layers[0]
    assert entry.place.signature == table.partitions[0].uuid.lower()  # type: ignore[union-attr]
    assert (entry.place.number, entry.place.start, entry.place.size) == (1, 2048, 40 * 2048)
    assert probe_order(esp.efivars) == (0,)


@pytest.mark.parametrize("firmware", [None, "bios"])
def test_no_entry_where_the_targets_are_not_ours(tmp_path: Path, firmware: str | None) -> None:
    esp = make(tmp_path, SHIM)
    esp.adapt(firmware=firmware)
    assert probe_entries(esp.efivars) == {}


def test_a_firmware_without_variables_is_a_note(tmp_path: Path) -> None:
    esp = make(tmp_path, SHIM)
    for each in esp.efivars.iterdir():
        each.unlink()
    done = esp.adapt(firmware="uefi")
    assert len(done.notes) == 1
    assert "the disk boots through /EFI/BOOT/BOOTX64.EFI" in done.notes[0]
    assert len(done.changes) == 3


def test_an_mbr_disk_has_an_esp_too(tmp_path: Path) -> None:
    esp = make(tmp_path, {"/EFI/debian/grubx64.efi": b"grub"}, kind="ef", label="dos")
    esp.adapt(firmware="uefi")
    (entry,) = probe_entries(esp.efivars).values()
    assert entry.place is not None
    assert entry.place.mbr
    assert "/EFI/BOOT/BOOTX64.EFI" in esp.files()


def test_an_esp_of_the_wrong_type_is_known_by_its_mount_point(tmp_path: Path) -> None:
    esp = make(tmp_path, {"/EFI/debian/grubx64.efi": b"grub"}, kind=LINUX)
    assert len(esp.adapt().changes) == 1


def test_an_esp_without_a_known_loader_is_left_with_a_note(tmp_path: Path) -> None:
    esp = make(tmp_path, {})
    before = esp.disk.read_bytes()
    done = esp.adapt(firmware="uefi")
    assert (done.changes, len(done.notes)) == ((), 1)
    assert esp.disk.read_bytes() == before


def test_a_full_esp_is_a_note_and_the_entry_is_made_all_the_same(tmp_path: Path) -> None:
    big = {"/EFI/debian/grubx64.efi": b"x" * (22 * MIB)}
    esp = make(tmp_path, big)
    done = esp.adapt(firmware="uefi")
    assert "no room for /EFI/BOOT/BOOTX64.EFI" in done.notes[0]
    assert [change.path for change in done.changes] == ["NVRAM"]
    assert esp.files() == big


def test_an_esp_that_is_no_fat_is_a_note_or_an_error(tmp_path: Path) -> None:
    esp = make(tmp_path, SHIM)
    with esp.disk.open("r+b") as file:
        file.seek(esp.span.start)
        file.write(bytes(MIB))
    assert "cannot be read" in esp.adapt().notes[0]
    with pytest.raises(RemetalError):
        esp.adapt(firmware="uefi")


def test_uefi_without_an_esp_is_a_note(tmp_path: Path) -> None:
    esp = make(tmp_path, {})
    layout = layout_of(esp.disk, {2: ext4(2)})
    restored = Restored(source=layout, result=layout, devices={"sda": esp.disk})
    done = adapt_efi(restored, (DEBIAN,), firmware="uefi", report=silent, efivars=esp.efivars)
    assert "no EFI system partition" in done.notes[0]


def test_the_systems_own_folder_is_preferred(tmp_path: Path) -> None:
    files = {f"/EFI/{name}/grubx64.efi": name.encode() for name in ("arch", "redhat", "ubuntu")}
    esp = make(tmp_path, {**files, "/EFI/half/shimx64.efi": b"no grub", "/EFI/BOOT/x": b""})
    vendors = find_vendors(probe_fat(esp.span))
    assert [vendor.name for vendor in vendors] == ["arch", "redhat", "ubuntu"]
    mint = System("sda:2", "Mint", ("linuxmint", "ubuntu", "debian"), TextPlan("/etc/fstab", ""), {})
    rhel = System("sda:2", "RHEL", ("rhel", "fedora"), TextPlan("/etc/fstab", ""), {})
    chosen = [choose_vendor(vendors, [each]) for each in (mint, rhel, DEBIAN)]
    assert [vendor and vendor.name for vendor in chosen] == ["ubuntu", "redhat", "arch"]
    assert choose_vendor([], [DEBIAN]) is None


def test_csv_labels() -> None:
    assert parse_csv_label(CSV, "SHIMX64.EFI") == "Debian GNU"
    assert parse_csv_label("grubx64.efi,x,,\n".encode("utf-16-le"), "grubx64.efi") == "x"
    assert parse_csv_label(CSV, "grubx64.efi") is None
    assert parse_csv_label(b"\xff\xfe\x00", "x") is None
    assert parse_csv_label(b"", "x") is None


def test_fat_files_of_any_name_and_an_empty_tree(tmp_path: Path) -> None:
    esp = make(tmp_path, {})
    tree = probe_fat(esp.span)
    assert tree.paths == ()
    tree = apply_fat_file(tree, "/EFI/Ein langer Name mit ü/datei.bin", b"inhalt")
    tree = apply_fat_file(tree, "/EFI/Ein langer Name mit ü/datei.bin", b"neu")
    assert sorted(tree.paths) == sorted(probe_fat(esp.span).paths)
    assert tree.find("/efi/EIN LANGER NAME MIT Ü/DATEI.BIN") is not None
    assert esp.files() == {"/EFI/Ein langer Name mit ü/datei.bin": b"neu"}
