"""What the kernel would show of a machine in sysfs and procfs, as a tree that `record.rebuild` makes anew.

This is the raw output that probing reads: paths as the drivers make them, model names padded to 16 characters, serial
numbers in vital product data pages with ATA's padding. Sources: the kernel's Documentation/ABI, SPC-4, SAT-4, and the
machines recorded in tests/machines/raw.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from remetal.layout.model import Nic
from tests.machines.parts import Drive, Machine
from tests.machines.record import Node

_CONTROLLERS = {
    "ata": "pci0000:00/0000:00:17.0",
    "sas": "pci0000:17/0000:17:00.0/0000:18:00.0",
    "raid": "pci0000:17/0000:17:00.0/0000:18:00.0",
    "fc": "pci0000:3a/0000:3a:00.0/0000:3b:00.{port}",
    "scsi": "pci0000:00/0000:00:15.0/0000:03:00.0",
    "vmbus": "LNXSYSTM:00/LNXSYBUS:00/ACPI0004:00/VMBUS:00/f8b3781a-1e82-4818-a1c3-63d806ec15bb",
    "usb": "pci0000:00/0000:00:14.0/usb2/2-{unit}/2-{unit}:1.0",
    "nvme": "pci0000:00/0000:00:1d.0/0000:0{unit}:00.0",
    "mmc": "platform/soc/fe340000.mmc",
    "virtio": "pci0000:00/0000:00:0{unit}.0/virtio{unit}",
}
"""Where a disk's controller is, below /sys/devices."""


def tree_of(machine: Machine) -> dict[str, Node]:
    """Return the files, folders and links of a machine's sysfs and procfs that matter to a probe."""
    found: dict[str, Node] = {
        "proc/cpuinfo": "".join(_processor(machine, number) for number in range(machine.cores)),
        "proc/meminfo": f"MemTotal:       {machine.memory // 1024} kB\nMemFree:         1024 kB\n",
        "proc/sys/kernel/osrelease": f"{machine.kernel}\n",
        "sys/class/net/lo": ["->", "../../devices/virtual/net/lo"],
        "sys/devices/virtual/net/lo/address": "00:00:00:00:00:00\n",
    }
    if machine.firmware == "uefi":
        found["sys/firmware/efi"] = None
    if machine.vendor:
        dmi = {
            "sys_vendor": machine.vendor,
            "product_name": machine.product,
            "product_serial": f"SN-{machine.name}".upper(),
        }
        found |= {f"sys/class/dmi/id/{name}": f"{text}\n" for name, text in dmi.items()}
    for index, alias in enumerate(machine.modaliases):
        found[f"sys/devices/platform/device.{index}/modalias"] = f"{alias}\n"
    for nic in machine.nics:
        found |= _nic(nic)
    for unit, drive in enumerate(machine.drives, 1):
        found |= _drive(drive, unit)
    for name in machine.others:
        found |= _other(name)
    return found


def _processor(machine: Machine, number: int) -> str:
    named = {"x86_64": "model name\t: ", "aarch64": "Model\t\t: "}[machine.architecture]
    more = f"{named}{machine.cpu}" if machine.cpu else "BogoMIPS\t: 50.00"
    return f"processor\t: {number}\n{more}\n\n"


def _nic(nic: Nic) -> dict[str, Node]:
    folder = f"sys/devices/pci0000:00/{nic.place}"
    return {
        f"sys/class/net/{nic.name}": ["->", f"../../devices/pci0000:00/{nic.place}/net/{nic.name}"],
        f"{folder}/net/{nic.name}/address": f"{nic.mac}\n",
        f"{folder}/net/{nic.name}/device": ["->", f"../../../{nic.place}"],
        f"{folder}/driver": ["->", f"../../../bus/pci/drivers/{nic.driver}"],
        f"sys/bus/pci/drivers/{nic.driver}": None,
    }


def _block(drive: Drive, place: str, *, hidden: bool = False) -> dict[str, Node]:
    """Return what every block device has, at its place below /sys/devices."""
    folder = f"sys/devices/{place}"
    return {
        f"sys/block/{PurePosixPath(place).name}": ["->", f"../devices/{place}"],
        f"{folder}/size": f"{drive.size // 512}\n",
        f"{folder}/hidden": f"{int(hidden)}\n",
        f"{folder}/queue/logical_block_size": f"{drive.logical}\n",
        f"{folder}/queue/physical_block_size": f"{drive.physical}\n",
    }


def _drive(drive: Drive, unit: int) -> dict[str, Node]:
    match drive.via:
        case "multipath" | "imsm":
            return _made_of_parts(drive, unit)
        case "nvme":
            return _nvme(drive, unit)
        case "mmc":
            return _mmc(drive, unit)
        case "virtio":
            folder = _CONTROLLERS["virtio"].format(unit=unit)
            block = f"{folder}/block/{drive.name}"
            return {**_block(drive, block), f"sys/devices/{block}/serial": drive.serial, **_link(block, folder)}
        case "xen":
            folder = f"vbd-{51712 + 16 * (unit - 1)}"
            block = f"{folder}/block/{drive.name}"
            return {**_block(drive, block), **_link(block, folder)}
        case _:
            return _scsi(drive, _scsi_place(drive, unit))


