"""The devices that the recorded machines share, and short ways to write them down."""

from __future__ import annotations

from typing import Any

from remetal.layout.model import Nic
from remetal.units import MIB
from tests.machines.parts import Content, Drive, Machine, Part, Table, fs, raw

ACTIVE = 0x80
REQUIRED, NO_LETTER = 1, 1 << 63
GB_120, GB_480, GB_500, GB_512 = 120034123776, 480103981056, 500107862016, 512110190592
TB_1, TB_2, TB_4, TB_12 = 1000204886016, 2000398934016, 4000787030016, 12000138625024
TRACK = 63 * 512

AHCI = "pci:v00008086d0000A352sv000017AAsd00002292bc01sc06i01"
HPSA = "pci:v0000103Cd00003239sv0000103Csd000021C0bc01sc04i00"
MEGARAID = "pci:v00001000d00000016sv00001028sd00001FD4bc01sc04i00"
MPT3SAS = "pci:v00001000d000000C4sv00001000sd00003190bc01sc07i00"
NVME = "pci:v0000144Dd0000A808sv0000144Dsd0000A801bc01sc08i02"
PIIX = "pci:v00008086d00007111sv00000000sd00000000bc01sc01i8A"
PVSCSI = "pci:v000015ADd000007C0sv000015ADsd000007C0bc01sc07i00"
QLA2XXX = "pci:v00001077d00002261sv00001590sd000000F9bc0Csc04i00"
VIRTIO_BLK = "virtio:d00000002v00001AF4"
VIRTIO_SCSI = "virtio:d00000008v00001AF4"
VMBUS = "vmbus:d96361baa104294db60572e2ffb1dc7f"


def nic(name: str, mac: str, driver: str, place: str = "0000:00:1f.6") -> Nic:
    """One network interface."""
    return Nic(name=name, mac=mac, driver=driver, place=place)


def esp(size: int = 512 * MIB, label: str = "") -> Part:
    """An EFI system partition as Linux installers make it."""
    return Part(size, "esp", fs("vfat", label, 0.05), "EFI System Partition")


def windows(size: int, content: Content) -> tuple[Part, ...]:
    """What Windows Setup makes of a GPT disk; the recovery environment comes behind it."""
    return (
        Part(260 * MIB, "esp", fs("vfat", "SYSTEM", 0.3), "EFI system partition", attributes=NO_LETTER),
        Part(16 * MIB, "msr", raw(), "Microsoft reserved partition", attributes=NO_LETTER),
        Part(size, "windows", content, "Basic data partition"),
    )


WINRE = Part(990 * MIB, "recovery", fs("ntfs", "", 0.7), "", attributes=REQUIRED | NO_LETTER)
BIOS_BOOT = Part(MIB, "bios", raw())


def disk(
    name: str,
    via: str,
    size: int,
    words: str = "",
    holds: Table | Content | None = None,
    *,
    logical: int = 512,
    physical: int = 0,
    parts: tuple[Drive, ...] = (),
) -> Drive:
    """A disk with `MODEL | SERIAL | WORLD-WIDE NAME`, each of which may be empty.

    An NVMe disk that has no name of its own (`nvme:VENDOR`) gets the one that the kernel makes for it.
    """
    model, serial, wwn = (each.strip() for each in f"{words} | | ".split("|")[:3])
    if wwn.startswith("nvme:"):
        wwn = f"nvme.{wwn[5:]}-{serial.encode().hex()}-{model.encode().hex()}-00000001"
    return Drive(name, size, via, model, serial, wwn, holds, logical, physical or logical, parts)


def machine(name: str, about: str, box: str, *disks: Drive, **more: Any) -> Machine:
    """A machine whose `box` says `VENDOR | PRODUCT | PROCESSOR`."""
    vendor, product, cpu = (each.strip() for each in f"{box} | | ".split("|")[:3])
    return Machine(name, about, disks, vendor=vendor, product=product, cpu=cpu, **more)


def sas(index: int, size: int, holds: Table | Content | None, model: str = "HUH721212AL5200") -> Drive:
    """One of many disks on a host bus adapter."""
    wwn = f"naa.5000cca2{index:02x}b1c2d0"
    return Drive(f"sd{chr(97 + index)}", size, "sas", model, f"2CGABX{index:02}", wwn, holds, physical=4096)


def san(name: str, size: int, wwn: str, holds: Table | Content | None, *paths: str) -> Drive:
    """A disk of a storage area network, which several paths lead to."""
    parts = tuple(Drive(path, size, "fc", "VRAID", "CKM00184200541", wwn) for path in paths)
    return Drive(name, size, "multipath", "VRAID", "CKM00184200541", wwn, holds, parts=parts)
