"""Debian's own kernel: partitions that are written to are backed up while they are, and are of one moment."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from remetal.media.build import Medium
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from remetal.vm.machine import Drive, Machine
from remetal.vm.qemu import Running, start_machine
from tests.boot.test_medium import MENU, PATIENCE, PROMPT, run_there
from tests.commands.site import PASSPHRASE, REMETAL

pytestmark = [pytest.mark.boot, pytest.mark.matrix, pytest.mark.timeout(1800)]

PLACES = {
    "ext4": Span(Path(), MIB, 320 * MIB),
    "xfs": Span(Path(), 321 * MIB, 320 * MIB),
    "vfat": Span(Path(), 641 * MIB, 64 * MIB),
}
"""The partitions of the disk, by the file system on them."""

LOAD = r"""
number=0
while [ ! -e /run/stop ]; do
    number=$((number + 1))
    for place in /run/first /run/second; do
        printf '%020d' $number | dd of=$place/count conv=notrunc,fsync 2>/dev/null
        dd if=/dev/urandom of=$place/file-$((number % 9)) bs=9999 count=$((number % 23)) conv=notrunc 2>/dev/null
    done
done
"""
"""Counts in turn on both file systems, each number durable before the next, and writes files beside."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with a partition for each file system."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(706 * MIB)
    parts = "".join(f"start={each.start // 512}, size={each.size // 512}\n" for each in PLACES.values())
    subprocess.run(["sfdisk", "-q", path], input=f"label: gpt\n{parts}".encode(), check=True)
    for kind, place in PLACES.items():
        with attach_loop(Span(path, place.start, place.size), writable=True) as device:
            subprocess.run([f"mkfs.{kind}", *(["-q"] if kind != "vfat" else []), device], check=True)
    return path


def test_partitions_that_are_written_to_are_of_one_moment(medium: Medium, disk: Path, tmp_path: Path) -> None:
    vault = tmp_path / "vault.img"
    with vault.open("wb") as file:
        file.truncate(256 * MIB)
    subprocess.run(["mkfs.ext4", "-q", vault], check=True)
    drives = (Drive(disk, serial="LIVE-1"), Drive(vault, serial="VAULT-1"))
    machine = Machine(cdrom=medium.path, boot="cdrom", drives=drives)
    with start_machine(machine, tmp_path / "vm") as running:
        running.wait_for(MENU, PATIENCE)
        running.send("4\n")
        running.wait_for(PROMPT, 60)
        run_there(
            running, f"printf '%s\\n' '{PASSPHRASE}' > /run/phrase; mkdir /run/first /run/second /run/third /run/vault"
        )
        run_there(running, "mount /dev/vda1 /run/first && mount /dev/vda2 /run/second && mount /dev/vdb /run/vault")
        run_there(running, "mount /dev/vda3 /run/third && echo kept > /run/third/file")
        run_there(running, "export REMETAL_REPO=/run/vault/repository REMETAL_STATE=/run/state")
        run_there(running, "remetal init --quiet --passphrase-file /run/phrase > /dev/null")
        for line in LOAD.strip().splitlines():
            run_there(running, f"echo {json.dumps(line).replace('$', chr(92) + '$')} >> /run/load")
        run_there(running, "(sh /run/load > /dev/null 2>&1 &)")
        refused = run_there(running, "remetal backup --disk /dev/vda --repo /run/first/other 2>&1 | tail -3; true")
        assert "No repository" in refused or "no repository" in refused
        for _ in range(2):
            running.send("remetal backup --disk /dev/vda --machine live --json > /run/told && echo BACKED''UP\n")
            running.wait_for(r"BACKEDUP", 600)
            running.wait_for(PROMPT, 30)
        told = json.loads(run_there(running, "cat /run/told"))
        assert 0 < told["pause"] < 10
        ways = {each["kind"]: each["way"] for each in told["volumes"]}
        assert ways == {"ext4": "tracked", "xfs": "tracked", "vfat": "read-only"}
        sleep_amid_backups(running)
        run_there(running, "echo changed > /run/third/file")  # it is writable again
        run_there(running, "touch /run/stop; sleep 1; umount /run/first /run/second /run/third /run/vault")
        running.send("poweroff\n")
        running.wait_for("reboot: Power down", 60)
        running.quit()  # an emulated machine that has slept does not go off by itself
    first, second = restored_numbers(tmp_path, vault)
    assert first - second in {0, 1}, "the partitions are of two moments"
    assert first > 0


def sleep_amid_backups(running: Running) -> None:
    """Let the machine sleep before it is held, for longer than that may be; then while somebody waits to write.

    The kernel gives that up after 20 seconds, for which who watches is stopped, too.
    """
    run_there(running, "echo deep > /sys/power/mem_sleep; echo 'echo mem > /sys/power/state' > /run/sleep")
    backup = "remetal backup --disk /dev/vda --machine live --quiet --hooks /run/hooks.toml; echo CODE $?"
    for phase, sleeps in (("before-freeze", True), ("frozen", False)):
        hook = f"[[hook]]\nrun = ['/bin/sh', '/run/sleep']\nat = ['{phase}']\nlimit = 90\n"
        run_there(running, f"printf {json.dumps(hook)} > /run/hooks.toml")
        running.send(f"{backup}\n")
        assert falls_asleep(running, 100) == sleeps
        if sleeps:
            time.sleep(15)
            running.wake()
        code = int(running.wait_for(r"CODE (\d+)", 300)[1])
        running.wait_for(PROMPT, 30)
        assert code == 0 if sleeps else code in {1, 6}
        run_there(running, "for each in first second third; do echo works > /run/$each/other; done")
        assert run_there(running, "remetal snapshots --json | grep -c sequence") == "3"


def falls_asleep(running: Running, seconds: float) -> bool:
    """Return whether the machine sleeps in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if running.status() == "suspended":
            return True
        time.sleep(0.2)
    return False


def restored_numbers(folder: Path, vault: Path) -> list[int]:
    """Restore the last backup here, check both file systems, and return the numbers that were counted on them."""
    subprocess.run(["debugfs", "-R", f"rdump /repository {folder}", vault], check=True, capture_output=True)
    (folder / "phrase").write_text(PASSPHRASE + "\n")
    target = folder / "target.img"
    words: list[str | Path] = ["restore", "latest", "--repo", folder / "repository", "--map", target, "--yes"]
    subprocess.run([REMETAL, *words, "--passphrase-file", folder / "phrase"], check=True)
    numbers = []
    for kind, place in PLACES.items():
        with attach_loop(Span(target, place.start, place.size), writable=True) as device:
            if kind == "vfat":
                subprocess.run(["fsck.vfat", "-n", device], check=True)
                assert (
                    subprocess.run(["mtype", "-i", device, "::file"], check=True, capture_output=True).stdout
                    == b"kept\n"
                )
                continue
            if kind == "ext4":
                subprocess.run(["e2fsck", "-fn", device], check=True)
            with mounted(device) as mount:
                numbers.append(int((mount / "count").read_text()))
        if kind == "xfs":
            with attach_loop(Span(target, place.start, place.size)) as device:
                subprocess.run(["xfs_repair", "-n", device], check=True)
    return numbers
