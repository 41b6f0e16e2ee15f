"""Reading, planning and overwriting the files that name storage: on a real ext4, on a real FAT, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from remetal.adapt.fat_files import probe_fat, read_fat_file
from remetal.adapt.identities import probe_mappings
from remetal.adapt.identity import Identities
from remetal.adapt.places import probe_place
from remetal.adapt.restored import Restored
from remetal.adapt.rooted import list_inside, overwrite_inside
from remetal.adapt.roots import find_systems
from remetal.adapt.storage_files import (
    adapt_esp_files,
    adapt_storage_files,
    probe_storage_files,
)
from remetal.errors import RemetalError
from remetal.events import silent
from remetal.layout.model import Layout
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from tests.adapt_disks import ESP, LINUX, ext4, layout_of, make_esp, make_ext4, partition, read_table, sh, vfat
from tests.adapt_identities import ARRAY, BOOT, LUKS, ROOT, SERVER, SWAP, without_array, without_luks

FILES = {
    "etc/fstab": "",
    "etc/os-release": "ID=debian\n",
    "etc/crypttab": "cryptlvm /dev/sda3 none luks\n",
    "etc/mdadm/mdadm.conf": f"ARRAY /dev/md/0 UUID={ARRAY}\n",
    "etc/lvm/lvm.conf": "devices { }\n",
    "etc/initramfs-tools/conf.d/resume": "RESUME=/dev/sda4\n",
    "etc/initramfs-tools/conf.d/driver-policy": "MODULES=most\n",
    "etc/default/grub": 'GRUB_CMDLINE_LINUX="resume=/dev/sda4"\n',
    "etc/default/grub.d/50-cloud.cfg": 'GRUB_CMDLINE_LINUX_DEFAULT="root=/dev/sda2"\n',
    "etc/dracut.conf.d/x.conf": 'add_device+=" /dev/sda4 "\n',
    "etc/dracut.conf.d/x.bak": 'add_device+=" /dev/sda4 "\n',
    "etc/kernel/cmdline": "root=/dev/sda2 ro\n",
    "boot/loader/entries/a.conf": "linux /x\ninitrd /y\noptions root=/dev/sda2\n",
    "boot/grub/grub.cfg": "\tlinux /vmlinuz root=/dev/sda2 ro\n\tinitrd /x\n",
}


def make_root(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@dataclass
class Machine:
    """A disk file with an installed system on one ext4."""

    disk: Path
    layout: Layout

    def adapt(self, identities: Identities = SERVER) -> tuple[list[str], tuple[str, ...], int]:
        targets: dict[str, Path] = {"sda": self.disk}
        restored = Restored(source=self.layout, result=self.layout, devices=targets)
        (system,) = find_systems(restored, silent)
        done = adapt_storage_files(replace(system, identities=identities), restored)
        return [change.path for change in done.changes], done.notes, done.bytes_written


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    disk = tmp_path / "disk.img"
    partition(disk, 32 * MIB, f"label: gpt\nsize=24M,type={LINUX}\n")
    make_ext4(disk, read_table(disk, "sda").partitions[0], make_root(tmp_path / "root", FILES))
    return Machine(disk, layout_of(disk, {1: ext4(1)}))


def test_only_what_changes_is_written_and_the_files_stay_the_same_files(machine: Machine) -> None:
    _, start, size = machine.layout.place("sda:1")
    span = Span(machine.disk, start, size)
    with attach_loop(span, writable=True) as loop, mounted(loop) as root:
        (root / "etc/crypttab").chmod(0o600)
        before = {name: ((root / name).stat().st_ino, (root / name).stat().st_mode) for name in FILES}
    paths, notes, written = machine.adapt()
    assert paths == [
        "/etc/crypttab",
        "/etc/initramfs-tools/conf.d/resume",
        "/etc/dracut.conf.d/x.conf",
        "/etc/default/grub",
        "/etc/default/grub.d/50-cloud.cfg",
        "/etc/kernel/cmdline",
        "/boot/loader/entries/a.conf",
        "/boot/grub/grub.cfg",
    ]
    assert "unified kernel images" in notes[0]
    with attach_loop(span) as loop, mounted(loop, options=["ro", "noload"]) as root:
        assert (root / "etc/crypttab").read_text() == f"cryptlvm UUID={LUKS} none luks\n"
        assert (root / "etc/kernel/cmdline").read_text() == f"root=UUID={BOOT} ro\n"
        assert (root / "etc/dracut.conf.d/x.bak").read_text() == FILES["etc/dracut.conf.d/x.bak"]
        assert {name: ((root / name).stat().st_ino, (root / name).stat().st_mode) for name in FILES} == before
        assert written == sum((root / path.lstrip("/")).stat().st_size for path in paths)
    with attach_loop(span) as loop:
        sh("e2fsck", "-fn", loop)
    content = machine.disk.read_bytes()
    assert machine.adapt() == ([], (), 0)
    assert machine.disk.read_bytes() == content


def test_nothing_is_written_where_nothing_changes(machine: Machine) -> None:
    content = machine.disk.read_bytes()
    paths, _, written = machine.adapt(Identities())
    assert (paths, written) == ([], 0)
    assert machine.disk.read_bytes() == content


def test_the_crypttab_tells_what_stands_behind_a_mapping(tmp_path: Path) -> None:
    """The encryption was taken off: what was /dev/mapper/plain is found by its own UUID."""
    files = {"etc/crypttab": f"plain UUID={LUKS} none\n", "etc/kernel/cmdline": "root=/dev/mapper/plain\n"}
    root = make_root(tmp_path, files)
    opened = without_luks()
    inner = next(each for each in SERVER.volumes if each.uuid == BOOT)
    moved = type(inner)(space="sda:3:luks", kind="filesystem", uuid=ROOT, lasting=(f"UUID={ROOT}",))
    known = probe_mappings(root, Identities((moved,), opened.gone))
    (named,) = known.volumes
    assert set(named.names) == {"/dev/mapper/plain", f"/dev/mapper/luks-{LUKS}"}
    plans = {plan.path: plan for plan in probe_storage_files(root, known)}
    assert plans["/etc/kernel/cmdline"].text == f"root=UUID={ROOT}\n"
    assert plans["/etc/crypttab"].changes == ()
    assert plans["/etc/crypttab"].notes


def test_bytes_that_are_no_text_links_out_and_huge_files(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", FILES)
    raw = b"# \xff\xfe\r\ncryptlvm /dev/sda3 \xe4 luks\n"
    (root / "etc/crypttab").write_bytes(raw)
    (tmp_path / "outside").write_text("RESUME=/dev/sda4\n")
    (root / "etc/initramfs-tools/conf.d/resume").unlink()
    (root / "etc/initramfs-tools/conf.d/resume").symlink_to("../../../../outside")
    (root / "etc/default/grub").write_text(FILES["etc/default/grub"] + "#" * (1 << 20))
    plans = {plan.path: plan for plan in probe_storage_files(root, SERVER)}
    assert plans["/etc/crypttab"].text.encode("utf-8", "surrogateescape") == raw.replace(
        b"/dev/sda3", f"UUID={LUKS}".encode()
    )
    assert not {"/etc/initramfs-tools/conf.d/resume", "/etc/default/grub"} & set(plans)
    assert list_inside(root, "/etc/nowhere") == list_inside(root, "/etc/fstab") == []
    with pytest.raises(RemetalError, match="vanished"):
        overwrite_inside(root, "/etc/nowhere", b"")


def test_boot_entries_and_configuration_on_a_fat(tmp_path: Path) -> None:
    disk = tmp_path / "esp.img"
    partition(disk, 48 * MIB, f"label: gpt\nsize=40M,type={ESP}\n")
    table = read_table(disk, "sda")
    entry = b"title x\nlinux /x\ninitrd /y\noptions root=/dev/sda2 resume=/dev/sda4\n"
    stub = f"search.fs_uuid {BOOT} root hd0,gpt2\nset prefix=($root)'/grub'\nconfigfile $prefix/grub.cfg\n".encode()
    other = b"options root=/dev/sda2\n"
    files = {"/loader/entries/arch.conf": entry, "/EFI/debian/grub.cfg": stub, "/loader/loader.conf": other}
    make_esp(disk, table.partitions[0], files)
    layout = layout_of(disk, {1: vfat(1)})
    span = Span(disk, *layout.place("sda:1")[1:])
    done = adapt_esp_files(probe_fat(span), SERVER)
    assert [change.path for change in done.changes] == ["/loader/entries/arch.conf"]
    expected = entry.replace(b"/dev/sda2", f"UUID={BOOT}".encode()).replace(b"/dev/sda4", f"UUID={SWAP}".encode())
    assert read_fat_file(span, "/loader/entries/arch.conf") == expected
    content = disk.read_bytes()
    assert adapt_esp_files(probe_fat(span), without_array()).changes == ()
    assert disk.read_bytes() == content


def test_where_a_partition_stands_on_this_machine(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(MIB))
    assert probe_place(disk, 1) is None
    with attach_loop(Span(disk, 0, MIB)) as loop:
        block = tmp_path / "sys/block" / loop.name
        (block / "device").mkdir(parents=True)
        (block / "wwid").write_text("  naa.5000c500a1b2c3d4 \n")
        (block / "device/serial").write_text("S1\n")
        place = probe_place(loop, 2, sys=tmp_path / "sys")
        assert place is not None
        assert place.devices[0] == f"{loop}p2"
        assert (place.wwid, place.serial, place.part) == ("naa.5000c500a1b2c3d4", "S1", 2)
        whole = probe_place(loop, sys=tmp_path / "none")
        assert whole is not None
        assert (whole.devices[0], whole.wwid, whole.serial) == (str(loop), "", "")
