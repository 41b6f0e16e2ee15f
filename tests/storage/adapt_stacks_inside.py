"""What the storage ring runs inside its own kernel: a machine on LVM in LUKS on a mirror, and what came of it.

/boot lies on a mirror of its own, and a plain partition beside both. Every file that names storage is written as a real
system has it, the GRUB of every disk is laid by the bytes that its installer writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.stacks.machine import isolate_host
from remetal.adapt.grub_images import SECTOR, find_core_sector, plan_boot_sector, plan_core
from remetal.system.blockdev import open_disk
from remetal.system.mounts import mounted
from tests.adapt_disks import PC_MODULES, make_core
from tests.storage.layout_inside import program

REMETAL = Path(sys.executable).with_name("remetal")
PARTITIONS = """label: gpt
start=2048, size=2MiB, type=21686148-6449-6E6F-744E-656564454649
size=96MiB, type=raid
size=160MiB, type=raid
size=24MiB, type=linux
"""
BOOT, CRYPT = Path("/dev/md/boot"), Path("/dev/md/crypt")
ROOT, SWAP = Path("/dev/mapper/vg0-root"), Path("/dev/mapper/vg0-swap")


class Site:
    """The folder that outlives the kernels: repository, passphrases, and what was noted of the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret, self.key = folder / "passphrase", folder / "luks"
        self.environment = {"REMETAL_REPO": str(folder / "repository"), "REMETAL_STATE": str(folder / "state")}

    def remetal(self, command: str, *words: str | Path) -> dict[str, Any]:
        """Run the program and return its result."""
        argv = [REMETAL, command, "--json", "--quiet", *words]
        environment = os.environ | self.environment
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def build_and_back_up(folder: Path) -> None:
    """Make the machine on the two disks, and back it up."""
    isolate_host()
    site = Site(folder)
    disks = [Path("/dev/ubda"), Path("/dev/ubdb")]
    site.secret.write_text("the repository's\n")
    site.key.write_text("the container's")
    for disk in disks:
        subprocess.run(["sfdisk", "--quiet", "--wipe=always", disk], input=PARTITIONS, text=True, check=True)
    program("udevadm", "settle")
    make_layers(disks, site)
    facts = make_files(folder)
    for disk in disks:
        lay_grub(disk, facts["boot array"], folder)
    (folder / "facts.json").write_text(json.dumps(facts))
    close_layers()
    site.remetal("init", "--passphrase-file", site.secret)
    words = [word for disk in disks for word in ("--disk", disk)]
    site.remetal("backup", "--machine", "web", *words, "--luks-passphrase-file", site.key)


def make_layers(disks: list[Path], site: Site) -> None:
    """Make arrays, container, group and file systems."""
    for array, number in ((BOOT, 2), (CRYPT, 3)):
        argv = ["mdadm", "--create", str(array), "--run", "--quiet", "--level=1", "--raid-devices=2", "--metadata=1.2"]
        argv += ["--homehost=web", f"--name={array.name}", "--assume-clean"]
        program(*argv, *(f"{disk}{number}" for disk in disks))
    derive = ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")
    program("cryptsetup", "luksFormat", "--batch-mode", *derive, f"--key-file={site.key}", CRYPT)
    program("cryptsetup", "open", f"--key-file={site.key}", CRYPT, "crypt")
    program("pvcreate", "--quiet", "/dev/mapper/crypt")
    program("vgcreate", "--quiet", "vg0", "/dev/mapper/crypt")
    program("lvcreate", "--quiet", "--yes", "--size=64M", "--name=root", "vg0")
    program("lvcreate", "--quiet", "--yes", "--size=24M", "--name=swap", "vg0")
    program("udevadm", "settle")
    for device in (ROOT, BOOT, Path(f"{disks[0]}4")):
        program("mkfs.ext4", "-q", device)
    program("mkswap", "--quiet", SWAP)


