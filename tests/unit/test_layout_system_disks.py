"""Which disks the running system uses: by where and how they are mounted, and by what sort of disk they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remetal.errors import RefusedError
from remetal.events import Event, Note
from remetal.layout import system_disks
from remetal.layout.disks import find_disks
from remetal.layout.identity import is_fixed
from remetal.layout.system_disks import find_named_places, find_system_disks, parse_unit_place
from remetal.layout.uses import disks_of_number
from remetal.system.mounts import parse_fstab_places, parse_mountinfo
from tests.machines.record import rebuild

RAW = Path(__file__).parents[1] / "machines/raw"

MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 8:2 / /boot/efi rw - vfat /dev/sda2 rw
24 22 0:22 / /proc rw - proc proc rw
"""
"""The mounts of a system on one disk. The numbers of another one's partitions go up from 8:17, of a third from 8:33."""


class Machine:
    """One with three disks, of which `sdc` comes and goes, and what was told of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root
        self.mounts = MOUNTS
        self.said: list[Event] = []
        self.swaps: list[Path] = []
        patch = monkeypatch.setattr
        patch(system_disks, "probe_mounts", lambda: parse_mountinfo(self.mounts))
        patch(system_disks, "find_mount_of", self._mount_of)
        patch(system_disks, "numbers_of_mount", lambda mount: {mount.device})
        patch(
            system_disks, "disks_of_number", lambda number: {f"sd{'abc'[number[1] // 16]}"} if number[0] == 8 else set()
        )
        patch(system_disks, "probe_swaps", list)
        patch(system_disks, "find_covered", dict)
        patch(system_disks, "find_disk_names", lambda: ["sda", "sdb", "sdc"])
        patch(system_disks, "is_fixed", lambda name: name != "sdc")
        named = system_disks.find_named_places
        patch(system_disks, "find_named_places", lambda: named(root))

    def _mount_of(self, path: Path) -> object:
        found = [each for each in parse_mountinfo(self.mounts) if path.is_relative_to(each.target)]
        return max(found, key=lambda each: len(each.target.parts))

    def mount(self, number: int, place: str | Path, kind: str = "ext4") -> None:
        """Mount what has this minor number."""
        self.mounts += f"30 22 8:{number} / {place} rw - {kind} /dev/sd rw\n"

    def write(self, name: str, text: str) -> None:
        """Write a file of the system."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def disks(self, repository: str | Path | None = None) -> list[str]:
        """Return what would be captured; what is told of the others is in `said`."""
        where = None if repository is None else Path(repository)
        self.said.clear()
        return [path.name for path in find_system_disks(where, self.said.append)]

    def told(self) -> str:
        """Return the one note that was told."""
        (said,) = self.said
        assert isinstance(said, Note)
        return said.text


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_disks_of_this_machine() -> None:
    names = {path.name for path in find_disks()}
    assert not {name for name in names if name.startswith(("loop", "zram", "ram", "dm-", "sr"))}
    try:
        system = find_system_disks()
    except RefusedError as error:
        assert "--disk" in error.hint  # noqa: PT017 - a machine that runs from memory has none
        return
    assert set(system) <= set(find_disks())
    number = Path("/").stat().st_dev
    assert {path.name for path in system} >= disks_of_number((os.major(number), os.minor(number))) & names


@pytest.mark.parametrize("place", ["/data", "/data/", "//data//", "/srv/../data/.", "/da\\164a"])
def test_a_disk_that_fstab_names_is_the_systems_however_it_is_written(machine: Machine, place: str) -> None:
    machine.write("etc/fstab", f"# <device> <place>\nUUID=11-22\t {place} \text4 noauto\nUUID=3 none swap\n")
    machine.mount(33, "/data")
    assert machine.disks() == ["sda", "sdc"]
    assert machine.said == []


