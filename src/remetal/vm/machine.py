"""What a virtual machine is made of, and the QEMU command line that makes it so. Pure.

Source: qemu-system-x86_64(1), QEMU's QAPI reference for blockdev-add.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from remetal.units import MIB

Bus: TypeAlias = Literal["virtio", "ahci", "nvme", "scsi", "usb"]
BootFrom: TypeAlias = Literal["disk", "cdrom", "firmware"]

AHCI_PORTS = 6
"""How many SATA disks and CD drives the q35 chipset takes."""


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk of the machine: a file, and how the guest sees it.

    With `durable` off, the guest's flushes are not passed on: much faster, and lost if this host loses power.
    """

    path: Path
    format: Literal["raw", "qcow2"] = "raw"
    bus: Bus = "virtio"
    serial: str = ""
    read_only: bool = False
    durable: bool = True


@dataclass(frozen=True, slots=True)
class Nic:
    """A network interface behind a network of its own; `restricted` keeps it from reaching beyond this host.

    `forwards` are ports of this host's loopback, each with the guest's that it leads to; the guest is 10.0.2.15.
    """

    model: str = "virtio-net-pci"
    mac: str = ""
    restricted: bool = True
    forwards: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class DirectBoot:
    """A kernel that QEMU itself loads, without any boot loader."""

    kernel: Path
    initrd: Path | None = None
    append: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """A virtual PC. `memory` is in bytes.

    `boot` says where the firmware looks first: the disks in their order, the CD, or what its own settings
    (UEFI: the boot entries in NVRAM) say. `secure_boot` needs UEFI and comes with the usual vendor keys enrolled.
    """

    firmware: Literal["bios", "uefi"] = "bios"
    memory: int = 1024 * MIB
    cpus: int = 2
    drives: tuple[Drive, ...] = ()
    cdrom: Path | None = None
    boot: BootFrom = "disk"
    nics: tuple[Nic, ...] = ()
    direct_boot: DirectBoot | None = None
    secure_boot: bool = False


@dataclass(frozen=True, slots=True)
class Firmware:
    """A UEFI firmware: its code, and the file that holds this machine's variables."""

    code: Path
    variables: Path


def plan_argv(
    machine: Machine,
    accelerator: tuple[str, ...],
    firmware: Firmware | None,
    serial: int,
    qmp: int,
) -> list[str]:
    """Return the command that runs the machine.

    `accelerator` are QEMU's options for it, `firmware` is needed for UEFI. The serial console is on the
    inherited socket `serial`, the monitor on the inherited socket `qmp`.
    """
    chipset = "q35,smm=on" if machine.secure_boot else "q35"
    argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-name", "remetal", *accelerator]
    argv += ["-smp", str(machine.cpus), "-m", f"{machine.memory // MIB}M", "-display", "none", "-vga", "std"]
    argv += ["-rtc", "base=utc", "-device", "virtio-rng-pci", "-device", "pvpanic"]
    argv += ["-chardev", f"socket,id=serial,fd={serial}", "-serial", "chardev:serial"]
    argv += ["-chardev", f"socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control"]
    if machine.firmware == "uefi":
        assert firmware is not None, "a UEFI machine comes with a firmware"
        chipset += ",pflash0=firmware,pflash1=variables"
        argv += [*_blockdev("firmware", firmware.code, read_only=True), *_blockdev("variables", firmware.variables)]
        if machine.secure_boot:
            argv += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    argv += ["-machine", chipset]
    argv += [*_drive_argv(machine), *_nic_argv(machine)]
    if machine.direct_boot is not None:
        argv += _direct_argv(machine.direct_boot)
    return argv


def _drive_argv(machine: Machine) -> Iterator[str]:
    buses = {drive.bus for drive in machine.drives}
    if "scsi" in buses:
        yield from ("-device", "virtio-scsi-pci,id=scsi")
    if "usb" in buses:
        yield from ("-device", "qemu-xhci,id=usb")
    first_disk = 1 if machine.boot == "cdrom" else 0
    port = 0
    for index, drive in enumerate(machine.drives):
        name = f"drive{index}"
        yield from _blockdev(name, drive.path, layer=drive.format, read_only=drive.read_only, durable=drive.durable)
        device = {
            "virtio": "virtio-blk-pci",
            "ahci": f"ide-hd,bus=ide.{port}",
            "nvme": "nvme",
            "scsi": "scsi-hd,bus=scsi.0",
            "usb": "usb-storage,bus=usb.0",
        }[drive.bus]
        port += drive.bus == "ahci"
        serial = drive.serial or (name if drive.bus == "nvme" else "")
        order = "" if machine.boot == "firmware" else f",bootindex={first_disk + index}"
        yield from ("-device", f"{device},drive={name}{f',serial={_quote(serial)}' if serial else ''}{order}")
    if machine.cdrom is not None:
        yield from _blockdev("cdrom", machine.cdrom, read_only=True)
        place = {"cdrom": ",bootindex=0", "disk": f",bootindex={len(machine.drives)}", "firmware": ""}[machine.boot]
        yield from ("-device", f"ide-cd,bus=ide.{AHCI_PORTS - 1},drive=cdrom{place}")


def _nic_argv(machine: Machine) -> Iterator[str]:
    for index, nic in enumerate(machine.nics):
        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{there}" for here, there in nic.forwards)
        yield from ("-netdev", f"user,id=net{index},restrict={'on' if nic.restricted else 'off'}{forwards}")
        mac = nic.mac or f"52:54:00:72:6d:{index:02x}"
        # Without an option ROM, a firmware does not waste time on looking for something to boot from the network.
        yield from ("-device", f"{nic.model},netdev=net{index},mac={mac},romfile=")


def _direct_argv(direct: DirectBoot) -> Iterator[str]:
    yield from ("-kernel", str(direct.kernel))
    if direct.initrd is not None:
        yield from ("-initrd", str(direct.initrd))
    if direct.append:
        yield from ("-append", direct.append)


def _blockdev(
    name: str, path: Path, *, layer: str = "raw", read_only: bool = False, durable: bool = True
) -> tuple[str, str]:
    cache = {"direct": False, "no-flush": not durable}
    description = {
        "node-name": name,
        "driver": layer,
        "read-only": read_only,
        "discard": "unmap",
        "cache": cache,
        "file": {"driver": "file", "filename": str(path), "discard": "unmap", "cache": cache},
    }
    return "-blockdev", json.dumps(description)


def _quote(value: str) -> str:
    """Write a value as QEMU's comma-separated options want it."""
    return value.replace(",", ",,")