def make_files(folder: Path) -> dict[str, str]:
    """Write the files of the system that name its storage, and return the identities in them."""
    facts = {
        "root": uuid_of(ROOT),
        "boot": uuid_of(BOOT),
        "data": uuid_of(Path("/dev/ubda4")),
        "luks": uuid_of(CRYPT),
        "boot array": array_uuid(BOOT),
        "crypt array": array_uuid(CRYPT),
    }
    plain = facts["boot array"].replace(":", "")
    kernel = "/vmlinuz root=/dev/mapper/vg0-root ro cryptdevice=/dev/md/crypt:crypt resume=/dev/mapper/vg0-swap quiet"
    files = {
        "etc/os-release": 'ID=debian\nPRETTY_NAME="Debian GNU/Linux"\n',
        "etc/fstab": "# mine\n/dev/mapper/vg0-root / ext4 errors=remount-ro 0 1\n/dev/md/boot /boot ext4 defaults 0 2\n"
        "/dev/vg0/swap none swap sw 0 0\n/dev/ubda4 /data ext4 defaults 0 2\n",
        "etc/crypttab": "crypt /dev/md/crypt none luks,discard\n",
        "etc/mdadm/mdadm.conf": "HOMEHOST <system>\n"
        f"ARRAY /dev/md/boot  metadata=1.2 UUID={facts['boot array']} name=web:boot\n"
        f"ARRAY /dev/md/crypt  metadata=1.2 UUID={facts['crypt array']} name=web:crypt\n",
        "etc/initramfs-tools/conf.d/resume": "RESUME=/dev/mapper/vg0-swap\n",
        "etc/lvm/lvm.conf": 'devices {\n\tglobal_filter = [ "a|^/dev/mapper/crypt$|", "r|.*|" ]\n}\n',
        "boot/grub/grub.cfg": f"set root='mduuid/{plain}'\n"
        f"search --no-floppy --fs-uuid --set=root --hint='mduuid/{plain}' {facts['boot']}\n"
        f"linux {kernel}\ninitrd /initrd.img\n",
    }
    (folder / "files.json").write_text(json.dumps(files))
    with mounted(ROOT) as root:
        (root / "boot").mkdir()
        with mounted(BOOT, target=root / "boot"):
            for name, text in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
    return facts


def lay_grub(disk: Path, array: str, folder: Path) -> None:
    """Lay GRUB into the BIOS boot partition, as its installer does for a /boot on an array: it looks for that alone."""
    prefix = f"(mduuid/{array.replace(':', '')})/grub"
    core = make_core(folder / "core.img", prefix=prefix, modules="biosdisk part_gpt mdraid1x ext2")
    with open_disk(disk, writable=True) as device:
        device.write(plan_core(core, 2048), 2048 * SECTOR)
        boot = plan_boot_sector((PC_MODULES / "boot.img").read_bytes(), device.read(0, SECTOR), 2048)
        assert find_core_sector(boot) == 2048
        device.write(boot, 0)


def close_layers() -> None:
    """Close everything, the uppermost first."""
    program("vgchange", "--quiet", "--activate=n", "vg0")
    program("cryptsetup", "close", "crypt")
    for array in (BOOT, CRYPT):
        if array.exists():
            program("mdadm", "--quiet", "--stop", array)
    program("udevadm", "settle")


def restore(folder: Path, *words: str) -> dict[str, Any]:
    """Restore the machine as the words say, and return what adaptation said of itself."""
    isolate_host()
    site = Site(folder)
    secrets = ("--luks-passphrase-file", site.key, "--passphrase-file", site.secret)
    done = site.remetal("restore", "latest", "--yes", "--even-unbootable", *words, *secrets)
    program("udevadm", "settle")
    adaptation: dict[str, Any] = done["adaptation"]
    return adaptation


@contextmanager
def opened_system(folder: Path, boot: Path, crypt: Path) -> Iterator[Path]:
    """Open the restored system by the standard tools alone, and yield its root."""
    program("cryptsetup", "open", f"--key-file={Site(folder).key}", crypt, "crypt")
    program("vgchange", "--quiet", "--activate=y", "vg0")
    program("udevadm", "settle")
    for device in (ROOT, boot):
        program("e2fsck", "-fn", device)
    with mounted(ROOT) as root, mounted(boot, target=root / "boot"):
        yield root
    close_layers()


def assemble(array: Path, *members: str) -> Path:
    """Assemble an array from its members and return its device."""
    program("mdadm", "--assemble", "--quiet", array, *members)
    program("udevadm", "settle")
    return array


def report(folder: Path, adaptation: dict[str, Any], root: Path) -> None:
    """Leave what was found for the test."""
    files = json.loads((folder / "files.json").read_text())
    found = {name: (root / name).read_text() for name in files}
    (folder / "found.json").write_text(json.dumps({"adaptation": adaptation, "files": found}))


def uuid_of(device: Path) -> str:
    """Return the UUID of what is on a device."""
    return program("blkid", "-p", "-o", "value", "-s", "UUID", device).strip()


def array_uuid(array: Path) -> str:
    """Return an array's UUID."""
    lines = program("mdadm", "--detail", "--export", array).splitlines()
    return next(line.removeprefix("MD_UUID=") for line in lines if line.startswith("MD_UUID="))