def test_a_disk_that_fstab_names_by_a_link_is_the_systems(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/data")
    machine.write("etc/fstab", f"UUID=1 {tmp_path}/link/files ext4\n")
    machine.mount(33, "/data/files")
    assert machine.disks() == ["sda", "sdc"]


def test_a_disk_at_a_place_with_a_blank_in_its_name_is_the_systems(machine: Machine) -> None:
    machine.write("etc/fstab", "UUID=1 /our\\040files/ xfs defaults 0 2\n")
    machine.mount(33, "/our\\040files", "xfs")
    assert machine.disks() == ["sda", "sdc"]


@pytest.mark.parametrize(
    "folder", ["etc/systemd/system", "run/systemd/system", "run/systemd/generator", "usr/lib/systemd/system"]
)
def test_a_disk_that_a_mount_unit_names_is_the_systems(machine: Machine, folder: str) -> None:
    machine.write(f"{folder}/var-lib-my\\x2ddata.mount", "[Mount]\nWhat=/dev/sdc1\n")
    machine.mount(33, "/var/lib/my-data")
    assert machine.disks() == ["sda", "sdc"]


def test_what_systemd_makes_of_a_mount_by_hand_names_nothing(machine: Machine) -> None:
    machine.write("run/systemd/transient/mnt.mount", "[Mount]\nWhat=/dev/sdc1\n")
    machine.mount(33, "/mnt")
    assert machine.disks() == ["sda"]


def test_a_built_in_disk_that_is_mounted_by_other_means_is_the_systems(machine: Machine) -> None:
    machine.mount(17, "/var/lib/postgresql")
    assert machine.disks() == ["sda", "sdb"]
    assert machine.said == []


@pytest.mark.parametrize("place", ["/media/me/Old", "/run/media/me/Old", "/tmp/tmp.x1", "/var/tmp/look"])
def test_a_built_in_disk_that_is_mounted_for_a_while_is_told_of(machine: Machine, place: str) -> None:
    machine.mount(17, place, "ntfs3")
    assert machine.disks() == ["sda"]
    assert f"/dev/sdb (mounted at {place}) is not captured" in machine.told()
    assert "name every disk with --disk" in machine.told()


@pytest.mark.parametrize("place", ["/mnt", "/media/me/USB", "/run/media/me/USB", "/backup"])
def test_a_disk_that_comes_and_goes_is_told_of(machine: Machine, place: str) -> None:
    machine.mount(33, place)
    machine.mount(34, "/mnt/second")
    assert machine.disks() == ["sda"]
    assert "neither fstab nor a mount unit" in machine.told()
    assert place in machine.told()
    assert "/mnt/second" in machine.told()


def test_what_is_not_mounted_is_neither_captured_nor_told_of(machine: Machine) -> None:
    """As a disk that a virtual machine has, or one that fstab names and nobody has mounted."""
    machine.write("etc/fstab", "/dev/sdb1 /data ext4 noauto\n")
    assert machine.disks() == ["sda"]
    assert machine.said == []


def test_the_disk_that_the_repository_is_mounted_from_is_told_of(machine: Machine, tmp_path: Path) -> None:
    machine.write("etc/fstab", f"/dev/sdb1 {tmp_path} ext4 defaults\n")
    machine.mount(17, tmp_path)
    assert machine.disks() == machine.disks("/srv/backup") == ["sda", "sdb"]
    assert machine.disks(tmp_path / "backup") == ["sda"]
    assert machine.told() == f"/dev/sdb (mounted at {tmp_path}) is not captured: the repository lies on it"


def test_what_else_is_mounted_by_hand_from_the_repositorys_disk_is_told_of(machine: Machine) -> None:
    machine.mount(17, "/backup")
    machine.mount(18, "/other")
    assert machine.disks("/backup/remetal") == ["sda"]
    assert "/dev/sdb (mounted at /backup, /other) is not captured: the repository" in machine.told()


def test_what_the_system_has_on_the_repositorys_disk_is_captured_so_that_the_repository_is_refused(
    machine: Machine,
) -> None:
    machine.mount(17, "/backup")
    machine.mount(18, "/home")
    assert machine.disks("/backup/remetal") == ["sda", "sdb"]


def test_a_root_that_is_no_disk(machine: Machine) -> None:
    """As in a container, where files and folders of its host's disks are mounted."""
    machine.mounts = "22 1 0:44 / / rw,relatime - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w\n"
    machine.mount(1, "/etc/hosts")
    machine.mount(17, "/var/lib/postgresql")
    machine.mount(18, "/srv")
    with pytest.raises(RefusedError, match="its root is of the kind overlay") as raised:
        machine.disks()
    assert "run remetal there" in raised.value.hint


def test_a_root_in_memory_whose_fstab_names_disks(machine: Machine) -> None:
    machine.mounts = "22 1 0:44 / / rw,relatime - tmpfs none rw\n"
    machine.write("etc/fstab", "none / tmpfs\n/dev/sda1 /boot ext4\n/dev/sda2 /kept ext4\n")
    machine.mount(1, "/boot")
    machine.mount(2, "/kept")
    machine.mount(17, "/var/lib/postgresql")
    assert machine.disks() == ["sda"]
    assert "/dev/sdb (mounted at /var/lib/postgresql) is not captured" in machine.told()


def test_what_fstab_says() -> None:
    text = "  # LABEL=a /a\n#b /b\n\n  LABEL=d /d\nLABEL=e\tnone swap\nLABEL=f\n/dev/g /g\\040\\303\\244\u00a0g/ auto"
    assert parse_fstab_places(text) == [Path("/d"), Path("/g ä\u00a0g")]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=80))
def test_whatever_fstab_says_is_parsed(text: str) -> None:
    for place in parse_fstab_places(text):
        assert place.is_absolute()
        assert ".." not in place.parts


def test_where_mount_units_mount() -> None:
    """As `systemd-escape --path --suffix=mount` names them."""
    places = {
        "-": "/",
        "var-lib-postgresql": "/var/lib/postgresql",
        r"srv-a\x2db-c\x20d": "/srv/a-b/c d",
        r"m\xc3\xa4h": "/mäh",
    }
    for name, place in places.items():
        assert parse_unit_place(f"{name}.mount") == Path(place)


def test_a_system_without_fstab_names_no_places(tmp_path: Path) -> None:
    assert find_named_places(tmp_path) == set()


def test_which_recorded_disks_are_built_in(tmp_path: Path) -> None:
    rebuild(json.loads((RAW / "qemu-q35.json").read_text())["tree"], tmp_path)
    names = ("sda", "sdb", "sdc", "vda", "mmcblk0", "nvme0n1")
    assert [name for name in names if not is_fixed(name, tmp_path / "sys")] == ["sdc"]


@pytest.mark.parametrize(
    ("told", "fixed"),
    [
        ({"block/sda/removable": "0", "block/sda/ro": "0", "removable": "fixed"}, True),
        ({"block/sda/removable": "1"}, False),
        ({"block/sda/ro": "1"}, False),
        ({"block/sda/device/type": "SD"}, False),
        ({"block/sda/device/type": "MMC"}, True),
        ({"removable": "removable"}, False),
    ],
)
def test_what_a_disk_says_of_coming_and_going(tmp_path: Path, told: dict[str, str], fixed: bool) -> None:
    """As a card reader, a write-protected disk, a card, an eMMC, and what stands in a Thunderbolt box say it."""
    place = tmp_path / "devices/pci0000:00/0000:05:00.0"
    (tmp_path / "block").mkdir()
    for name, text in told.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"{text}\n")
    (tmp_path / "block/sda").symlink_to(place / "block/sda")
    assert is_fixed("sda", tmp_path) == fixed
