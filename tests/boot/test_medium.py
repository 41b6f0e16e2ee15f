"""The recovery medium: what is on it, and that it boots everywhere a person may put it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from remetal.media.build import Medium
from remetal.media.iso import LABEL
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from remetal.vm.machine import Drive, Machine
from remetal.vm.qemu import Running, start_machine
from tests.boot.conftest import LostMachine

pytestmark = pytest.mark.boot

MENU = r"6  Power off\s+> "
PROMPT = r"recovery:\S*# "
PATIENCE = 240
"""Seconds from power-on to the recovery prompt that a busy host may take; a quiet one takes 40."""


def run_there(running: Running, command: str) -> str:
    """Run a command in the medium's shell on the serial console and return what it printed."""
    running.send(f"echo BEG''IN; {command}; echo E''ND $?\n")
    said = running.wait_for(r"BEGIN\r?\n([\s\S]*?)END +(\d+)\r?\n", 60)
    assert int(said[2]) == 0, f"{command} failed: {said[1]}"
    running.wait_for(PROMPT, 30)
    return said[1].strip()


def power_off(running: Running, command: str) -> None:
    """Type what powers the machine off, and wait until it is."""
    running.send(f"{command}\n")
    running.wait_for(r"reboot: Power down", 60)
    running.wait_for_shutdown(60)


