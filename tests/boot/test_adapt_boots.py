"""Real firmware starts what adaptation has written: SeaBIOS our core image, OVMF our fallback path."""

from __future__ import annotations

import struct
import subprocess
import uuid
from pathlib import Path

import pytest

from lab.cache import cached
from remetal.adapt import adapt_system
from remetal.adapt.efi import adapt_efi
from remetal.adapt.restored import Restored
from remetal.events import silent
from remetal.layout.model import GptTable, Layer, Layout, MbrTable, Partition
from remetal.system.run import run
from remetal.units import MIB
from remetal.vm.firmware import open_firmware
from remetal.vm.machine import Drive, Machine
from remetal.vm.qemu import start_machine
from tests.adapt_disks import (
    BIOS_BOOT,
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
    sh,
    vfat,
)

pytestmark = pytest.mark.boot

PACKAGES = ("shim-signed", "shim-helpers-amd64-signed", "grub-efi-amd64-signed")
FILES = {
    "shimx64.efi": "usr/lib/shim/shimx64.efi.signed",
    "mmx64.efi": "usr/lib/shim/mmx64.efi.signed",
    "fbx64.efi": "usr/lib/shim/fbx64.efi.signed",
    "grubx64.efi": "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
}
GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
FSTAB = f"UUID={ROOT_UUID} / ext4 defaults 0 1\n"


def signed_loaders() -> dict[str, bytes]:
    """Return the distribution's own signed loaders, fetched once."""

    def build(folder: Path) -> None:
        folder.mkdir()
        subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=folder, check=True, capture_output=True)
        for package in sorted(folder.glob("*.deb")):
            run(["dpkg-deb", "-x", package, folder])
            package.unlink()

    release = run(["apt-cache", "policy", *PACKAGES]).text
    folder = cached("efi-loaders", [line for line in release.splitlines() if "Candidate:" in line], build)
    return {name: (folder / path).read_bytes() for name, path in FILES.items()}


