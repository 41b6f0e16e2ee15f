"""The parts of the medium that are computed: packages' places, boot menu, initramfs, modules, our own layer."""

from __future__ import annotations

import ast
import io
import json
import subprocess
from pathlib import Path

import pytest

from remetal.errors import RefusedError, RemetalError, UsageError
from remetal.image import copy, shrink
from remetal.layout.disks import find_disks
from remetal.layout.inventory import probe_inventory
from remetal.layout.layers import CONTAINERS, GROWING, SPANNING, swap
from remetal.media.apt import parse_index_targets, probe_apt_sources
from remetal.media.grub import CONSOLES, plan_menu
from remetal.media.iso import write_esp
from remetal.media.own import TREE, copy_tree, find_dependencies
from remetal.media.packages import recovery_packages
from remetal.media.root import plan_module_order
from remetal.media.volumes import AttachedDisk, parse_volumes, probe_disks, select_disk
from remetal.ondisk.cpio_write import Entry, write_archive
from remetal.system.run import PACKAGES
from tests.machines.record import rebuild

RAW = Path(__file__).parents[1] / "machines/raw"

TARGETS = """\
http://mirror.test/debian/|bookworm|main|Debian
http://mirror.test/debian/|bookworm|contrib|Debian
http://mirror.test/debian/|bookworm-updates|main|Debian
http://mirror.test/security/|bookworm-security|main|Debian
https://other.test/|bookworm|stable|Somebody
https://third.test/|nodistro|main|. nodistro
"""


def test_the_hosts_own_places_are_found_and_others_left() -> None:
    assert parse_index_targets(TARGETS, "bookworm", "bookworm", "Debian") == (
        "deb http://mirror.test/debian/ bookworm main",
        "deb http://mirror.test/debian/ bookworm contrib",
        "deb http://mirror.test/debian/ bookworm-updates main",
        "deb http://mirror.test/security/ bookworm-security main",
    )


def test_another_suite_comes_from_the_same_places() -> None:
    lines = parse_index_targets(TARGETS, "bookworm", "trixie", "Debian")
    assert "deb http://mirror.test/security/ trixie-security main" in lines
    assert not any("bookworm" in line for line in lines)


def test_places_are_found_where_apt_never_fetched_a_list() -> None:
    targets = "http://mirror.test/debian/|bookworm|main|\nhttps://other.test/|bookworm|stable|\n"
    assert parse_index_targets(targets, "bookworm", "bookworm", "Debian") == (
        "deb http://mirror.test/debian/ bookworm main",
    )


def test_this_hosts_own_apt_is_understood() -> None:
    sources = probe_apt_sources()
    assert sources.distribution in {"debian", "ubuntu"}
    assert any(f" {sources.suite} main" in line for line in sources.lines)


def test_the_menu_starts_by_itself_and_speaks_on_both_consoles() -> None:
    menu = plan_menu("0123abcd", 181_500_000, "remetal.repo='usb:MY DISK/x' quiet=0")
    assert "set timeout=3" in menu
    assert "set default=recover" in menu
    assert CONSOLES in menu
    assert "(182 MB)" in menu
    assert "'remetal.repo=usb:MY DISK/x' quiet=0" in menu
    assert menu.count("--id") == 3


@pytest.mark.parametrize("append", ["a\nb", "ä", "x='open"])
def test_kernel_arguments_that_would_not_arrive_are_refused(append: str) -> None:
    with pytest.raises(UsageError):
        plan_menu("0", 1, append)


@pytest.mark.parametrize("append", ["remetal.map=sda=serial:a;b", "x=$HOME", "x={y}", "x='a b'"])
def test_grubs_own_parser_takes_the_menu(append: str, tmp_path: Path) -> None:
    script = tmp_path / "grub.cfg"
    script.write_text(plan_menu("0123", 1, append))
    subprocess.run(["grub-script-check", script], check=True)


def test_the_initramfs_is_an_archive_that_cpio_understands(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 5000)
    members = [
        Entry("bin", None),
        Entry("bin/sh", "busybox"),
        Entry("init", b"#!/bin/sh\n"),
        Entry("data", large, 0o600),
    ]
    archive = io.BytesIO()
    write_archive(archive, members)
    write_archive(archive, [Entry("second", b"2")])
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["cpio", "--quiet", "-idm"], input=archive.getvalue(), cwd=out, check=True)
    assert (out / "data").read_bytes() == large.read_bytes()
    assert (out / "init").stat().st_mode & 0o777 == 0o755
    assert (out / "bin/sh").readlink() == Path("busybox")
    assert not (out / "second").exists(), "cpio stops at the first trailer, the kernel does not"


def test_modules_are_loaded_behind_what_they_need() -> None:
    table = "k/a-b.ko: k/c.ko k/d.ko\nk/c.ko: k/d.ko\nk/d.ko:\nk/e.ko.xz: k/d.ko\n"
    assert plan_module_order(table, ["a_b", "e"]) == ["k/d.ko", "k/c.ko", "k/a-b.ko", "k/e.ko.xz"]
    with pytest.raises(RemetalError, match="nbd"):
        plan_module_order(table, ["nbd"])


