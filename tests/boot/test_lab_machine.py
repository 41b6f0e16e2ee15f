"""The lab's machines boot by every firmware they are made for, and find on themselves what was put there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from lab.disk import find_mounts_of, take_disk_manifest
from lab.machine import Recipe, copy_machine
from lab.manifest import compare_manifests
from lab.proof import CHANGED_BY_BOOT, make_proof_disk, wait_for_boot, wait_for_manifest
from remetal.events import silent
from remetal.vm.machine import Drive, Machine
from remetal.vm.qemu import start_machine

pytestmark = [pytest.mark.boot, pytest.mark.matrix]  # tests/boot/test_recovery.py boots one of each, too


@pytest.mark.parametrize(
    ("table", "firmware", "bus"),
    [("gpt", "uefi", "virtio"), ("mbr", "bios", "ahci")],
)
def test_the_machine_boots_and_lists_its_own_files(
    tmp_path: Path,
    table: Literal["gpt", "mbr"],
    firmware: Literal["bios", "uefi"],
    bus: Literal["virtio", "ahci"],
) -> None:
    disk, proof = tmp_path / "disk.img", tmp_path / "proof.img"
    copy_machine(Recipe(table=table), disk, silent)
    before = take_disk_manifest(disk)
    for place in ("/opt/awkward", "/srv/awkward"):
        assert before[f"{place}/names/latin1-caf\udce9"]["type"] == "file"
        assert before[f"{place}/one-byte"]["flags"] == ["immutable"]
    assert ("/boot/efi/EFI/BOOT/BOOTX64.EFI" in before) == (table == "gpt")
    machine = Machine(
        firmware=firmware,
        drives=(Drive(disk, bus=bus, durable=False), make_proof_disk(proof, power_off=True)),
    )
    with start_machine(machine, tmp_path / "vm") as running:
        boot = wait_for_boot(running, 400)
        after = wait_for_manifest(running, proof, 400)
        assert running.wait_for_shutdown(120) == "guest-shutdown"
    assert (boot.name, boot.firmware, boot.state) == ("phoenix", firmware, "running")
    assert compare_manifests(before, after, without=CHANGED_BY_BOOT) == []
    assert len(after) > 10_000
    kinds = {place: kind for place, (kind, _) in find_mounts_of(disk).items()}
    expected = {"/": "ext4", "/srv": "xfs", **({"/boot/efi": "vfat"} if table == "gpt" else {})}
    assert kinds == expected
