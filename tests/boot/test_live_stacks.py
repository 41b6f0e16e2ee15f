"""Debian's own kernel: LVM, thin, LUKS, arrays and btrfs that are written to are backed up, and are of one moment."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from lab import CHECKOUT
from remetal.media.build import Medium
from remetal.units import GIB, MIB
from remetal.vm.machine import Drive, Machine
from remetal.vm.qemu import start_machine
from tests.boot.test_medium import MENU, PATIENCE, PROMPT, run_there
from tests.commands.site import PASSPHRASE

pytestmark = [pytest.mark.boot, pytest.mark.matrix, pytest.mark.timeout(3600)]

DISK_SIZE = 1400 * MIB

BUILD = """
set -eux
sfdisk -q /dev/vda <<'table'
label: gpt
size=64MiB
size=320MiB
size=320MiB
size=128MiB
size=128MiB
size=160MiB
size=72MiB
size=72MiB
size=72MiB
table
udevadm settle
printf secret > /run/key
cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/vda1 /run/key
mdadm --create /dev/md/mirror --run --metadata=1.2 --level=1 --raid-devices=2 /dev/vda2 /dev/vda3
mdadm --create /dev/md/parity --run --metadata=1.2 --level=5 --raid-devices=3 /dev/vda7 /dev/vda8 /dev/vda9
vgcreate -s 1M vg /dev/vda4 /dev/vda5
lvcreate -y -n linear -L 20M vg /dev/vda4
lvcreate -y -n striped -i 2 -I 16 -L 48M vg
lvextend -L +20M vg/linear /dev/vda5
lvcreate -y --type thin-pool -n pool -L 60M --poolmetadatasize 4M vg
lvcreate -y -n thin -V 80M --thinpool vg/pool
sh -eux $(dirname $0)/open.sh
for each in mapper/secret vg/linear vg/thin md/parity; do mkfs.ext4 -q -O ^has_journal,has_journal /dev/$each; done
mkfs.ext4 -q /dev/vg/striped
mkfs.xfs -q /dev/md/mirror
mkfs.btrfs -q /dev/vda6
"""

OPEN = """
udevadm settle
[ -e /dev/md/mirror ] || mdadm --assemble /dev/md/mirror /dev/vda2 /dev/vda3
[ -e /dev/md/parity ] || mdadm --assemble /dev/md/parity /dev/vda7 /dev/vda8 /dev/vda9
[ -e /dev/mapper/secret ] || cryptsetup open --key-file /run/key /dev/vda1 secret
vgchange -ay vg
udevadm settle
"""

MOUNT = """
set -eux
n=0
for each in mapper/secret vg/linear vg/thin md/parity vg/striped md/mirror vda6; do
    n=$((n + 1)); mkdir -p /run/m$n; mount /dev/$each /run/m$n
done
"""

WAYS = {
    "vda:1:luks": "tracked",
    "vg/linear": "tracked",
    "vg/thin": "snapshot",
    "md/parity": "tracked",
    "vg/striped": "tracked",
    "md/mirror": "tracked",
    "vda:6": "tracked",
}
"""How each of the file systems is read, by its volume."""

CLOSE = """
set -eux
umount /run/m?
cryptsetup close secret
vgchange -an vg
mdadm --stop /dev/md/mirror /dev/md/parity
"""

CHECK = """
set -eux
for each in mapper/secret vg/linear vg/thin md/parity vg/striped; do e2fsck -fp /dev/$each; done
btrfs check /dev/vda6
"""


def test_stacks_that_are_written_to_are_of_one_moment(medium: Medium, tmp_path: Path) -> None:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name, text in {"build": BUILD, "open": OPEN, "mount": MOUNT, "close": CLOSE, "check": CHECK}.items():
        (scripts / f"{name}.sh").write_text(text)
    shutil.copy(CHECKOUT / "lab/guest/load.py", scripts)
    (scripts / "phrase").write_text(PASSPHRASE + "\n")
    disk, vault = tmp_path / "disk.img", tmp_path / "vault.img"
    for path, size in {disk: DISK_SIZE, vault: 512 * MIB}.items():
        with path.open("wb") as file:
            file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-d", scripts, vault], check=True)
    drives = (Drive(disk, serial="LIVE-1", durable=False), Drive(vault, serial="VAULT-1", durable=False))
    machine = Machine(memory=2 * GIB, cdrom=medium.path, boot="cdrom", drives=drives)  # to be tracked needs room
    with start_machine(machine, tmp_path / "vm") as running:

        def run_long(command: str) -> None:
            running.send(f"({command}) > /run/said 2>&1; echo EN''DED $?\n")
            code = running.wait_for(r"ENDED +(\d+)\r?\n", 600)[1]
            running.wait_for(PROMPT, 30)
            said = run_there(running, "tail -n 60 /run/said")
            assert int(code) == 0, f"{command}: {said}"

        running.wait_for(MENU, PATIENCE)
        running.send("4\n")
        running.wait_for(PROMPT, 60)
        run_there(running, "mkdir /run/vault; mount /dev/vdb /run/vault; cp /run/vault/phrase /run/vault/*.sh /run")
        run_long("sh /run/build.sh")
        run_long("sh /run/mount.sh")
        run_there(running, "export REMETAL_REPO=/run/vault/repository REMETAL_STATE=/run/state")
        run_long("remetal init --quiet --passphrase-file /run/phrase")
        run_there(running, "(python3 /run/vault/load.py run /run/m? > /run/vault/written 2>&1 &)")
        words = "--disk /dev/vda --machine live --luks-passphrase-file /run/key --json > /run/vault/told-"
        for number in range(2):
            run_long(f"remetal backup {words}{number}")
        run_there(running, "touch /run/stop; sleep 3")
        run_long("sh /run/close.sh")
        run_long("blkdiscard -f -z /dev/vda && blockdev --rereadpt /dev/vda")
        run_long(
            "remetal restore latest --map vda=/dev/vda --yes --passphrase-file /run/phrase "
            "--luks-passphrase-file /run/key"
        )
        run_long("sh -eux /run/open.sh && sh /run/check.sh && sh /run/mount.sh")
        run_long("python3 /run/vault/load.py check /run/m? > /run/vault/found")
        run_long("umount /run/vault")
        running.send("poweroff\n")
        running.wait_for_shutdown(120)
    assert 0 < int(read_from(vault, "found")) < int(read_from(vault, "written"))
    for number in range(2):
        told = json.loads(read_from(vault, f"told-{number}"))
        assert 0 < told["pause"] < 10
        assert told["used"] < DISK_SIZE
        ways = {each["volume"]: each["way"] for each in told["volumes"]}
        assert {volume: ways.pop(volume, "missing") for volume in WAYS} == WAYS
        assert set(ways.values()) <= {"at rest"}, "as the header of the LUKS container is"


def read_from(disk: Path, name: str) -> str:
    """Return the text of a file on an ext4."""
    return subprocess.run(["debugfs", "-R", f"cat {name}", disk], check=True, capture_output=True, text=True).stdout
