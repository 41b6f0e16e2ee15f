"""What the storage ring runs inside its own kernel, under the recovery medium's settings for MD and LVM."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from remetal.media.own import TREE
from remetal.system.mounts import mounted
from tests.storage.layout_inside import partition, program

SOURCE = (Path("/dev/ubda"), Path("/dev/ubdb"))
TARGET = (Path("/dev/ubdc"), Path("/dev/ubdd"))
REMETAL = str(Path(sys.executable).with_name("remetal"))
PHRASE = Path("/run/phrase")
FOLDER = Path("/run/medium")


def remetal(*words: str | Path) -> Any:
    """Run the program and return what it says as JSON."""
    os.environ |= {"REMETAL_REPO": str(FOLDER / "repository"), "REMETAL_STATE": str(FOLDER / "state")}
    return json.loads(program(REMETAL, *words, "--json", "--quiet"))


def prepare() -> None:
    """Make a repository, and a machine: LUKS on a logical volume on a mirror of partitions of two disks."""
    FOLDER.mkdir()
    (FOLDER / "secret").write_text("the repository's\n")
    remetal("init", "--passphrase-file", FOLDER / "secret")
    PHRASE.write_text("the disk's own\n")
    for disk in SOURCE:
        partition(disk, "label: gpt\nsize=64MiB, type=raid\n")
    members = [f"{disk}1" for disk in SOURCE]
    program("mdadm", "--quiet", "--create", "/dev/md7", "--level=1", "--raid-devices=2", "--run", *members)
    program("pvcreate", "--quiet", "/dev/md7")
    program("vgcreate", "--quiet", "vg", "/dev/md7")
    program("lvcreate", "--quiet", "--yes", "--zero=n", "--size=48M", "--name=lv", "vg")
    fast = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--luks2-keyslots-size", "1m")
    key = ("--key-file", "/run/key")
    Path("/run/key").write_text("the disk's own")
    program("cryptsetup", "luksFormat", "-q", "--type", "luks2", *fast, "/dev/vg/lv", *key)
    open_by_hand()
    program("mkfs.ext4", "-q", "/dev/mapper/plain")
    with mounted(Path("/dev/mapper/plain")) as place:
        (place / "file").write_bytes(b"content" * 10_000)
    close_by_hand()


def open_by_hand() -> None:
    """Open the container on the volume, as a person would."""
    program("cryptsetup", "open", "--key-file", "/run/key", "/dev/vg/lv", "plain")


def close_by_hand() -> None:
    """Close everything, as a person would."""
    program("cryptsetup", "close", "plain")
    stop_containers()


def stop_containers() -> None:
    """Deactivate all volumes and stop all arrays."""
    program("vgchange", "--quiet", "--activate", "n")
    program("mdadm", "--quiet", "--stop", "--scan")
    program("udevadm", "settle")


def devices() -> set[str]:
    """Let udev look at all disks as when they appear, and return the arrays and mappings that there are then."""
    program("udevadm", "trigger", "--action=add", "--subsystem-match=block")
    program("udevadm", "settle")
    return {path.name for path in Path("/sys/block").iterdir() if path.name.startswith(("md", "dm-"))}


def use_the_mediums_settings() -> None:
    """Put the medium's own files in the place of the host's, in this kernel alone."""
    assert {name[:2] for name in devices()} == {"md", "dm"}, "udev assembles by default, or this test shows nothing"
    stop_containers()
    for name in ("etc/lvm/lvmlocal.conf", "etc/mdadm/mdadm.conf"):
        program("mount", "--bind", TREE / "root" / name, f"/{name}")
    options = (TREE / "root/etc/modprobe.d/remetal.conf").read_text()
    assert "options md_mod start_ro=1\n" in options
    Path("/sys/module/md_mod/parameters/start_ro").write_text("1")


def nothing_is_assembled_by_itself() -> None:
    """Neither arrays nor volumes appear, and automatic activation finds nothing to do."""
    assert devices() == set()
    program("mdadm", "--quiet", "--assemble", "/dev/md7", *(f"{disk}1" for disk in SOURCE))
    program("vgchange", "--quiet", "--activate", "ay")
    assert devices() == {"md7"}
    stop_containers()
    assert devices() == set()


def remetal_opens_it_all_the_same() -> None:
    """What was captured and restored under these settings is whole, and nothing stays open."""
    before = [disk.read_bytes() for disk in SOURCE]
    key = ("--luks-passphrase-file", PHRASE)
    remetal("backup", *(word for disk in SOURCE for word in ("--disk", disk)), "--machine", "m", *key)
    assert [disk.read_bytes() for disk in SOURCE] == before
    assert devices() == set()
    for disk in SOURCE:
        with disk.open("r+b") as file:
            file.write(bytes(len(before[0])))
    program("udevadm", "settle")
    mapping = ("--map", f"ubda={TARGET[0]}", "--map", f"ubdb={TARGET[1]}")
    secret = ("--passphrase-file", FOLDER / "secret")
    assert remetal("restore", "latest", *mapping, *key, *secret, "--yes", "--verify")["verified"]
    assert remetal("restore", "latest", *mapping, *key, *secret, "--yes")["written"] == 0
    assert devices() == set()


def what_was_restored_is_whole() -> None:
    """The standard tools open it by hand, as the medium's own files say how."""
    program("mdadm", "--quiet", "--assemble", "--scan", "--config=partitions", "--readonly")
    (array,) = devices()
    assert "State : clean" in program("mdadm", "--detail", f"/dev/{array}")
    program("vgchange", "--quiet", "--activate", "y")
    program("cryptsetup", "open", "--readonly", "--key-file", "/run/key", "/dev/vg/lv", "plain")
    with mounted(Path("/dev/mapper/plain"), options=["ro", "noload"]) as place:
        assert (place / "file").read_bytes() == b"content" * 10_000
    close_by_hand()