def test_the_iso_has_a_boot_path_for_each_firmware(medium: Medium, tmp_path: Path) -> None:
    assert medium.size <= 350 * MIB
    report = subprocess.run(
        ["xorriso", "-indev", medium.path, "-report_el_torito", "plain", "-pvd_info"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert f"Volume Id    : {LABEL}" in report
    images = [line.split() for line in report.splitlines() if line.startswith("El Torito boot img :")]
    assert [words[6] for words in images] == ["BIOS", "UEFI"]

    table = subprocess.run(["sfdisk", "--dump", medium.path], check=True, capture_output=True, text=True).stdout
    assert "label: gpt" in table
    assert "C12A7328-F81F-11D2-BA4B-00A0C93EC93B" in table
    start = medium.path.read_bytes()[:512]
    assert start[510:] == b"\x55\xaa"
    assert any(start[446 + 16 * number] == 0x80 for number in range(4)), "some BIOSes start no disk that is not active"

    names = {
        line.strip("'")
        for line in subprocess.run(
            ["xorriso", "-indev", medium.path, "-find", "/", "-type", "f"], check=True, capture_output=True, text=True
        ).stdout.splitlines()
    }
    assert {"/remetal/vmlinuz", "/remetal/initrd.img", "/boot/grub/grub.cfg", "/EFI/BOOT/BOOTX64.EFI"} <= names


@pytest.mark.timeout(600)
def test_from_cd_by_bios_a_dialogue_leads_to_the_restored_disk(
    medium: Medium, lost_machine: LostMachine, tmp_path: Path
) -> None:
    target = tmp_path / "target.img"
    with target.open("wb") as file:
        file.truncate(66 * MIB)
    drives = (Drive(lost_machine.backup, serial="USB-1"), Drive(target, serial="BLANK-1"))
    with start_machine(Machine(cdrom=medium.path, boot="cdrom", drives=drives), tmp_path / "vm") as running:
        began = time.monotonic()
        running.wait_for(MENU, PATIENCE)
        print(f"BIOS, CD: {time.monotonic() - began:.0f} s to the recovery prompt")
        assert "serial BLANK-1" in running.said()
        running.send("4\n")
        running.wait_for(PROMPT, 60)
        assert "no_timer_check" in run_there(running, "cat /proc/cmdline"), "the menu knows an emulated machine"
        look_around(running)
        run_there(running, f"cmp --bytes={66 * MIB} /dev/vdb /dev/zero")
        running.send("exit\n")
        restore_by_dialogue(running, lost_machine.passphrase)
        power_off(running, "6")
    assert target.read_bytes()[MIB : 65 * MIB] == lost_machine.disk.read_bytes()[MIB : 65 * MIB]
    subprocess.run(["sgdisk", "--verify", target], check=True, capture_output=True)


def look_around(running: Running) -> None:
    """Check in the medium's shell that the system is what it should be."""
    assert run_there(running, "cat /proc/1/comm") == "init"
    assert "remetal" in run_there(running, "remetal --version")
    assert run_there(running, "remetal recovery --look").endswith("nobody said anything: a dialogue")
    assert run_there(running, "modprobe md_mod && cat /sys/module/md_mod/parameters/start_ro") == "1"
    tools = "partclone.extfs mkfs.xfs mkfs.vfat mkfs.btrfs mkfs.exfat resize.f2fs ntfsresize rsync "
    tools += "lvm thin_check dmsetup mdadm cryptsetup grub-install efibootmgr sfdisk"
    assert len(run_there(running, f"which {tools}").splitlines()) == len(tools.split())
    assert run_there(running, "ps -e -o stat= | grep -c ^Z || true") == "0"


def restore_by_dialogue(running: Running, passphrase: str) -> None:
    """Answer the dialogue's questions as a person would, one wrong turn included."""
    running.wait_for(MENU, 60)
    running.send("1\n")
    running.wait_for(r"1  /repository on /dev/vda \(BACKUP, ext4\)[\s\S]*> ", 30)
    running.send("0\n")
    running.wait_for(MENU, 60)
    running.send("1\n")
    running.wait_for(r"0  Back\s+> ", 30)
    running.send("1\n")
    running.wait_for(r"Passphrase: ", 30)
    running.send(f"{passphrase}\n")
    running.wait_for(r"1  lost .*[\s\S]*0  Back\s+> ", 60)
    running.send("1\n")
    number = running.wait_for(r"(\d)  /dev/vdb .*serial BLANK-1", 60)[1]
    running.wait_for(r"0  Back\s+> ", 30)
    running.send(f"{number}\n")
    running.wait_for(r"Type 'yes' or the plan's id", 60)
    running.send("yes\n")
    running.wait_for(r"Restored: .* written", 120)
    running.wait_for(MENU, 60)


@pytest.mark.timeout(600)
def test_from_usb_by_secure_boot_a_failure_leaves_a_log_and_a_shell(
    medium: Medium, answer_volume: Path, tmp_path: Path
) -> None:
    drives = (Drive(medium.path, bus="usb", read_only=True), Drive(answer_volume))
    with start_machine(Machine(firmware="uefi", secure_boot=True, drives=drives), tmp_path / "vm") as running:
        running.wait_for(r"\+- Recovery failed -+\+", PATIENCE)
        frame = running.wait_for(r"[\s\S]*?exit code 3: refused before anything was touched", 10)[0]
        assert "there is no 'nowhere' on /dev/vda (REMETAL, ext4)" in frame
        running.wait_for(r"remetal: recovery failed with exit code 3", 30)
        running.wait_for(PROMPT, 30)
        assert run_there(running, "od -An -t u1 -j 4 /sys/firmware/efi/efivars/SecureBoot-*").split() == ["1"]
        assert "no_timer_check" in run_there(running, "cat /proc/cmdline")
        assert "[integrity]" in run_there(
            running, "mount -t securityfs s /sys/kernel/security; cat /sys/kernel/security/lockdown"
        )
        assert run_there(running, "grep -c /dev/vda /proc/mounts || true") == "0"
        power_off(running, "poweroff")
    with attach_loop(Span(answer_volume, 0, 16 << 20)) as device, mounted(device, options=("ro", "noload")) as top:
        (log,) = (top / "remetal-log").iterdir()
        assert "Recovery failed" in (log / "recovery.log").read_text()
        assert "Linux version" in (log / "dmesg.txt").read_text()


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("firmware", "bus"), [("bios", "usb"), ("uefi", "cd"), ("uefi", "usb"), ("bios", "ahci")])
def test_it_boots_from_everything_else(medium: Medium, tmp_path: Path, firmware: str, bus: str) -> None:
    machine = {
        ("bios", "usb"): Machine(drives=(Drive(medium.path, bus="usb", read_only=True),)),
        ("bios", "ahci"): Machine(drives=(Drive(medium.path, bus="ahci"),)),
        ("uefi", "usb"): Machine(firmware="uefi", drives=(Drive(medium.path, bus="usb", read_only=True),)),
        ("uefi", "cd"): Machine(firmware="uefi", cdrom=medium.path, boot="cdrom"),
    }[firmware, bus]
    with start_machine(machine, tmp_path / "vm") as running:
        began = time.monotonic()
        running.wait_for(MENU, PATIENCE)
        print(f"{firmware}, {bus}: {time.monotonic() - began:.0f} s to the recovery prompt")
        power_off(running, "6")
