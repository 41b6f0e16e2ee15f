"""A machine's description becomes QEMU's command line; screens become PNG; firmware is found and kept."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest

from remetal.errors import RefusedError
from remetal.system.run import ProgramMissingError
from remetal.units import MIB
from remetal.vm import firmware
from remetal.vm.machine import Bus, DirectBoot, Drive, Firmware, Machine, Nic, plan_argv
from remetal.vm.qemu import start_machine
from remetal.vm.screenshot import encode_png


def argv_of(machine: Machine) -> list[str]:
    uefi = Firmware(Path("/fw/code.fd"), Path("/vm/vars.fd")) if machine.firmware == "uefi" else None
    return plan_argv(machine, ("-accel", "tcg"), uefi, 7, 8)


def values(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


def nodes(argv: list[str]) -> dict[str, dict[str, object]]:
    described = [json.loads(text) for text in values(argv, "-blockdev")]
    return {node["node-name"]: node for node in described}


def test_a_plain_machine_has_no_network_and_no_defaults() -> None:
    argv = argv_of(Machine(memory=768 * MIB, cpus=3))
    assert "-nodefaults" in argv
    assert values(argv, "-m") == ["768M"]
    assert values(argv, "-smp") == ["3"]
    assert values(argv, "-netdev") == []
    assert values(argv, "-machine") == ["q35"]
    assert values(argv, "-blockdev") == []
    assert values(argv, "-accel") == ["tcg"]


def test_the_serial_console_and_the_monitor_speak_on_inherited_sockets() -> None:
    assert values(argv_of(Machine()), "-chardev") == ["socket,id=serial,fd=7", "socket,id=qmp,fd=8"]


@pytest.mark.parametrize(
    ("bus", "device"),
    [
        ("virtio", "virtio-blk-pci,drive=drive0,serial=S1,bootindex=0"),
        ("ahci", "ide-hd,bus=ide.0,drive=drive0,serial=S1,bootindex=0"),
        ("nvme", "nvme,drive=drive0,serial=S1,bootindex=0"),
        ("scsi", "scsi-hd,bus=scsi.0,drive=drive0,serial=S1,bootindex=0"),
        ("usb", "usb-storage,bus=usb.0,drive=drive0,serial=S1,bootindex=0"),
    ],
)
def test_every_bus(bus: Bus, device: str) -> None:
    drive = Drive(Path("/d,1.img"), "qcow2", bus, "S1", read_only=True, durable=False)
    argv = argv_of(Machine(drives=(drive,)))
    devices = values(argv, "-device")
    assert device in devices
    controllers = {"scsi": "virtio-scsi-pci,id=scsi", "usb": "qemu-xhci,id=usb"}
    if bus in controllers:
        assert devices.index(controllers[bus]) < devices.index(device)
    node = nodes(argv)["drive0"]
    assert node["driver"] == "qcow2"
    assert node["read-only"] is True
    assert node["cache"] == {"direct": False, "no-flush": True}
    file = node["file"]
    assert isinstance(file, dict)
    assert file["filename"] == "/d,1.img"


def test_where_the_firmware_looks_first() -> None:
    drives = (Drive(Path("/a")), Drive(Path("/b"), bus="ahci"), Drive(Path("/c"), bus="ahci"))
    found = {}
    for boot in ("disk", "cdrom", "firmware"):
        argv = argv_of(Machine(drives=drives, cdrom=Path("/cd.iso"), boot=boot))
        found[boot] = [each.partition(",bootindex=")[2] for each in values(argv, "-device") if "drive=" in each]
    assert found == {"disk": ["0", "1", "2", "3"], "cdrom": ["1", "2", "3", "0"], "firmware": ["", "", "", ""]}
    ports = [each for each in values(argv_of(Machine(drives=drives, cdrom=Path("/cd"))), "-device") if "ide" in each]
    assert [port.split(",")[1] for port in ports] == ["bus=ide.0", "bus=ide.1", "bus=ide.5"]


def test_uefi_and_secure_boot() -> None:
    plain = argv_of(Machine(firmware="uefi"))
    assert values(plain, "-machine") == ["q35,pflash0=firmware,pflash1=variables"]
    assert nodes(plain)["firmware"]["read-only"] is True
    assert nodes(plain)["variables"]["read-only"] is False
    assert "-global" not in plain
    secure = argv_of(Machine(firmware="uefi", secure_boot=True))
    assert values(secure, "-machine") == ["q35,smm=on,pflash0=firmware,pflash1=variables"]
    assert values(secure, "-global") == ["driver=cfi.pflash01,property=secure,value=on"]


def test_nics_are_restricted_unless_asked() -> None:
    argv = argv_of(Machine(nics=(Nic(), Nic("e1000e", mac="52:54:00:00:00:01", restricted=False))))
    assert values(argv, "-netdev") == ["user,id=net0,restrict=on", "user,id=net1,restrict=off"]
    devices = values(argv, "-device")
    assert "virtio-net-pci,netdev=net0,mac=52:54:00:72:6d:00,romfile=" in devices
    assert "e1000e,netdev=net1,mac=52:54:00:00:00:01,romfile=" in devices


def test_direct_boot() -> None:
    argv = argv_of(Machine(direct_boot=DirectBoot(Path("/k"), Path("/i"), "quiet console=ttyS0")))
    assert argv[-6:] == ["-kernel", "/k", "-initrd", "/i", "-append", "quiet console=ttyS0"]


def test_impossible_machines_are_refused_before_qemu_starts(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    for machine, reason in (
        (Machine(drives=(Drive(tmp_path / "none"),)), "none is not a readable file"),
        (Machine(drives=(Drive(disk, bus="ahci"),) * 6), "5 AHCI disks"),
        (Machine(secure_boot=True), "needs UEFI"),
    ):
        with pytest.raises(RefusedError, match=reason), start_machine(machine, tmp_path / "vm"):
            pass
    assert not (tmp_path / "vm").exists()


def test_uefi_variables_outlive_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = tmp_path / "store", tmp_path / "vm"
    store.mkdir()
    folder.mkdir()
    (store / "OVMF_CODE_4M.fd").write_bytes(b"code")
    (store / "OVMF_VARS_4M.fd").write_bytes(b"template")
    monkeypatch.setattr(firmware, "FOLDERS", (tmp_path / "absent", store))
    first = firmware.open_firmware(folder)
    assert first.code == store / "OVMF_CODE_4M.fd"
    assert first.variables.read_bytes() == b"template"
    first.variables.write_bytes(b"an entry was added")
    assert firmware.open_firmware(folder).variables.read_bytes() == b"an entry was added"
    assert (store / "OVMF_VARS_4M.fd").read_bytes() == b"template"
    with pytest.raises(ProgramMissingError, match="Secure Boot"):
        firmware.open_firmware(folder, secure_boot=True)


def test_a_screen_becomes_a_png() -> None:
    pixels = bytes(range(3 * 2 * 3))
    png = encode_png(b"P6\n2 3\n255\n" + pixels)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        body = png[at + 4 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size]) == (zlib.crc32(body),)
        chunks[body[:4]] = body[4:]
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert chunks[b"IHDR"] == struct.pack(">IIBBBBB", 2, 3, 8, 2, 0, 0, 0)
    rows = zlib.decompress(chunks[b"IDAT"])
    assert [rows[row * 7 + 1 : row * 7 + 7] for row in range(3)] == [pixels[0:6], pixels[6:12], pixels[12:18]]
    assert rows[0::7] == b"\0\0\0"


@pytest.mark.parametrize(
    "bad", [b"", b"P5\n1 1\n255\n\0", b"P6\n2 2\n255\n\0", b"P6\n0 0\n255\n", b"P6\n1 1\n65535\n" + b"\0" * 6]
)
def test_what_is_no_screen_is_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match="PPM"):
        encode_png(bad)
