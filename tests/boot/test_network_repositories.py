"""The recovery medium, booted, reaches repositories on real servers of this host and on a stick with a label."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from remetal.media.build import Medium
from remetal.units import MIB
from remetal.vm.machine import Drive, Machine, Nic
from remetal.vm.qemu import start_machine
from tests.boot.conftest import LostMachine
from tests.boot.test_medium import MENU, PATIENCE, PROMPT, run_there
from tests.servers import running_ganesha, running_smbd

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1800)]

PASSWORD = "a,password with=signs"
HOST = "10.0.2.2"
"""This host, as a machine on QEMU's own network sees it."""


@contextmanager
def running_servers(folder: Path, backup: Path) -> Iterator[dict[str, str]]:
    """Serve the repository that is on a disk file by NFS and SMB, and yield its locations as the guest names them."""
    root = folder / "served"
    root.mkdir()
    subprocess.run(["debugfs", "-R", f"rdump /repository {root}", backup], check=True, capture_output=True)
    with ExitStack() as stack:
        nfs = stack.enter_context(running_ganesha(folder / "nfs", root))
        smb = stack.enter_context(running_smbd(folder / "smb", root, user="root", password=PASSWORD))
        yield {
            "nfs": f"nfs://{HOST}:{nfs}/vault/repository",
            "smb": f"smb://root@{HOST}:{smb}/vault/repository",
            "usb": "usb:BACKUP/repository",
        }


def test_the_medium_restores_from_nfs_and_lists_what_smb_and_a_stick_hold(
    medium: Medium, lost_machine: LostMachine, tmp_path: Path
) -> None:
    target = tmp_path / "target.img"
    with target.open("wb") as file:
        file.truncate(66 * MIB)
    drives = (Drive(lost_machine.backup, bus="usb", serial="USB-1"), Drive(target, serial="BLANK-1"))
    machine = Machine(cdrom=medium.path, boot="cdrom", drives=drives, nics=(Nic(restricted=False),))
    with running_servers(tmp_path, lost_machine.backup) as places, start_machine(machine, tmp_path / "vm") as running:
        running.wait_for(MENU, PATIENCE)
        running.send("4\n")
        running.wait_for(PROMPT, 60)
        run_there(running, f"printf '%s\\n' '{lost_machine.passphrase}' > /run/phrase")
        run_there(running, f"printf '%s\\n' username=root 'password={PASSWORD}' > /run/credentials")
        run_there(running, "export REMETAL_PASSPHRASE_FILE=/run/phrase REMETAL_SMB_CREDENTIALS=/run/credentials")
        for place in places.values():
            assert "lost" in run_there(running, f"remetal snapshots --quiet --repo {place}"), place
        refused = f"remetal plan latest --repo {places['usb']} --map /dev/sda --overwrite /dev/sda 2>&1 | tail -3"
        assert "holds the repository" in run_there(running, refused)
        restore = f"remetal restore latest --quiet --repo {places['nfs']} --map /dev/vda --yes"
        running.send(f"{restore} && echo RES''TORED\n")
        running.wait_for(r"RESTORED", 240)
        running.wait_for(PROMPT, 30)
        assert run_there(running, "grep -cE ' (nfs4?|cifs|ext4) ' /proc/mounts || true") == "0"
        running.send("poweroff\n")
        running.wait_for_shutdown(60)
    assert target.read_bytes()[MIB : 65 * MIB] == lost_machine.disk.read_bytes()[MIB : 65 * MIB]
