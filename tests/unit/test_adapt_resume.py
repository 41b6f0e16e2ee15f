"""The plans for the kernel command line, wherever it is written, and for what GRUB looks for; GRUB's tools judge."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from remetal.adapt.cmdline import parse_cmdline
from remetal.adapt.grub_cfg import plan_grub_cfg
from remetal.adapt.identity import Gone, Identities, find_named, find_uuid, name_mappings, plan_name, plan_uuid
from remetal.adapt.resume import (
    plan_boot_entry,
    plan_default_grub,
    plan_dracut_conf,
    plan_grubenv,
    plan_kernel_cmdline,
    plan_resume,
)
from remetal.adapt.text import Edit, TextPlan, plan_edits
from tests.adapt_identities import (
    ARRAY,
    BOOT,
    DATA,
    LUKS,
    LV,
    NEW,
    NEW_ARRAY,
    PART,
    ROOT,
    SERIAL_NODE,
    SERVER,
    SWAP,
    VG,
    make,
    with_new,
    without_array,
    without_luks,
)
from tests.adapt_identities import (
    lv as logical,
)

Planner = Callable[[str, Identities, str], TextPlan]
NO_SWAP = Identities(gone=(Gone(space="sda:4", kind="swap", uuid=SWAP, names=("/dev/sda4",), why="sda was left out"),))


def plan(planner: Planner, text: str, identities: Identities = SERVER) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    done = planner(text, identities, "/file")
    assert bool(done.changes) == (done.text != text) == bool(done.diff)
    again = planner(done.text, identities, "/file")
    assert (again.text, again.changes) == (done.text, ())
    return done.text, done.changes, done.notes


def cmdline(text: str, identities: Identities = SERVER) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    return plan(plan_kernel_cmdline, text, identities)


@pytest.mark.parametrize(
    "text",
    [
        f"BOOT_IMAGE=/vmlinuz root=UUID={ROOT} ro quiet splash\n",
        f"root=/dev/mapper/vg0-root ro rd.luks.uuid=luks-{LUKS} rd.lvm.lv=vg0/root rd.md.uuid={ARRAY} rhgb\n",
        f"cryptdevice=UUID={LUKS}:cryptlvm:allow-discards root=/dev/vg0/root rw resume=UUID={SWAP}",
        f"rd.luks.name={LUKS}=root root=LABEL=root rootflags=subvol=@ rd.luks.options={LUKS}=discard",
        f"root=PARTUUID={PART}2 resume=/dev/disk/by-uuid/{SWAP} console=ttyS0,115200n8",
        "root=ZFS=rpool/ROOT boot=live root=/dev/nfs nfsroot=10.0.0.1:/x zswap.enabled=1 root=${root} root= =x\n",
    ],
)
def test_lasting_names_hold_and_nothing_else_is_touched(text: str) -> None:
    assert cmdline(text) == (text, (), ())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("root=/dev/sda2", f"root=UUID={BOOT}"),
        (f"root={SERIAL_NODE}-part2", f"root=UUID={BOOT}"),
        ("resume=/dev/sda4", f"resume=UUID={SWAP}"),
        ("mount.usr=/dev/md0", f"mount.usr=UUID={DATA}"),
        ("cryptdevice=/dev/sda3:cryptlvm", f"cryptdevice=UUID={LUKS}:cryptlvm"),
        ("cryptdevice=/dev/sda3:cryptlvm:allow-discards", f"cryptdevice=UUID={LUKS}:cryptlvm:allow-discards"),
        ("cryptkey=/dev/sda2:ext4:/key", f"cryptkey=UUID={BOOT}:ext4:/key"),
    ],
)
def test_names_of_hardware_become_lasting_ones(old: str, new: str) -> None:
    text = "quiet  {}\tro\n# root=/dev/sda2\n{}"
    done, changes, notes = cmdline(text.format(old, old))
    assert done == text.format(new, new)
    assert changes == (f"{new} replaces {old} (2 times)",)
    assert notes == ()


def test_names_with_colons_are_split_at_the_right_one() -> None:
    node = "/dev/disk/by-path/pci-0000:00:1f.2-ata-1-part3"
    identities = Identities((make("luks", 3, LUKS, names=(node,)),))
    assert cmdline(f"cryptdevice={node}:a:b", identities)[0] == f"cryptdevice=UUID={LUKS}:a:b"
    assert cmdline(f"cryptdevice={node}x:a:b", identities)[1] == ()


@pytest.mark.parametrize(
    ("kind", "old", "new", "text"),
    [
        ("filesystem", ROOT, NEW, "root=UUID={}"),
        ("filesystem", ROOT, NEW, "root=/dev/disk/by-uuid/{}"),
        ("luks", LUKS, NEW, "rd.luks.uuid={} rd.luks.uuid=luks-{} luks.uuid={}"),
        ("luks", LUKS, NEW, "rd.luks.name={}=root rd.luks.options={}=discard rd.luks.key={}=/key:UUID=x"),
        ("luks", LUKS, NEW, "cryptdevice=UUID={}:root"),
        ("md", ARRAY, NEW_ARRAY, "rd.md.uuid={} rd_MD_UUID={}"),
        ("swap", SWAP, NEW, "resume=UUID={} resume_offset=0"),
    ],
)
def test_uuids_that_changed_are_replaced(kind: str, old: str, new: str, text: str) -> None:
    done, _, notes = cmdline(text.replace("{}", old), with_new(SERVER, kind, old, new))
    assert (done, notes) == (text.replace("{}", new), ())


def test_a_volume_group_of_another_name() -> None:
    renamed = Identities((logical("root", "lv", LV, lasting=("/dev/mapper/vg0_1-root", "/dev/vg0_1/root")),))
    assert cmdline("rd.lvm.lv=vg0/root rd.lvm.lv=vg0/home", renamed)[0] == "rd.lvm.lv=vg0_1/root rd.lvm.lv=vg0/home"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a rd.md.uuid=X b", "a b"),
        ("a  rd.md.uuid=X\n", "a \n"),
        ("rd.md.uuid=X b", "b"),
        ("rd.md.uuid=X", ""),
        ("rd.md.uuid=X rd.md.uuid=X", ""),
        ("a rd.md.uuid=X rd.md.uuid=other", "a rd.md.uuid=other"),
    ],
)
def test_what_would_be_waited_for_in_vain_is_taken_out(old: str, new: str) -> None:
    done, changes, notes = cmdline(old.replace("X", ARRAY), without_array())
    assert (done, notes) == (new, ())
    assert all("the array was dissolved" in change for change in changes)


def test_what_was_dropped() -> None:
    assert cmdline(f"ro resume=UUID={SWAP} quiet", NO_SWAP)[0] == "ro quiet"
    opened, _, notes = cmdline(f"rd.luks.uuid={LUKS} cryptdevice=/dev/sda3:x root=UUID={ROOT}", without_luks())
    assert (opened.strip(), notes) == (f"root=UUID={ROOT}", ())
    gone = Identities(gone=(Gone(space="x", kind="filesystem", uuid=ROOT, why="it was left out"),))
    text = f"root=UUID={ROOT}"
    new, changes, notes = cmdline(text, gone)
    assert (new, changes) == (text, ())
    assert "it was left out" in notes[0]


@pytest.mark.parametrize("text", ["rd.luks.name={}=plain root=X ro", "cryptdevice=UUID={}:plain root=X ro"])
def test_a_mapping_that_the_command_line_names_itself(text: str) -> None:
    """Without the container, the file system in it is found by its own UUID."""
    inner = make("filesystem", 3, ROOT, space="sda:3:luks", names=())
    text = text.format(LUKS).replace("X", "/dev/mapper/plain")
    kept = Identities((make("luks", 3, LUKS), inner))
    assert cmdline(text, kept) == (text, (), ())
    opened = Identities((inner,), without_luks().gone)
    assert cmdline(text, opened)[0] == f"root=UUID={ROOT} ro"


def test_what_was_not_restored_is_told() -> None:
    text = f"root=UUID={NEW} resume=/dev/sdz9 root=/dev/sda6 root=PARTUUID={NEW}/PARTNROFF=1 resume=UUID={NEW}"
    new, changes, notes = cmdline(text)
    assert (new, changes) == (text, ())
    assert [note.split()[3] for note in notes] == [f"root=UUID={NEW}", "resume=/dev/sdz9", "root=/dev/sda6"]


DEFAULT_GRUB = """\
# If you change this file, run 'update-grub' afterwards to update
# /boot/grub/grub.cfg. GRUB_CMDLINE_LINUX="resume=/dev/sda4"
GRUB_DEFAULT=0
GRUB_DISTRIBUTOR=`lsb_release -i -s 2> /dev/null || echo Debian`
GRUB_CMDLINE_LINUX_DEFAULT="quiet resume=/dev/sda4"
GRUB_CMDLINE_LINUX='cryptdevice=/dev/sda3:cryptlvm root=/dev/sda2'
  export GRUB_CMDLINE_LINUX_RECOVERY=resume=/dev/sda4
