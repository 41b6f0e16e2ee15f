"""The network of an installed system on a real ext4, written to for real, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from remetal.adapt import Adaptation, adapt_system
from remetal.adapt.fat_files import read_fat_file
from remetal.adapt.network import Choice, Match, Network
from remetal.adapt.network.facts import probe_udev
from remetal.adapt.network.naming import Udev
from remetal.adapt.rooted import create_inside, rename_inside
from remetal.errors import RemetalError
from remetal.events import Event, Warn
from remetal.layout.model import Layout
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.adapt_disks import (
    ESP,
    LINUX,
    ROOT_UUID,
    ext4,
    layout_of,
    make_esp,
    make_ext4,
    partition,
    read_table,
    sh,
    vfat,
)
from tests.network_systems import DEBIAN, NEW, NEW_2, OLD, OLD_2, SYSTEMD, UBUNTU_CLOUD, make_system

LINK = "/etc/systemd/network/10-remetal-ens3.link"
ENTRY = b"title x\nlinux /x\ninitrd /y\noptions root=UUID=1 ifname=ens3:52:54:00:12:34:56 ip=ens3:dhcp\n"
BASE = {
    "/etc/fstab": f"UUID={ROOT_UUID} / ext4 defaults 0 1\n",
    "/etc/os-release": "ID=debian\nPRETTY_NAME=Debian\n",
    "/etc/default/grub": 'GRUB_CMDLINE_LINUX="quiet BOOTIF=01-52-54-00-12-34-56"\n',
}


@dataclass
class Machine:
    """A disk file with a system on ext4, and an ESP with a boot entry."""

    disk: Path
    layout: Layout
    events: list[Event] = field(default_factory=list)

    def adapt(self, network: Network | None) -> Adaptation:
        return adapt_system(
            self.layout, self.layout, {"sda": self.disk}, firmware=None, network=network, report=self.events.append
        )

    def span(self, number: int) -> Span:
        return Span(self.disk, *self.layout.place(f"sda:{number}")[1:])

    @contextmanager
    def root(self, *, writable: bool = False) -> Iterator[Path]:
        options = [] if writable else ["ro", "noload"]
        with attach_loop(self.span(2), writable=writable) as loop, mounted(loop, options=options) as root:
            yield root


def make_machine(tmp_path: Path, files: dict[str, str]) -> Machine:
    disk = tmp_path / "disk.img"
    partition(disk, 80 * MIB, f"label: gpt\nsize=40M,type={ESP}\nsize=24M,type={LINUX}\n")
    table = read_table(disk, "sda")
    make_esp(disk, table.partitions[0], {"/loader/entries/a.conf": ENTRY})
    system = make_system(tmp_path / "root", BASE | files)
    make_ext4(disk, table.partitions[1], system.root)
    return Machine(disk, layout_of(disk, {1: vfat(1), 2: ext4(2)}))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path, DEBIAN)


def test_a_card_gets_its_name_and_command_lines_its_address(machine: Machine) -> None:
    done = machine.adapt(Network((OLD,), (NEW,)))
    changed = {change.path: change for change in done.changes}
    assert {"/etc/default/grub", LINK, "/loader/entries/a.conf"} <= set(changed)
    assert "+PermanentMACAddress=b4:45:06:aa:bb:01" in changed[LINK].diff
    assert any("ens3 (52:54:00:12:34:56, virtio_net) is enp1s0" in note for note in done.notes)
    with machine.root() as root:
        place = root / LINK.lstrip("/")
        assert place.read_text().endswith("[Link]\nName=ens3\n")
        assert (place.stat().st_mode & 0o7777, place.stat().st_uid, place.stat().st_gid) == (0o644, 0, 0)
        assert (place.parent.stat().st_mode & 0o7777, place.parent.stat().st_uid) == (0o755, 0)
        assert "BOOTIF=01-b4-45-06-aa-bb-01" in (root / "etc/default/grub").read_text()
        assert (root / "etc/network/interfaces").read_text() == DEBIAN["/etc/network/interfaces"]
    entry = read_fat_file(machine.span(1), "/loader/entries/a.conf")
    assert entry == ENTRY.replace(b"52:54:00:12:34:56", b"b4:45:06:aa:bb:01")
    with attach_loop(machine.span(2)) as loop:
        sh("e2fsck", "-fn", loop)
    content = machine.disk.read_bytes()
    again = machine.adapt(Network((OLD,), (NEW,)))
    assert (again.changes, again.bytes_written) == ((), 0)
    assert machine.disk.read_bytes() == content


def test_the_same_machine_and_disk_files_are_left_alone(machine: Machine) -> None:
    machine.adapt(Network((OLD,), (OLD,)))
    content = machine.disk.read_bytes()
    done = machine.adapt(Network((OLD,), (OLD, NEW)))
    assert (done.changes, [note for note in done.notes if "network" in note]) == ((), [])
    (note,) = [note for note in machine.adapt(None).notes if "network" in note]
    assert "in no machine yet" in note
    assert "expects ens3" in note
    assert machine.disk.read_bytes() == content


def test_a_guess_is_carried_out_and_said_aloud_with_the_way_to_choose(machine: Machine) -> None:
    done = machine.adapt(Network((OLD,), (NEW, NEW_2)))
    (warning,) = [event for event in machine.events if isinstance(event, Warn) and "network" in event.text]
    assert "was guessed" in warning.text
    assert "--nic ens3=b4:45:06:aa:bb:02 (enp2s0)" in warning.hint
    assert any("was guessed" in note and "--nic ens3=b4:45:06:aa:bb:02" in note for note in done.notes)
    assert LINK in {change.path for change in done.changes}


def test_what_was_chosen_or_agreed_in_the_plan_holds(machine: Machine) -> None:
    machine.adapt(Network((OLD, OLD_2), (NEW, NEW_2), chosen=(Choice(OLD, NEW_2),)))
    with machine.root() as root:
        assert "PermanentMACAddress=b4:45:06:aa:bb:02" in (root / LINK.lstrip("/")).read_text()
    agreed = Match(OLD, NEW_2, "it is the only one with the same driver")
    done = machine.adapt(Network((OLD, OLD_2), (NEW, NEW_2), agreed=(agreed,)))
    assert any(agreed.reason in note for note in done.notes)


def test_two_guesses_can_be_exchanged_and_no_choice_is_no_warning(machine: Machine) -> None:
    with machine.root(writable=True) as root:
        (root / "etc/network/interfaces.d").mkdir()
        (root / "etc/network/interfaces.d/b").write_text("auto ens4\niface ens4 inet dhcp\n")
    machine.adapt(Network((OLD, OLD_2), (NEW, NEW_2)))
    first, second = [each for each in machine.events if isinstance(each, Warn) and "network" in each.text]
    assert f"--nic ens3={NEW_2.mac}" in first.hint
    assert f"--nic ens4={NEW.mac}" in second.hint
    machine.events.clear()
    machine.adapt(Network((OLD, OLD_2), (NEW, NEW_2), chosen=(Choice(OLD, None), Choice(OLD_2, NEW))))
    assert not [each for each in machine.events if isinstance(each, Warn) and "network" in each.text]


def test_no_card_at_all(machine: Machine) -> None:
    done = machine.adapt(Network((OLD,), ()))
    assert LINK not in {change.path for change in done.changes}
    assert any("has become no card of this machine: none is left" in note for note in done.notes)


def test_dhcp_servers_have_to_be_told(tmp_path: Path) -> None:
    done = make_machine(tmp_path, UBUNTU_CLOUD).adapt(Network((OLD,), (NEW,)))
    assert any("has to be told b4:45:06:aa:bb:01 instead of 52:54:00:12:34:56" in note for note in done.notes)


def test_links_that_lead_out_are_not_followed_and_odd_files_do_no_harm(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    machine = make_machine(tmp_path, DEBIAN)
    with machine.root(writable=True) as root:
        (root / "etc/systemd").mkdir()
        (root / "etc/systemd/network").symlink_to(f"../../../../../../../..{outside}")
        (root / "etc/netplan").mkdir()
        (root / "etc/netplan/a.yaml").symlink_to(f"{outside}/a.yaml")
        os.mkfifo(root / "etc/netplan/b.yaml")
        (root / "etc/netplan/c.yaml").mkdir()
        (root / "etc/network/interfaces.d").write_text("no folder")
        (root / "etc/udev").mkdir()
        (root / "etc/udev/rules.d").symlink_to("rules.d")
    (outside / "a.yaml").write_text("network: {ethernets: {ens3: {match: {macaddress: '52:54:00:12:34:56'}}}}\n")
    with pytest.raises(RemetalError, match="cannot write"):
        machine.adapt(Network((OLD,), (NEW,)))
    assert [each.name for each in outside.iterdir()] == ["a.yaml"]
    assert "52:54" in (outside / "a.yaml").read_text()


def test_a_new_file_has_the_label_of_its_neighbours(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, {**DEBIAN, "/etc/udev/rules.d/a.rules": "# x\n"})
    with machine.root(writable=True) as root:
        os.setxattr(root / "etc", "security.selinux", b"system_u:object_r:etc_t:s0\0")
        os.setxattr(root / "etc/udev/rules.d", "security.selinux", b"folder\0")
        os.setxattr(root / "etc/udev/rules.d/a.rules", "security.selinux", b"neighbour\0")
        create_inside(root, "/etc/udev/rules.d/new.rules", b"1")
        create_inside(root, "/etc/systemd/network/new.link", b"2")
        create_inside(root, "/etc/systemd/network/new.link", b"3")
        labels = [
            os.getxattr(root / path, "security.selinux")
            for path in (
                "etc/udev/rules.d/new.rules",
                "etc/systemd",
                "etc/systemd/network",
                "etc/systemd/network/new.link",
            )
        ]
        assert labels == [b"neighbour\0", *[b"system_u:object_r:etc_t:s0\0"] * 3]
        assert (root / "etc/systemd/network/new.link").read_bytes() == b"3"


def test_what_stands_in_the_way_of_a_new_file_is_told(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/file").write_text("")
    (root / "etc/link").symlink_to("/nowhere")
    for path in ("/etc/file/x", "/etc/link", "/etc"):
        with pytest.raises(RemetalError, match="cannot write"):
            create_inside(root, path, b"x")
    assert sorted(each.name for each in (root / "etc").iterdir()) == ["file", "link"]
    rename_inside(root, "/etc/file", "/etc/other")
    for old, new in (("/etc/other", "/etc/link"), ("/etc/file", "/etc/x")):
        with pytest.raises(RemetalError):
            rename_inside(root, old, new)


def test_a_full_file_system_ends_with_the_reason(machine: Machine) -> None:
    with machine.root(writable=True) as root:
        for size in (MIB, 4096):
            with suppress(OSError):
                for number in range(100_000):
                    (root / f"etc/{size}-{number}").write_bytes(b"x" * size)
    with pytest.raises(RemetalError, match="No space left") as raised:
        machine.adapt(Network((OLD,), (NEW,)))
    assert "Make room" in raised.value.hint
    with machine.root() as root:
        assert not (root / LINK.lstrip("/")).exists()


def test_a_systemd_is_told_by_its_library(tmp_path: Path) -> None:
    for number, (files, udev) in enumerate(
        [
            (("/lib/systemd/systemd-udevd", "/lib/systemd/libsystemd-shared-247.so"), Udev("systemd", 247)),
            ((SYSTEMD, "/usr/lib/systemd/libsystemd-shared-252-18.el9_2.so"), Udev("systemd", 252)),
            ((SYSTEMD, "/usr/lib64/systemd/libsystemd-shared-256.5-1.so"), Udev("systemd", 256)),
            ((SYSTEMD, "/usr/lib/aarch64-linux-gnu/systemd/libsystemd-shared-257.so"), Udev("systemd", 257)),
            ((SYSTEMD,), Udev("systemd", 0)),
            (("/sbin/udevd", "/lib/libudev.so.1.6.3"), Udev("eudev", 0)),
            (("/sbin/udevd", "/lib64/libudev.so.0.5.1"), Udev("udev", 182)),
            (("/sbin/mdev",), Udev()),
        ]
    ):
        system = make_system(tmp_path / str(number), dict.fromkeys(files, ""), systemd=0)
        assert probe_udev(system.root) == udev
