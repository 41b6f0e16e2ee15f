"""Running virtual machines, with a guest of 63 bytes: it greets, repeats what is typed, and goes off at a `q`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from remetal.vm.accelerator import EMULATION, KVM, probe_accelerator
from remetal.vm.machine import Drive, Machine
from remetal.vm.qemu import MachineFailedError, start_machine

pytestmark = pytest.mark.boot

# 16-bit code at 0x7C00: print the text behind it on the serial port at 0x3F8; then repeat each byte that comes
# in, but at `q` write 0x2000 to port 0x604, where q35 has the ACPI register that switches off.
GUEST = bytes.fromhex(
    "31c08ed8be3f7cac84c07405e82100ebf6bafd03eca80174f8baf803ec3c"
    "717405e80c00ebebba0406b80020eff4ebfd50bafd03eca82074fb58baf8"
    "03eec3"
)

MakeDisk = Callable[[str], Path]


@pytest.fixture
def make_disk(tmp_path: Path) -> MakeDisk:
    def make(greeting: str) -> Path:
        disk = tmp_path / "disk, first.img"
        boot = GUEST + greeting.encode() + b"\0"
        disk.write_bytes(boot.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
        return disk

    return make


def test_a_guest_is_talked_to_and_switches_itself_off(tmp_path: Path, make_disk: MakeDisk) -> None:
    disk, folder = make_disk("hello one two\r\n"), tmp_path / "vm"
    with start_machine(Machine(drives=(Drive(disk),)), folder) as running:
        assert running.wait_for(r"^hello (\w+)", 60)[1] == "one"
        running.wait_for(r"two", 10)
        assert running.status() == "running"
        running.send("typed\n")
        running.wait_for("typed", 10)
        picture = tmp_path / "shots" / "screen.png"
        running.screendump(picture)
        assert picture.read_bytes()[:4] == b"\x89PNG"
        running.reset()
        running.wait_for("hello one", 60)
        running.send("q")
        assert running.wait_for_shutdown(30) == "guest-shutdown"
        assert {"RESET", "SHUTDOWN"} <= {event["event"] for event in running.events()}
    assert len(re.findall("hello one two", running.serial_log.read_text())) == 2


def test_waiting_ends_early_when_the_machine_does(tmp_path: Path, make_disk: MakeDisk) -> None:
    with start_machine(Machine(drives=(Drive(make_disk("last words")),)), tmp_path / "vm") as running:
        running.wait_for("last words", 60)
        running.send("q")
        began = time.monotonic()
        with pytest.raises(MachineFailedError, match="ended before it said 'more'") as caught:
            running.wait_for("more", 100)
        assert time.monotonic() - began < 30
    assert "last words" in caught.value.message
    assert str(running.serial_log) in caught.value.hint


def test_a_silent_machine_and_a_panic_are_told_apart(tmp_path: Path, make_disk: MakeDisk) -> None:
    disk = make_disk("Kernel panic - not syncing: VFS\r\nlater\r\n")
    with start_machine(Machine(drives=(Drive(disk, durable=False),)), tmp_path / "vm") as running:
        with pytest.raises(MachineFailedError, match="said 'Kernel panic - not syncing' instead of 'later'"):
            running.wait_for("later", 60)
        running.wait_for("later", 10, unless="never")
        with pytest.raises(MachineFailedError, match="did not say 'more' within"):
            running.wait_for("more", 0.5)
        with pytest.raises(MachineFailedError, match="still on after"):
            running.wait_for_shutdown(0.5)
        running.quit()
        assert running.events()[-1]["data"]["reason"] == "host-qmp-quit"


def test_a_machine_is_gone_after_its_block(tmp_path: Path, make_disk: MakeDisk) -> None:
    with start_machine(Machine(drives=(Drive(make_disk("hello")),)), tmp_path / "vm") as running:
        pass
    with pytest.raises(MachineFailedError, match="ended before"):
        running.wait_for("never said", 5)


def test_qemu_s_own_complaint_is_passed_on(tmp_path: Path, make_disk: MakeDisk) -> None:
    machine = Machine(drives=(Drive(make_disk("hello"), format="qcow2"),))
    with (
        pytest.raises(MachineFailedError, match=r"QEMU did not start: .*not in qcow2 format"),
        start_machine(machine, tmp_path / "vm"),
    ):
        pass


def test_uefi_starts_and_keeps_its_variables(tmp_path: Path) -> None:
    for _ in range(2):
        with start_machine(Machine(firmware="uefi", boot="firmware"), tmp_path / "vm") as running:
            running.wait_for("UEFI Interactive Shell|Shell>", 60)
    assert (tmp_path / "vm" / "variables.fd").stat().st_size > 0


def test_the_accelerator_is_proven_once() -> None:
    assert probe_accelerator() in {KVM, EMULATION}
    began = time.monotonic()
    probe_accelerator()
    assert time.monotonic() - began < 0.1