GRUB_CMDLINE_LINUX_XEN_REPLACE+="console=hvc0 \\
  dyndbg=\\"file x\\" resume=/dev/sda4"
GRUB_TERMINAL="resume=/dev/sda4"
"""


def test_default_grub_of_debian() -> None:
    new, changes, notes = plan(plan_default_grub, DEFAULT_GRUB)
    head, terminal = DEFAULT_GRUB.split("GRUB_DEFAULT")[0], DEFAULT_GRUB.splitlines()[-1]
    body = DEFAULT_GRUB[len(head) : -len(terminal) - 1]
    for old, now in (("/dev/sda4", SWAP), ("/dev/sda3", LUKS), ("/dev/sda2", BOOT)):
        body = body.replace(old, f"UUID={now}")
    assert new == f"{head}{body}{terminal}\n"
    assert (len(changes), notes) == (3, ())


FEDORA = f"""\
title Fedora Linux (6.5.6-300.fc39.x86_64) 39 (Server Edition)
version 6.5.6-300.fc39.x86_64
linux /vmlinuz-6.5.6-300.fc39.x86_64
initrd /initramfs-6.5.6-300.fc39.x86_64.img
options root=/dev/mapper/vg0-root ro rd.luks.uuid=luks-{LUKS} rd.lvm.lv=vg0/root rd.md.uuid={ARRAY} rhgb quiet
grub_users $grub_users
grub_arg --unrestricted
grub_class fedora
"""
ARCH = """\
# Created by: archinstall; options root=/dev/sda2
title   Arch Linux (linux)
linux   /vmlinuz-linux
initrd  /initramfs-linux.img
options root=/dev/sda2 rw
options\tresume=/dev/sda4 zswap.enabled=0
"""


def test_boot_loader_entries() -> None:
    assert plan(plan_boot_entry, FEDORA) == (FEDORA, (), ())
    assert plan(plan_boot_entry, FEDORA, without_array())[0] == FEDORA.replace(f" rd.md.uuid={ARRAY}", "")
    renewed = with_new(SERVER, "luks", LUKS, NEW)
    assert plan(plan_boot_entry, FEDORA, renewed)[0] == FEDORA.replace(LUKS, NEW)
    new, changes, _ = plan(plan_boot_entry, ARCH)
    head, rest = ARCH.split("\n", 1)
    assert new == f"{head}\n{rest.replace('/dev/sda2', f'UUID={BOOT}').replace('/dev/sda4', f'UUID={SWAP}')}"
    assert len(changes) == 2


def test_a_kernel_without_an_initramfs_is_told_the_partuuid() -> None:
    bare = ARCH.replace("initrd  /initramfs-linux.img\n", "")
    assert f"options root=PARTUUID={PART}2 rw\n" in plan(plan_boot_entry, bare)[0]
    text = "menuentry 'x' {\n\tlinux /vmlinuz root=/dev/sda2 ro\n}\n"
    assert plan(plan_grub_cfg, text)[0] == text.replace("/dev/sda2", f"PARTUUID={PART}2")
    no_partition = Identities((make("filesystem", 2, BOOT, partuuid=""),))
    assert plan(plan_grub_cfg, text, no_partition)[1] == ()


def grubenv(*lines: str) -> str:
    text = "# GRUB Environment Block\n" + "".join(f"{line}\n" for line in lines)
    return text + "#" * (1024 - len(text.encode()))


def test_grubenv_of_rhel_keeps_its_size_and_grub_reads_it(tmp_path: Path) -> None:
    text = grubenv("saved_entry=a-5.14", "kernelopts=root=/dev/sda2 ro resume=/dev/sda4 über", "boot_success=0")
    new, changes, notes = plan(plan_grubenv, text)
    assert (len(new.encode()), len(changes), notes) == (1024, 2, ())
    (tmp_path / "grubenv").write_text(new)
    listed = subprocess.run(["grub-editenv", tmp_path / "grubenv", "list"], capture_output=True, text=True, check=True)
    assert f"kernelopts=root=UUID={BOOT} ro resume=UUID={SWAP} über\n" in listed.stdout
    shorter = plan(plan_grubenv, grubenv(f"kernelopts=ro rd.md.uuid={ARRAY}"), without_array())[0]
    assert shorter == grubenv("kernelopts=ro")


def test_a_full_grubenv_and_one_that_is_none() -> None:
    full = grubenv("kernelopts=root=/dev/sda2", "x=" + "y" * 960)
    new, changes, notes = plan(plan_grubenv, full)
    assert (new, changes) == (full, ())
    assert "no room" in notes[0]
    for text in ("", "kernelopts=root=/dev/sda2", "####", "kernelopts=root=/dev/sda2 #x#"):
        assert plan(plan_grubenv, text) == (text, (), ())


def test_dracut_conf() -> None:
    text = (
        'hostonly="yes"\n# add_device+=" /dev/sda3 "\nadd_device+=" /dev/sda3  /dev/sda4 /dev/mapper/vg0-root "\n'
        f'kernel_cmdline="rd.luks.uuid={LUKS} resume=/dev/sda4"\nomit_drivers+=" /dev/sda3 "\n'
    )
    new, changes, notes = plan(plan_dracut_conf, text)
    comment = text.split("\n", 2)[1]
    devices = f'" /dev/disk/by-uuid/{LUKS}  /dev/disk/by-uuid/{SWAP} '
    expected = text.replace('" /dev/sda3  /dev/sda4 ', devices).replace("resume=/dev/sda4", f"resume=UUID={SWAP}")
    assert new == expected
    assert comment in new
    assert (len(changes), notes) == (3, ())
    assert len(plan(plan_dracut_conf, 'add_device="/dev/sda4"\n', NO_SWAP)[2]) == 1


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_resume_of_initramfs_tools(quote: str) -> None:
    text = f"# comment\nRESUME={quote}/dev/sda4{quote}\n"
    assert plan(plan_resume, text)[0] == text.replace("/dev/sda4", f"UUID={SWAP}")
    for value in (f"UUID={SWAP}", "none", "auto", "/dev/mapper/vg0-swap", ""):
        text = f"RESUME={quote}{value}{quote}\n"
        assert plan(plan_resume, text) == (text, (), ())
    assert plan(plan_resume, f"RESUME={quote}UUID={SWAP}{quote}\n", NO_SWAP)[0] == f"RESUME={quote}none{quote}\n"
    assert len(plan(plan_resume, "RESUME=/dev/sdz1\n")[2]) == 1


HEX = ARRAY.replace(":", "")
GRUB_CFG = f"""\
#
# DO NOT EDIT THIS FILE
# search --fs-uuid {BOOT}
set timeout=5
insmod part_gpt
insmod mdraid1x
set root='mduuid/{HEX}'
if [ x$feature_platform_search_hint = xy ]; then
  search --no-floppy --fs-uuid --set=root --hint='mduuid/{HEX}'  {BOOT}
