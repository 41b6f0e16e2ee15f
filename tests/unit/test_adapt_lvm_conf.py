"""The plans for the restored lvm.conf and devices file, and what LVM itself sees by them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from remetal.adapt.identity import Gone, Identities, Named, Place
from remetal.adapt.lvm_conf import plan_lvm_conf
from remetal.adapt.lvm_devices import choose_device_id, hash_entries, plan_lvm_devices
from remetal.adapt.lvm_filter import PatternError, accepts, parse_rules
from remetal.ondisk.lvm_config import find_entry, parse_config
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.units import MIB
from tests.adapt_identities import ARRAY, LUKS, NEW, NEW_ARRAY, PV, SERVER, WWID, make, with_new, without_luks

PVID = PV.replace("-", "")
LINK = f"a|^/dev/disk/by-id/lvm-pv-uuid-{PV}$|"
NODE = "a|^/dev/nvme0n1p3$|"
MOVED = Identities((make("pv", 3, PV, lasting=()),))
FULL = Path("/etc/lvm/lvm.conf")

SOME = """\
# This is an example configuration file for the LVM2 system.
config {
\tchecks = 1
}
devices {
\tdir = "/dev"
\t# filter = [ "a|.*|" ]
\t%s
}
activation { volume_list = [ "vg0" ] }
"""


def plan(text: str, identities: Identities = MOVED) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    done = plan_lvm_conf(text, identities)
    assert bool(done.changes) == (done.text != text) == bool(done.diff)
    again = plan_lvm_conf(done.text, identities)
    assert (again.text, again.changes) == (done.text, ())
    return done.text, done.changes, done.notes


@pytest.mark.parametrize(
    "line",
    [
        'filter = [ "a|.*|" ]',
        'filter = [ "r|/dev/cdrom|" ]',
        'filter = [ "a|^/dev/nvme|", "r|.*|" ]',
        'filter = [ "a|/dev/sd|", "a|/dev/disk/by-id/lvm-pv-uuid|", "r|.*|" ]',
        'filter = "a/.*/"',
        "filter = []",
        'global_filter = [ "r|^/dev/drbd|" ]',
        'filter = [ "r|^/dev/sda3|" ]',
        'filter = [ "a|^/dev/sdz|", "r|.*|" ]',
        'filter = [ "a|^/dev/sda(|", "r|.*|" ]',
        "filter = 5",
    ],
)
def test_a_filter_that_lets_the_volume_through_or_hid_it_before_is_left_alone(line: str) -> None:
    text = SOME % line
    assert plan(text) == (text, (), ())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('filter = [ "a|^/dev/sda|", "r|.*|" ]', 'filter = [ "LINK", "NODE", "a|^/dev/sda|", "r|.*|" ]'),
        ('filter=["a|^/dev/sda3$|",\n\t\t"r|.*|"] # x', 'filter=[ "LINK", "NODE","a|^/dev/sda3$|",\n\t\t"r|.*|"] # x'),
        ('global_filter = [ "r|^/dev/nv.*|" ]', 'global_filter = [ "LINK", "NODE", "r|^/dev/nv.*|" ]'),
        ("filter = 'r|nvme|'", "filter = [ \"LINK\", \"NODE\", 'r|nvme|' ]"),
        ('filter = [ "a|/dev/disk/by-id/ata-.*S3Z9|", "r/.*/" ]',
         'filter = [ "LINK", "NODE", "a|/dev/disk/by-id/ata-.*S3Z9|", "r/.*/" ]'),
        ('"filter" = [ "a|sda|", "r|n|" ]', '"filter" = [ "LINK", "NODE", "a|sda|", "r|n|" ]'),
        ('filter = [ "r|x|" ]\n\tfilter = [ "a|sda|", "r|.|" ]',
         'filter = [ "r|x|" ]\n\tfilter = [ "LINK", "NODE", "a|sda|", "r|.|" ]'),
    ],
)  # fmt: skip
def test_a_filter_that_hides_the_volume_lets_it_through(line: str, expected: str) -> None:
    new, changes, notes = plan(SOME % line)
    assert new == SOME % expected.replace("LINK", LINK).replace("NODE", NODE)
    assert (len(changes), notes) == (1, ())
    assert PV in changes[0]


def test_both_filters_and_flat_names() -> None:
    text = 'devices/filter = [ "a|sda|", "r|.*|" ]\ndevices/global_filter = [ "r|nvme|" ]\n'
    new, changes, _ = plan(text)
    assert new == text.replace("[ ", f'[ "{LINK}", "{NODE}", ')
    assert len(changes) == 2


def test_a_filter_that_stands_nowhere_to_be_seen_is_told() -> None:
    text = SOME % 'filter # = [\n = [ "a|sda|", "r|.*|" ]'
    new, changes, notes = plan(text)
    assert (new, changes, len(notes)) == (text, (), 1)
    assert LINK in notes[0]


def test_hardware_that_nobody_knows_yet() -> None:
    unknown = Identities((make("pv", 3, PV, lasting=(), place=None),))
    text = SOME % 'filter = [ "a|^/dev/sda|", "r|.*|" ]'
    assert plan(text, unknown)[0] == SOME % f'filter = [ "{LINK}", "a|^/dev/sda|", "r|.*|" ]'
    stays = Identities((make("pv", 3, PV, lasting=(), place=None, moved=False),))
    assert plan(text, stays) == (text, (), ())


def test_a_volume_that_came_out_of_its_container() -> None:
    text = SOME % 'filter = [ "a|^/dev/mapper/|", "r|.*|" ]'
    assert plan(text, SERVER) == (text, (), ())
    named = Identities(
        tuple(
            replace(each, names=("/dev/mapper/cryptlvm",)) if each.kind == "pv" else each
            for each in without_luks().volumes
        )
    )
    assert LINK in plan(text, named)[0]


def test_the_whole_text_of_the_distribution_stays() -> None:
    text = FULL.read_text()
    assert plan(text) == (text, (), ())
    own = text.replace('\t# filter = [ "a|.*|" ]', '\tfilter = [ "a|^/dev/sda|", "r|.*|" ]', 1)
    assert own != text
    new, changes, _ = plan(own)
    assert len(changes) == 1
    assert len(new.splitlines()) == len(own.splitlines())
    assert find_entry(parse_config(new), "devices", "filter") == (LINK, NODE, "a|^/dev/sda|", "r|.*|")


DEVICES = f"""\
# LVM uses devices listed in this file.
# Created by LVM command vgimportdevices pid 4711 at Thu Nov 26 07:56:02 2026
# HASH=HHHH
PRODUCT_UUID=4c4c4544-0042-4e10-8053-b7c04f384e32
VERSION=1.1.3
IDTYPE=sys_wwid IDNAME=naa.5002538e40a1b2c3 DEVNAME=/dev/sda3 PVID={PVID} PART=3
IDTYPE=sys_wwid IDNAME=naa.5000c500a1b2c3d4 DEVNAME=/dev/sdq PVID=Qv5oBc1a2b3C4d5E6f7g8H9i0JKlMnOp
"""


def devices(text: str, identities: Identities = MOVED) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    done = plan_lvm_devices(text, identities)
    assert bool(done.changes) == (done.text != text) == bool(done.diff)
    again = plan_lvm_devices(done.text, identities)
    assert (again.text, again.changes) == (done.text, ())
    return done.text, done.changes, done.notes


def test_an_entry_follows_its_volume_to_the_new_disk_and_the_checksum_stays_right() -> None:
    text = DEVICES.replace("HHHH", str(hash_entries(DEVICES)))
    new, changes, notes = devices(text)
    expected = text.replace(
        "IDTYPE=sys_wwid IDNAME=naa.5002538e40a1b2c3 DEVNAME=/dev/sda3",
        f"IDTYPE=sys_wwid IDNAME={WWID} DEVNAME=/dev/nvme0n1p3",
    )
    assert new == expected.replace(str(hash_entries(text)), str(hash_entries(expected)))
    assert hash_entries(new) != hash_entries(text)
    assert changes == (f"the physical volume {PVID} is listed as IDTYPE=sys_wwid IDNAME={WWID} DEVNAME=/dev/nvme0n1p3",)
    assert notes == ()


@pytest.mark.parametrize("value", ["0", "1234567890", "99999999999999999999", "x"])
def test_a_checksum_that_was_not_right_is_left_alone(value: str) -> None:
    text = DEVICES.replace("HHHH", value)
    assert f"# HASH={value}\n" in devices(text)[0]


def test_the_partition_number_comes_and_goes() -> None:
    whole = Identities((make("pv", 3, PV, place=Place(devices=("/dev/vdb",))),))
    line = f"IDTYPE=devname IDNAME=/dev/vdb DEVNAME=/dev/vdb PVID={PVID}\n"
    assert devices(DEVICES, whole)[0].splitlines(keepends=True)[5] == line
    assert devices(line)[0] == f"IDTYPE=sys_wwid IDNAME={WWID} DEVNAME=/dev/nvme0n1p3 PVID={PVID} PART=3\n"


def test_other_disks_other_places_and_volumes_that_are_gone() -> None:
    stays = Identities((make("pv", 3, PV, moved=False),))
    assert devices(DEVICES, stays) == (DEVICES, (), ())
    new, changes, notes = devices(DEVICES, Identities((make("pv", 3, PV, place=None),)))
    assert (new, changes, len(notes)) == (DEVICES, (), 1)
    gone = Identities(gone=(Gone(space="sda:3", kind="pv", uuid=PV, why="the disk was left out"),))
    new, changes, notes = devices(DEVICES, gone)
    assert (new, changes) == (DEVICES, ())
    assert "lvmdevices --delpvid" in notes[0]


def test_entries_by_array_and_container() -> None:
    uuid = "3aaa0122-2982-7cfa-5331-ad66ca767371"
    md = f"IDTYPE=md_uuid IDNAME={uuid} DEVNAME=/dev/md0 PVID={PVID}\n"
    assert devices(md, SERVER) == (md, (), ())
    changed = with_new(SERVER, "md", ARRAY, NEW_ARRAY)
    assert devices(md, changed)[0] == md.replace(uuid, "01234567-89ab-cdef-0123-456789abcdef")
    name = f"CRYPT-LUKS2-{LUKS.replace('-', '')}-cryptlvm"
    crypt = f"IDTYPE=crypt_uuid IDNAME={name} DEVNAME=/dev/mapper/cryptlvm PVID={PVID}\n"
    assert devices(crypt, SERVER) == (crypt, (), ())
    renewed = with_new(SERVER, "luks", LUKS, NEW)
    assert devices(crypt, renewed)[0] == crypt.replace(LUKS.replace("-", ""), NEW.replace("-", ""))
    bare = f"IDTYPE=sys_wwid IDNAME={WWID} DEVNAME=/dev/nvme0n1p3 PVID={PVID} PART=3\n"
    assert devices(crypt, without_luks())[0] == bare


def test_a_pvid_that_changed() -> None:
    other = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-gggggg"
    identities = Identities((make("pv", 3, PV, moved=False, new_uuid=other),))
    assert devices(DEVICES, identities)[0] == DEVICES.replace(PVID, other.replace("-", ""))


@pytest.mark.parametrize(
    ("wwid", "serial", "expected"),
    [
        ("naa.5000c500a1b2c3d4", "S1", ("sys_wwid", "naa.5000c500a1b2c3d4")),
        ("t10.ATA     SAMSUNG  S1", "", ("sys_wwid", "t10.ATA_____SAMSUNG__S1")),
        ("t10.ATA     QEMU HARDDISK   QM00001", "QM00001", ("devname", "/dev/sdb2")),
        ("", "WD 1", ("sys_serial", "WD_1")),
        ("", "", ("devname", "/dev/sdb2")),
    ],
)
def test_what_a_disk_is_listed_by(wwid: str, serial: str, expected: tuple[str, str]) -> None:
    assert choose_device_id(Place(devices=("/dev/sdb2",), wwid=wwid, serial=serial, part=2)) == expected


# From here on LVM judges.


@dataclass(frozen=True)
class Lvm:
    """LVM with a configuration of its own that sees two volumes, each under several names of our choice."""

    folder: Path
    names: tuple[tuple[str, ...], ...]

    def run(self, *argv: str, config: str = "") -> str:
        """Run an LVM command and return what it says."""
        env = {**os.environ, "LVM_SYSTEM_DIR": str(self.folder / "etc"), "LVM_SUPPRESS_FD_WARNINGS": "1"}
        config = f"devices {{ {config} }}"
        done = subprocess.run([*argv, "--config", config], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def seen(self, config: str) -> list[bool]:
        """Return which of the volumes LVM sees."""
        found = self.run("pvs", "--noheadings", "--options", "pv_uuid", config=config).split()
        return [uuid in found for uuid in (PV, "Zv5oBc-1a2b-3C4d-5E6f-7g8H-9i0J-KlMnOp")]


@pytest.fixture(scope="module")
def lvm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lvm]:
    folder = tmp_path_factory.mktemp("lvm")
    (folder / "dev").mkdir()
    (folder / "etc").mkdir()
    (folder / "etc/lvm.conf").write_text(
        f'devices {{ dir="{folder}/dev" scan=["{folder}/dev"] obtain_device_list_from_udev=0 hints="none" }}\n'
    )
    names = tuple(tuple(f"{folder}/dev/{name}" for name in each) for each in (("sda3", "by-id.x"), ("nvme0n1p1",)))
    with ExitStack() as stack:
        for index, each in enumerate(names):
            image = folder / f"{index}.img"
            with image.open("wb") as file:
                file.truncate(16 * MIB)
            loop = stack.enter_context(attach_loop(Span(image, 0, 16 * MIB), writable=True))
            for name in each:
                Path(name).symlink_to(loop)
        it = Lvm(folder, names)
        for each, uuid in zip(names, (PV, "Zv5oBc-1a2b-3C4d-5E6f-7g8H-9i0J-KlMnOp"), strict=True):
            it.run("pvcreate", "--norestorefile", "--uuid", uuid, each[0])
        yield it


@pytest.mark.parametrize(
    "entries",
    [
        ["a|.*|"],
        ["r|.*|"],
        ["a|sda|", "r|.*|"],
        ["r|sda|"],
        ["r|sda|", "r|by-id|"],
        ["a|x|", "r|by-id|"],
        ["a|dev/sda3.|", "r|.*|"],
        ["a|by-id[.]x$|", "r|.*|"],
        ["a|by-id\\.[w-y]$|", "r|.*|"],
        ["a|/[^n][^/]*$|", "r|.*|"],
        ["a|(sd|nv)[a-z]+[0-9]|", "r|.*|"],
        ["a|nv(me)?0n+1p1|", "r|.*|"],
        ["a|sd(a3)+(xx)*$|", "r|.|"],
        ["a{sda}", "r(.*)"],
        ["a/nvme0n1p[1-9]*$/", "r/.*/"],
        ["a|^/dev/sda3|", "r|.*|"],
        ["a|]|", "r|[a-z3-]]|"],
        ["a|sda[^4].|", "r|.*|"],
        ["r|3$|", "a|nvme|", "r|.*|"],
    ],
)
def test_filters_are_decided_as_lvm_decides(lvm: Lvm, entries: Sequence[str]) -> None:
    words = ", ".join('"' + each.replace("\\", "\\\\") + '"' for each in entries)
    rules = parse_rules(entries)
    assert [accepts(rules, names) for names in lvm.names] == lvm.seen(f"filter = [ {words} ]")


@pytest.mark.parametrize("entry", ["a|x", "b|x|", "a||", "a|(x|", "a|*x|", "a|[x|", "a|[a-]|", "a|x\\|", ""])
def test_patterns_that_lvm_refuses(lvm: Lvm, entry: str) -> None:
    with pytest.raises(PatternError):
        parse_rules([entry])
    words = entry.replace("\\", "\\\\")
    with pytest.raises(AssertionError):
        lvm.run("pvs", config=f'filter = [ "{words}" ]')


@pytest.mark.parametrize("entry", ["a|x)|", "a|x(|)|"])
def test_patterns_that_mean_nothing_are_not_believed(entry: str) -> None:
    with pytest.raises(PatternError):
        parse_rules([entry])


def test_no_pattern_takes_long() -> None:
    with pytest.raises(PatternError):
        parse_rules([f"a|{'(' * 200}x{')' * 200}|"])
    rules = parse_rules([f"a|{'(a*)*' * 60}b|", f"r|{'.*' * 400}x|"])
    assert accepts(rules, ["/dev/" + "a" * 200])


def test_lvm_sees_the_volume_again_by_the_planned_filter(lvm: Lvm) -> None:
    """The filter names the first volume's nodes; restored, it stands where the second one is now."""
    uuid = "Zv5oBc-1a2b-3C4d-5E6f-7g8H-9i0J-KlMnOp"
    volume = Named(space="sda:3", kind="pv", uuid=uuid, names=lvm.names[0], place=Place(devices=lvm.names[1]))
    old = 'filter = [ "a|sda|", "r|.*|" ]'
    assert lvm.seen(old) == [True, False]
    done = plan_lvm_conf(f"devices {{ {old} }}", Identities((volume,)))
    assert lvm.seen(done.text[len("devices {") : -1]) == [True, True]


def test_lvm_sees_the_volume_again_by_the_planned_devices_file(lvm: Lvm) -> None:
    file = lvm.folder / "etc/devices/system.devices"
    file.parent.mkdir()
    text = f"VERSION=1.1.1\nIDTYPE=sys_wwid IDNAME=naa.5 DEVNAME=/dev/sda3 PVID={PVID} PART=3\n"
    file.write_text(text)
    assert lvm.seen("use_devicesfile = 1") == [False, False]
    node = lvm.names[0][1]  # of equal names LVM prefers the least
    volume = Named(space="sda:3", kind="pv", uuid=PV, names=("/dev/sda3",), place=Place(devices=(node,)), moved=True)
    file.write_text(devices(text, Identities((volume,)))[0])
    assert lvm.seen("use_devicesfile = 1") == [True, False]


def test_the_checksum_is_lvms_own(lvm: Lvm) -> None:
    """The label of a physical volume carries the same sum over its bytes from 20 on."""
    with Path(lvm.names[0][0]).open("rb") as device:
        label = device.read(1024)[512:]
    assert label.startswith(b"LABELONE")
    text = label[20:].decode("utf-8", "surrogateescape")
    assert hash_entries(text) == int.from_bytes(label[16:20], "little")