def make_root(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in {"etc/fstab": FSTAB.encode(), "etc/os-release": b"ID=debian\n", **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_a_core_image_that_was_laid_anew_starts_and_finds_its_folder(tmp_path: Path, label: str) -> None:
    disk = tmp_path / "disk.img"
    gpt = label == "gpt"
    bios = f"start=2048,size=2048,type={BIOS_BOOT}\n" if gpt else ""
    partition(disk, 64 * MIB, f"label: {label}\n{bios}start=8192,size=32M,bootable,type={LINUX if gpt else '83'}\n")
    root = 2 if gpt else 1
    volumes: dict[int, Layer] = {root: ext4(root)}
    if gpt:
        volumes[1] = raw(1)
    layout = layout_of(disk, volumes)
    core = make_core(
        tmp_path / "core.img",
        prefix="/boot/grub",
        modules="biosdisk part_gpt part_msdos ext2 search_fs_uuid serial terminal echo cat halt",
        config=(
            "serial --unit=0 --speed=115200\nterminal_output serial\n"
            f"search.fs_uuid {ROOT_UUID} root\ncat /boot/grub/marker\nhalt\n"
        ),
    )
    files = {
        "boot/grub/marker": b"\nGRUB found its root\n",
        "boot/grub/i386-pc/core.img": core,
        "boot/grub/i386-pc/boot.img": (PC_MODULES / "boot.img").read_bytes(),
    }
    make_ext4(disk, partitions_of(layout)[root - 1], make_root(tmp_path / "root", files))
    done = adapt_system(layout, layout, {"sda": disk}, firmware="bios")
    assert [change.path for change in done.changes] == ["sector 0 of sda"]
    with start_machine(Machine(memory=256 * MIB, cpus=1, drives=(Drive(disk),)), tmp_path / "vm") as running:
        running.wait_for("GRUB found its root", timeout=60)


def make_uefi_disk(tmp_path: Path) -> tuple[Path, Layout]:
    """Make a disk whose ESP holds Debian's signed loaders and a GRUB that says where it was started from."""
    disk = tmp_path / "disk.img"
    partition(disk, 96 * MIB, f"label: gpt\nsize=48M,type={ESP}\nsize=16M,type={LINUX}\n")
    layout = layout_of(disk, {1: vfat(1), 2: ext4(2)})
    esp, root = partitions_of(layout)
    files = {f"/EFI/debian/{name}": content for name, content in signed_loaders().items()}
    make_esp(disk, esp, {**files, "/EFI/debian/grub.cfg": b"echo\necho GRUB runs from $cmdpath\nsleep 1\nhalt\n"})
    make_ext4(disk, root, make_root(tmp_path / "root", {}))
    return disk, layout


def partitions_of(layout: Layout) -> tuple[Partition, ...]:
    table = layout.layers[0]
    assert isinstance(table, (GptTable, MbrTable))
    return table.partitions


def test_the_fallback_path_boots_with_secure_boot_and_empty_nvram(tmp_path: Path) -> None:
    disk, layout = make_uefi_disk(tmp_path)
    done = adapt_system(layout, layout, {"sda": disk}, firmware=None)
    assert {change.path for change in done.changes} == {
        f"/EFI/BOOT/{name}" for name in ("BOOTX64.EFI", "grubx64.efi", "mmx64.efi")
    }
    machine = Machine(firmware="uefi", secure_boot=True, memory=512 * MIB, drives=(Drive(disk),), boot="firmware")
    with start_machine(machine, tmp_path / "vm") as running:
        running.wait_for(r"GRUB runs from \S*/EFI/BOOT", timeout=240)


def test_the_firmware_starts_the_entry_that_was_made_for_it(tmp_path: Path) -> None:
    """The variables that adaptation wrote go into a real firmware's store; the fallback path is taken away."""
    disk, layout = make_uefi_disk(tmp_path)
    efivars, folder = tmp_path / "efivars", tmp_path / "vm"
    efivars.mkdir()
    folder.mkdir()
    (efivars / f"Timeout-{GLOBAL}").write_bytes(struct.pack("<IH", 7, 0))
    restored = Restored(source=layout, result=layout, devices={"sda": disk})
    done = adapt_efi(restored, (), firmware="uefi", report=silent, efivars=efivars)
    assert done.changes[-1].path == "NVRAM"
    esp = partitions_of(layout)[0]
    sh("mdeltree", "-i", f"{disk}@@{esp.start}", "::/EFI/BOOT")
    store_variables(open_firmware(folder).variables, efivars)
    machine = Machine(firmware="uefi", memory=512 * MIB, drives=(Drive(disk),), boot="firmware")
    with start_machine(machine, folder) as running:
        running.wait_for(r"GRUB runs from \S*/EFI/debian", timeout=240)


def store_variables(store: Path, efivars: Path) -> None:
    """Append variables as efivarfs shows them to the store of an EDK II firmware.

    Source: EDK II, MdeModulePkg/Include/Guid/VariableFormat.h (authenticated variables).
    """
    data = bytearray(store.read_bytes())
    at = int.from_bytes(data[0x30:0x32], "little") + 28  # the volume's header, then the store's
    header = struct.Struct("<HBBIQ16sIII16s")
    while data[at : at + 2] == b"\xaa\x55":
        fields = header.unpack_from(data, at)
        at += -(-(header.size + fields[7] + fields[8]) // 4) * 4
    for path in sorted(efivars.iterdir()):
        name, _, vendor = path.name.partition("-")
        attributes, content = int.from_bytes(path.read_bytes()[:4], "little"), path.read_bytes()[4:]
        text = f"{name}\0".encode("utf-16-le")
        guid = uuid.UUID(vendor).bytes_le
        record = header.pack(0x55AA, 0x3F, 0, attributes, 0, bytes(16), 0, len(text), len(content), guid)
        record += text + content
        data[at : at + len(record)] = record
        at += -(-len(record) // 4) * 4
    store.write_bytes(data)