else
  search --no-floppy --fs-uuid --set=root {BOOT}
fi
cryptomount -u {LUKS.replace("-", "")}
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-{ROOT}' {{
\tset root='lvmid/{VG}/{LV}'
\tset root='cryptouuid/{LUKS.replace("-", "")}'
\tset root='hd0,gpt2'
\tset root=(hd0,gpt2)
\tsearch.fs_uuid {BOOT} root hd0,gpt2
\tlinux\t/vmlinuz-6.1.0-49-amd64 root=/dev/sda2 ro  quiet resume=UUID={SWAP}
\tinitrd\t/initrd.img-6.1.0-49-amd64
}}
"""


def test_grub_cfg_finds_what_changed_and_nothing_else_is_touched(tmp_path: Path) -> None:
    text = GRUB_CFG.replace("/dev/sda2", f"UUID={ROOT}")
    assert plan(plan_grub_cfg, text) == (text, (), ())
    renewed = SERVER
    for kind, old, new in (("filesystem", BOOT, NEW), ("md", ARRAY, NEW_ARRAY), ("luks", LUKS, NEW), ("lv", LV, VG)):
        renewed = with_new(renewed, kind, old, new)
    new, _, notes = plan(plan_grub_cfg, GRUB_CFG, renewed)
    comment = f"# search --fs-uuid {BOOT}"
    expected = GRUB_CFG.replace(BOOT, NEW).replace(HEX, NEW_ARRAY.replace(":", "")).replace(LV, VG)
    expected = expected.replace(LUKS.replace("-", ""), NEW.replace("-", "")).replace("/dev/sda2", f"UUID={NEW}")
    assert new == expected.replace(f"# search --fs-uuid {NEW}", comment)
    assert notes == ()
    (tmp_path / "grub.cfg").write_text(new)
    subprocess.run(["grub-script-check", tmp_path / "grub.cfg"], check=True)


def test_grub_cfg_after_the_array_was_dissolved() -> None:
    """A search by UUID follows, so GRUB finds its files; without one it would not."""
    assert plan(plan_grub_cfg, GRUB_CFG, without_array())[2] == ()
    without = "\n".join(line for line in GRUB_CFG.splitlines() if "search" not in line)
    new, _, notes = plan(plan_grub_cfg, without, without_array())
    assert f"set root='mduuid/{HEX}'" in new
    assert any(HEX in note and "the array was dissolved" in note for note in notes)


def test_parameters() -> None:
    text = '"a=1 b.c=d=e" x=y\'z w=\\q =r s= t'
    found = [(each.name, each.value) for each in parse_cmdline(text)]
    assert found == [("a", "1"), ("b.c", "d=e"), ("x", "y")]
    assert all(text[each.start : each.end] == each.value for each in parse_cmdline(text))


def test_what_names_mean() -> None:
    assert find_named("/dev/sda3", SERVER, ("luks", "partition")) is SERVER.volumes[2]
    found = find_named("/dev/sda3", SERVER, ("partition",))
    assert found is not None
    assert found.kind == "partition"
    assert find_named("UUID=", SERVER, ("filesystem",)) is None
    assert find_named("LABEL=BOOT", SERVER, ("filesystem",)) is None
    assert find_uuid(LV.swapcase(), SERVER, ("lv",)) is None
    assert plan_name("/dev/sda1", make("filesystem", 1, lasting=())) is None
    assert plan_uuid("1234-ABCD", "abcd-1234") == "abcd-1234"
    assert plan_uuid("{x}", "longer") == "longer"
    inner = make("filesystem", 3, ROOT, space="sda:3:luks", names=())
    (named,) = name_mappings(Identities((inner,)), [("root", "sda:3"), ("other", "sda:4")]).volumes
    assert (named.names, named.lasting) == (("/dev/mapper/root",), (f"UUID={ROOT}", "/dev/mapper/root"))


def test_edits_that_overlap_and_sentences_that_repeat() -> None:
    done = plan_edits(
        "/x", "abcdef", [Edit(2, 4, "-", "one"), Edit(0, 3, "", "two"), Edit(6, 6, "!", "one")], ["n", "n"]
    )
    assert (done.text, done.changes, done.notes) == ("-ef!", ("two", "one (2 times)"), ("n",))
