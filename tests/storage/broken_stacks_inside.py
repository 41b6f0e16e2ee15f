"""What the storage ring runs inside its own kernel: incomplete, doubled and locked containers, through the program."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remetal.system.blockdev import flush_cache
from remetal.system.mounts import mounted
from remetal.units import MIB

REMETAL = Path(sys.executable).with_name("remetal")
ONE, TWO, THREE, NEW, OTHER = (Path(f"/dev/ubd{letter}") for letter in "abcde")
DISKS = (ONE, TWO, THREE, NEW, OTHER)
DISK_SIZE = 72 * MIB
PHRASE = "the disk's own passphrase"
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--luks2-keyslots-size", "1m")
LVM = ("--config", "devices { use_devicesfile = 0 } backup { backup = 0 archive = 0 }")


@dataclass(frozen=True)
class Ran:
    """How the program ended."""

    code: int
    out: str
    err: str


def program(*argv: str | Path, data: str = "") -> str:
    """Run a program and return its output."""
    done = subprocess.run(argv, input=data, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def remetal(*words: str | Path, code: int) -> Ran:
    """Run the program as a person would."""
    done = subprocess.run(
        [REMETAL, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        env=os.environ
        | {"REMETAL_REPO": "/run/repository", "REMETAL_STATE": "/run/state", "REMETAL_PASSPHRASE_FILE": "/run/secret"},
    )
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


def back_up(*disks: Path, code: int = 0, words: tuple[str, ...] = ()) -> Ran:
    """Back up these disks."""
    named = [word for disk in disks for word in ("--disk", str(disk))]
    return remetal("backup", "--machine", "lab", *named, *words, code=code)


def layers() -> list[dict[str, Any]]:
    """Return the layers of the last snapshot."""
    found: list[dict[str, Any]] = json.loads(remetal("show", "latest", "--json", code=0).out)["layout"]["layers"]
    return found


def prepare() -> None:
    """Make the repository, and keep udev from assembling what a test leaves behind."""
    program("modprobe", "--all", "raid0", "raid1", "raid456", "dm-crypt")
    Path("/run/secret").write_text("the repository's\n")
    Path("/run/luks").write_text(PHRASE)
    remetal("init", "--quiet", code=0)


def hash_of(disk: Path) -> str:
    """Return the hash of a whole disk."""
    flush_cache(disk)
    with disk.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def unchanged(*disks: Path) -> Iterator[None]:
    """See that no byte of these disks changes."""
    before = [hash_of(disk) for disk in disks]
    yield
    assert [hash_of(disk) for disk in disks] == before, "a disk was changed"


def wipe() -> None:
    """Make all disks blank, and let go of whatever is on them."""
    program("udevadm", "settle")
    subprocess.run(["vgchange", *LVM, "--activate", "n"], capture_output=True, check=False)
    subprocess.run(["dmsetup", "remove_all"], capture_output=True, check=False)
    subprocess.run(["mdadm", "--stop", "--scan"], capture_output=True, check=False)
    for disk in DISKS:
        with disk.open("r+b") as file:
            file.write(bytes(DISK_SIZE))
        subprocess.run(["blockdev", "--rereadpt", disk], capture_output=True, check=False)
    program("udevadm", "settle")


def copy(source: Path, target: Path) -> None:
    """Copy a disk byte for byte."""
    flush_cache(source)
    target.write_bytes(source.read_bytes())
    flush_cache(target)


def make_array(name: str, level: str, *disks: Path) -> Path:
    """Make an array and put a file system into it."""
    device = Path("/dev/md", name)
    words = ["--run", "--quiet", "--assume-clean", f"--level={level}", f"--raid-devices={len(disks)}", "--homehost=lab"]
    program("mdadm", "--create", device, *words, f"--name={name}", *disks)
    program("udevadm", "settle")
    program("mkfs.ext4", "-q", "-L", name, device)
    with mounted(device) as folder:
        (folder / "file").write_bytes(name.encode() * 100_000)
    return device


def stop(device: Path) -> None:
    program("udevadm", "settle")
    program("mdadm", "--stop", device)
    program("udevadm", "settle")


def assemble(device: Path, *disks: Path) -> None:
    """Assemble an array that lacks a member; udev may have begun to, and waits for it."""
    end = time.monotonic() + 15
    while True:
        subprocess.run(["mdadm", "--stop", "--scan"], capture_output=True, check=False)
        done = subprocess.run(["mdadm", "--assemble", "--run", device, *disks], capture_output=True, check=False)
        if done.returncode == 0:
            program("udevadm", "settle")
            return
        assert time.monotonic() < end, done.stderr
        time.sleep(0.2)


def check_file(device: Path, content: bytes) -> None:
    with mounted(device, options=("ro",)) as folder:
        assert (folder / "file").read_bytes() == content * 100_000


def two_groups_of_one_name() -> None:
    """Which of the two a restored system means, nobody can tell: refused, with both identities."""
    wipe()
    for disk in (ONE, TWO):
        program("lvm", "pvcreate", "--quiet", "--devices", disk, disk)
        program("lvm", "vgcreate", "--quiet", "--devices", disk, "twin", disk)
        program("lvm", "lvcreate", "--quiet", "--devices", disk, "-an", "-Zn", "-n", "data", "-l", "5", "twin")
    with unchanged(ONE, TWO):
        told = back_up(ONE, TWO, code=3)
        for disk in (ONE, TWO):
            assert program("lvm", "vgs", "--devices", disk, "--noheadings", "-o", "uuid").strip() in told.err
        assert "vgrename" in told.err
        back_up(ONE)
    assert [each["layer"] for each in layers()] == ["lvm", "raw"]


def what_lacks_members() -> None:
    """Arrays and groups that cannot be used are refused; what works without a member is captured, and that is said."""
    wipe()
    stop(make_array("stripes", "0", ONE, TWO))
    with unchanged(ONE, TWO):
        told = back_up(TWO, code=3)
        assert "stripes" in told.err
        assert "lacks 1 of 2" in told.err
        assert "--disk" in told.err
        back_up(ONE, TWO)
    wipe()
    program("lvm", "vgcreate", "--quiet", *LVM, "wide", ONE, TWO)
    with unchanged(ONE, TWO):
        told = back_up(ONE, code=3)
        assert "wide" in told.err
        assert "lacks 1 of 2" in told.err
    for level, disks in (("1", (ONE, TWO)), ("5", (ONE, TWO, THREE))):
        wipe()
        stop(make_array("mirror", level, *disks))
        with unchanged(*disks):
            assert f"runs with {len(disks) - 1} of {len(disks)} devices" in back_up(*disks[1:]).err
        wipe()
        maps = [
            word
            for source, target in zip(disks[1:], (NEW, OTHER), strict=False)
            for word in ("--map", f"{source.name}={target}")
        ]
        remetal("restore", "latest", *maps, "--yes", "--no-adapt", code=0)
        assemble(Path("/dev/md/again"), *[NEW, OTHER][: len(disks) - 1])
        check_file(Path("/dev/md/again"), b"mirror")
        assert "degraded" in program("mdadm", "--detail", "/dev/md/again")
        stop(Path("/dev/md/again"))


def copies_of_a_member() -> None:
    """A disk and its copy: which is the right one is not for remetal to guess."""
    wipe()
    program("lvm", "vgcreate", "--quiet", *LVM, "group", ONE)
    copy(ONE, TWO)
    with unchanged(ONE, TWO):
        assert "ubda and ubdb have the same LVM identity" in back_up(ONE, TWO, code=3).err
        back_up(TWO)
    wipe()
    stop(make_array("mirror", "1", ONE, TWO))
    copy(ONE, THREE)
    with unchanged(ONE, TWO, THREE):
        told = back_up(ONE, TWO, THREE, code=3)
        assert "copies of each other" in told.err
        assert "--disk" in told.err
        back_up(TWO, THREE)
    wipe()
    program("mkfs.btrfs", "-q", "--mixed", ONE)
    copy(ONE, TWO)
    with unchanged(ONE, TWO):
        assert "copies of each other" in back_up(ONE, TWO).err
    assert [each["layer"] for each in layers()] == ["raw", "raw"]


def a_container_that_nobody_opens() -> None:
    """Carried as it is, and said so; it opens with its passphrase where it was restored."""
    wipe()
    program("sfdisk", "--quiet", ONE, data="label: gpt\nsize=40MiB\n")
    program("udevadm", "settle")
    program("cryptsetup", "luksFormat", "-q", *CHEAP, f"{ONE}1", "/run/luks")
    Path("/run/wrong").write_text("not it")
    with unchanged(ONE):
        told = back_up(ONE, words=("--luks-passphrase-file", "/run/wrong"))
        assert "no key was given that opens the LUKS container on ubda:1" in told.err
        assert "captured whole" in told.err
    assert [each.get("type", "") for each in layers() if each["layer"] == "raw"] == ["crypto_LUKS"]
    remetal("restore", "latest", "--map", f"ubda={NEW}", "--yes", "--no-adapt", "--verify", code=0)
    program("udevadm", "settle")
    assert hash_of(Path(f"{ONE}1")) == hash_of(Path(f"{NEW}1"))
    program("cryptsetup", "open", "--test-passphrase", "--key-file", "/run/luks", f"{NEW}1")


def open_sources_stay_what_they_are() -> None:
    """While a machine runs from a LUKS container, it is restored onto a spare disk: only that one changes."""
    wipe()
    program("cryptsetup", "luksFormat", "-q", *CHEAP, THREE, "/run/luks")
    program("cryptsetup", "open", "--key-file", "/run/luks", THREE, "plain")
    program("mkfs.ext4", "-q", "/dev/mapper/plain")
    with mounted(Path("/dev/mapper/plain")) as folder:
        (folder / "file").write_bytes(b"inside" * 100_000)
    with mounted(Path("/dev/mapper/plain"), options=("ro",)):
        back_up(THREE, words=("--luks-passphrase-file", "/run/luks"))
        with unchanged(THREE):
            words = ("--luks-passphrase-file", "/run/luks", "--overwrite", str(NEW))
            remetal("restore", "latest", "--map", f"ubdc={NEW}", *words, "--yes", "--no-adapt", code=0)
    check_file(Path("/dev/mapper/plain"), b"inside")
    program("cryptsetup", "close", "plain")
    program("cryptsetup", "open", "--key-file", "/run/luks", NEW, "plain")
    check_file(Path("/dev/mapper/plain"), b"inside")
    program("cryptsetup", "close", "plain")


def open_twins_are_refused() -> None:
    """The kernel takes no second array or group of one identity: refused before the first write."""
    wipe()
    array = make_array("mirror", "1", ONE, TWO)
    with mounted(array, options=("ro",)):
        back_up(ONE, TWO)
        maps = ("--map", f"ubda={NEW}", "--map", f"ubdb={OTHER}")
        with unchanged(ONE, TWO, NEW, OTHER):
            told = remetal("restore", "latest", *maps, "--yes", "--no-adapt", code=3)
            assert "md/mirror" in told.err
            assert "is open on this machine" in told.err
    check_file(array, b"mirror")
    stop(array)
    remetal("restore", "latest", *maps, "--yes", "--no-adapt", code=0)
    wipe()
    program("lvm", "vgcreate", "--quiet", *LVM, "group", ONE)
    program("lvm", "lvcreate", "--quiet", *LVM, "-y", "-n", "data", "-l", "10", "group")
    program("mkfs.ext4", "-q", "/dev/group/data")
    with mounted(Path("/dev/group/data")) as folder:
        (folder / "file").write_bytes(b"volume" * 100_000)
    with mounted(Path("/dev/group/data"), options=("ro",)):
        back_up(ONE)
        with unchanged(ONE, NEW):
            told = remetal("restore", "latest", "--map", f"ubda={NEW}", "--yes", "--no-adapt", code=3)
            assert "group (UUID" in told.err
    check_file(Path("/dev/group/data"), b"volume")
    program("vgchange", "--quiet", *LVM, "-an", "group")
    remetal("restore", "latest", "--map", f"ubda={NEW}", "--yes", "--no-adapt", code=0)