def test_the_esp_holds_the_programs(tmp_path: Path) -> None:
    program = tmp_path / "p.efi"
    program.write_bytes(b"x" * 3_000_000)
    image = tmp_path / "esp.img"
    write_esp(image, {"bootx64.efi": program})
    done = subprocess.run(["mcopy", "-i", image, "::/EFI/BOOT/BOOTX64.EFI", "-"], capture_output=True, check=True)
    assert done.stdout == program.read_bytes()
    subprocess.run(["fsck.vfat", "-n", image], check=True, capture_output=True)


def test_our_dependencies_are_all_found_and_nothing_of_the_tests() -> None:
    names = {package.metadata["Name"].lower().replace("_", "-") for package in find_dependencies("remetal")}
    assert {"blake3", "cryptography", "cffi", "msgspec", "numpy", "rich", "zstandard"} <= names
    assert not {"pytest", "mypy", "ruff", "hypothesis", "remetal"} & names


def test_our_own_scripts_are_executable_and_their_syntax_is_good(tmp_path: Path) -> None:
    copy_tree(TREE, tmp_path / "tree")
    scripts = [path for path in (tmp_path / "tree").rglob("*") if path.is_file() and path.read_bytes()[:2] == b"#!"]
    assert len(scripts) >= 5
    for script in scripts:
        assert script.stat().st_mode & 0o111 == 0o111
        if b"python" not in script.read_bytes().splitlines()[0]:
            subprocess.run(["bash", "--posix", "-n", script], check=True)
        else:
            ast.parse(script.read_text(), str(script))
    assert (tmp_path / "tree/root/etc/fstab").stat().st_mode & 0o111 == 0


def test_the_kernel_comes_first_among_the_packages() -> None:
    packages = recovery_packages("debian")
    assert packages[0] == "linux-image-amd64"
    assert len(set(packages)) == len(packages)


def test_the_medium_brings_every_program_that_a_restore_may_call() -> None:
    called = {*swap.PROGRAMS, *copy.PROGRAMS, *shrink.PROGRAMS}
    called |= {program for each in CONTAINERS.values() for program in each.PROGRAMS}
    called |= {program for each in GROWING.values() for program in each.PROGRAMS}
    called |= {program for each in SPANNING.values() for program in each.PROGRAMS}
    called |= {name for name in PACKAGES if name.startswith(("fsck.", "mkfs.", "thin_", "tune"))} | {
        "mke2fs",
        "dmsetup",
    }
    there = {*recovery_packages("debian"), "mount", "util-linux"}
    assert {program: PACKAGES[program] for program in called if PACKAGES[program] not in there} == {}


BLKID = """\
DEVNAME=/dev/sdb1
LABEL=MY\\ DISK
UUID=1234-ABCD
TYPE=vfat

DEVNAME=/dev/sda2
TYPE=crypto_LUKS

DEVNAME=/dev/sda1
UUID=9d1c
TYPE=ext4

DEVNAME=/dev/sda
PTTYPE=gpt
"""


def test_volumes_are_those_that_can_be_looked_into() -> None:
    first, second = parse_volumes(BLKID)
    assert (first.device, first.kind, first.uuid) == (Path("/dev/sda1"), "ext4", "9d1c")
    assert (second.label, str(second)) == ("MY DISK", "/dev/sdb1 (MY DISK, vfat)")


def test_this_hosts_disks_are_those_that_a_probe_shows() -> None:
    found = probe_disks()
    assert [disk.path for disk in found] == find_disks()
    assert [disk.size for disk in found] == [disk.size for disk in probe_inventory().disks]


@pytest.mark.parametrize(
    ("machine", "disks"), [("uml-multipath", ["dm-0", "ubdc"]), ("uml-imsm", ["ubdc", "md125", "md126"])]
)
def test_paths_and_members_of_others_are_not_offered(machine: str, disks: list[str], tmp_path: Path) -> None:
    rebuild(json.loads((RAW / f"{machine}.json").read_text())["tree"], tmp_path)
    assert [disk.path.name for disk in probe_disks(tmp_path / "sys")] == disks


DISKS = (
    AttachedDisk(path=Path("/dev/sda"), size=100, serial="S1", wwn="naa.5000c500a1b2c3d4"),
    AttachedDisk(path=Path("/dev/sdb"), size=100, serial="S1", bus="usb"),
    AttachedDisk(path=Path("/dev/sdc"), size=100, serial="S3"),
)


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ("wwn:naa.5000c500a1b2c3d4", "/dev/sda"),
        ("wwn:0x5000C500A1B2C3D4", "/dev/sda"),
        ("serial:S3", "/dev/sdc"),
        ("/dev/nvme0n1", "/dev/nvme0n1"),
    ],
)
def test_disks_are_chosen_by_what_tells_them_apart(wanted: str, path: str) -> None:
    assert select_disk(wanted, DISKS) == Path(path)


@pytest.mark.parametrize("wanted", ["serial:S1", "serial:S9", "serial:", "wwn:", "wwn:0x0", "label:x", "sda"])
def test_what_names_no_disk_or_several_is_refused_with_a_list(wanted: str) -> None:
    with pytest.raises(RefusedError, match=wanted) as caught:
        select_disk(wanted, DISKS)
    assert "/dev/sdc serial:S3" in caught.value.hint


def test_a_disk_without_an_identity_is_never_chosen_by_it() -> None:
    disk = AttachedDisk(path=Path("/dev/vda"), size=1)
    with pytest.raises(RefusedError):
        select_disk("serial:", [disk])