def _scsi_place(drive: Drive, unit: int, port: int = 0) -> str:
    """Return the folder of a SCSI device below /sys/devices, as its transport makes it."""
    controller = _CONTROLLERS[drive.via].format(unit=unit, port=port)
    match drive.via:
        case "ata":
            return f"{controller}/ata{unit}/host{unit}/target{unit}:0:0/{unit}:0:0:0"
        case "sas":
            return f"{controller}/host0/port-0:{unit}/end_device-0:{unit}/target0:0:{unit}/0:0:{unit}:0"
        case "raid":
            return f"{controller}/host0/target0:2:{unit}/0:2:{unit}:0"
        case "fc":
            return f"{controller}/host{port}/rport-{port}:0-0/target{port}:0:0/{port}:0:0:{unit}"
        case _:
            return f"{controller}/host{unit}/target{unit}:0:0/{unit}:0:0:0"


def _scsi(drive: Drive, folder: str) -> dict[str, Node]:
    block = f"{folder}/block/{drive.name}"
    anonymous = f"t10.ATA     {drive.model:40}{drive.serial}\n" if drive.via == "ata" else ""
    found: dict[str, Node] = {
        **_block(drive, block),
        **_link(block, folder),
        f"sys/devices/{folder}/model": f"{drive.model:16}\n",
        f"sys/devices/{folder}/wwid": f"{drive.wwn}\n" if drive.wwn else anonymous,
    }
    if drive.via == "usb":
        device = str(PurePosixPath(_CONTROLLERS["usb"].format(unit=_unit_of(folder))).parent)
        found |= {f"sys/devices/{device}/idVendor": "0bc2\n", f"sys/devices/{device}/serial": f"{drive.serial}\n"}
    elif drive.serial:
        padded = f"{drive.serial:>20}" if drive.via == "ata" else drive.serial
        page = b"\x00\x80" + len(padded).to_bytes(2, "big") + padded.encode()
        found[f"sys/devices/{folder}/vpd_pg80"] = ["hex", page.hex()]
    return found


def _unit_of(folder: str) -> str:
    found = re.search(r"/2-(\d+)/", folder)
    assert found is not None
    return found[1]


def _nvme(drive: Drive, unit: int) -> dict[str, Node]:
    """A namespace of a controller; with native multipath (`parts`) of a subsystem, whose paths are hidden."""
    controller = f"nvme{unit - 1}"
    attributes = {"model": f"{drive.model:40}\n", "serial": f"{drive.serial:20}\n"}
    folder = f"{_CONTROLLERS['nvme'].format(unit=unit)}/nvme/{controller}"
    if not drive.parts:
        block = f"{folder}/{drive.name}"
        found = _block(drive, block)
    else:
        folder = f"virtual/nvme-subsystem/nvme-subsys{unit - 1}"
        block = f"{folder}/{drive.name}"
        found = _block(drive, block)
        for port, part in enumerate(drive.parts):
            place = f"{_CONTROLLERS['nvme'].format(unit=unit)}/nvme/nvme{port}/{part.name}"
            found |= _block(part, place, hidden=True)
    found |= {f"sys/devices/{folder}/{name}": text for name, text in attributes.items()}
    return {**found, **_link(block, folder), f"sys/devices/{block}/wwid": f"{drive.wwn}\n"}


def _mmc(drive: Drive, unit: int) -> dict[str, Node]:
    """A memory card, or an eMMC, which has boot areas as block devices of their own."""
    folder = f"{_CONTROLLERS['mmc']}/mmc_host/mmc{unit - 1}/mmc{unit - 1}:0001"
    block = f"{folder}/block/{drive.name}"
    found: dict[str, Node] = {
        **_block(drive, block),
        **_link(block, folder),
        f"sys/devices/{folder}/name": f"{drive.model}\n",
        f"sys/devices/{folder}/serial": f"{drive.serial}\n",
    }
    for part in drive.parts:
        found |= _block(part, f"{block}/{part.name}")
    return found


def _made_of_parts(drive: Drive, unit: int) -> dict[str, Node]:
    """A multipath device with its paths, or a volume of an Intel RAID with its members and its container."""
    found: dict[str, Node] = {}
    kernel_name = f"dm-{unit}" if drive.via == "multipath" else drive.name
    block = f"virtual/block/{kernel_name}"
    for port, part in enumerate(drive.parts, 1):
        place = _scsi_place(part, unit if part.via == "fc" else 10 * unit + port, port)
        found |= _scsi(part, place)
        up = "../" * (block.count("/") + 2)
        found[f"sys/devices/{block}/slaves/{part.name}"] = ["->", f"{up}{place}/block/{part.name}"]
    found |= _block(drive, block)
    if drive.via == "multipath":
        found |= {
            f"sys/devices/{block}/dm/uuid": f"mpath-3{drive.wwn.removeprefix('naa.')}\n",
            f"sys/devices/{block}/dm/name": f"{drive.name}\n",
        }
        return found
    container = Drive("md127", 0, "imsm")
    found |= _block(container, "virtual/block/md127")
    return {
        **found,
        f"sys/devices/{block}/md/level": "raid1\n",
        f"sys/devices/{block}/md/metadata_version": f"external:/{container.name}/0\n",
        f"sys/devices/virtual/block/{container.name}/md/metadata_version": "external:imsm\n",
    }


def _other(name: str) -> dict[str, Node]:
    """A block device that is no disk."""
    size = 64 << 20
    real = {
        "sr0": "pci0000:00/0000:00:17.0/ata9/host9/target9:0:0/9:0:0:0/block/sr0",
        "fd0": "platform/floppy.0/block/fd0",
    }
    return _block(Drive(name, size, ""), real.get(name, f"virtual/block/{name}"))


def _link(block: str, device: str) -> dict[str, Node]:
    """Return the link from a block device to the device that it belongs to."""
    up = "../" * (len(PurePosixPath(block).relative_to(device).parts) + 1)
    return {f"sys/devices/{block}/device": ["->", f"{up}{PurePosixPath(device).name}"]}
