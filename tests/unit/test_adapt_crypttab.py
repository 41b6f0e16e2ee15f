"""The plan for the restored crypttab, and what systemd's own generator makes of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from remetal.adapt.crypttab import find_containers, parse_crypttab, plan_crypttab
from remetal.adapt.identity import Identities
from tests.adapt_identities import BOOT, LUKS, NEW, PART, SERIAL_NODE, SERVER, make, with_new, without_luks

GENERATOR = Path("/lib/systemd/system-generators/systemd-cryptsetup-generator")

DEBIAN = f"""\
# <target name> <source device>         <key file>      <options>
sda3_crypt UUID={LUKS} none luks,discard,x-initrd.attach
data_crypt\tPARTUUID={PART}3\t/etc/keys/data.key\tluks,keyscript=/lib/cryptsetup/scripts/passdev
"""
FEDORA = f"luks-{LUKS} UUID={LUKS} none discard,x-initramfs.attach\n"
ARCH = f"""\
# /etc/crypttab: mappings for encrypted partitions.
cryptlvm  /dev/disk/by-uuid/{LUKS}  -  luks,tpm2-device=auto
nas       LABEL=nas-crypt           /root/nas.key  nofail
file      /var/lib/image            none
"""


def plan(text: str, identities: Identities = SERVER) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    done = plan_crypttab(text, identities)
    assert bool(done.changes) == (done.text != text) == bool(done.diff)
    again = plan_crypttab(done.text, identities)
    assert (again.text, again.changes) == (done.text, ())
    return done.text, done.changes, done.notes


@pytest.mark.parametrize("text", [DEBIAN, FEDORA, ARCH])
def test_lasting_names_hold_and_nothing_else_is_touched(text: str) -> None:
    assert plan(text) == (text, (), ())


@pytest.mark.parametrize("source", ["/dev/sda3", f"{SERIAL_NODE}-part3"])
def test_a_name_of_hardware_becomes_the_containers_uuid(source: str) -> None:
    text = f"# mine\n  root \t {source}\t/etc/keys/my\\040key  luks , x=1  # old\n\n# root /dev/sda3 none\n"
    new, changes, notes = plan(text)
    assert new == text.replace(source, f"UUID={LUKS}", 1)
    assert changes == (f"root is opened on UUID={LUKS} instead of {source}",)
    assert notes == ()


def test_an_area_without_a_container_is_named_by_its_partition() -> None:
    text = "cswap /dev/sda5 /dev/urandom swap,cipher=aes-xts-plain64,size=256\nplain /dev/sda5 none plain\n"
    new, changes, notes = plan(text)
    assert new == text.replace("/dev/sda5", f"PARTUUID={PART}5")
    assert (len(changes), notes) == (2, ())


def test_what_would_be_overwritten_is_only_named_where_nothing_precious_was_captured() -> None:
    """sda2 holds a file system: on the machine that ran, the name must have meant another device."""
    text = "cswap /dev/sda2 /dev/urandom swap\ntmp /dev/sda3 /dev/urandom tmp=ext4\nx /dev/sdz1 /dev/urandom swap\n"
    new, changes, notes = plan(text)
    assert (new, changes) == (text, ())
    assert len(notes) == 3
    assert all("at every boot" in note and "loses its content" in note for note in notes)


def test_a_small_file_system_may_give_a_swap_area_its_name() -> None:
    text = f"cswap UUID={BOOT} /dev/urandom swap,offset=2048\nb LABEL=boot /dev/urandom swap,offset=2048\n"
    assert plan(text) == (text, (), ())
    assert plan(text, with_new(SERVER, "filesystem", BOOT, NEW))[0] == text.replace(BOOT, NEW)


def test_a_uuid_that_changed_is_replaced_in_every_form() -> None:
    text = f'a UUID={LUKS.upper()} none\nb UUID="{LUKS}" none\nc /dev/disk/by-uuid/{LUKS} none\nluks-{LUKS} LABEL=x -\n'
    new, _, _ = plan(text, with_new(SERVER, "luks", LUKS, NEW))
    assert new == f'a UUID={NEW} none\nb UUID="{NEW}" none\nc /dev/disk/by-uuid/{NEW} none\nluks-{LUKS} LABEL=x -\n'


def test_a_partuuid_that_changed_or_is_gone() -> None:
    moved = Identities((make("luks", 3, LUKS, new_partuuid=NEW),))
    assert plan(f"a PARTUUID={PART}3 -\n", moved)[0] == f"a PARTUUID={NEW} -\n"
    onto_lv = Identities((make("luks", 3, LUKS, new_partuuid=""),))
    assert plan(f"a PARTUUID={PART}3 -\n", onto_lv)[0] == f"a UUID={LUKS} -\n"


def test_a_container_that_was_dissolved_is_told() -> None:
    text = f"cryptlvm UUID={LUKS} none luks\nb /dev/sda3 none luks\n"
    new, changes, notes = plan(text, without_luks())
    assert (new, changes) == (text, ())
    assert len(notes) == 2
    assert all("the encryption was taken off" in note and "nofail" in note for note in notes)


def test_what_was_not_restored_is_told_unless_the_system_boots_without_it() -> None:
    text = f"a UUID={NEW} none\nb UUID={NEW} none nofail\nc /dev/sdq1 none luks\nd /dev/sdq1 none noauto,luks\n"
    new, changes, notes = plan(text)
    assert (new, changes) == (text, ())
    assert [note.split()[1] for note in notes] == ["a", "c"]


def test_mappings_and_containers() -> None:
    text = "a\\040b /dev/sda3 none luks\nonly\n\n#c\nx /dev/sdz none\n"
    assert [(each.name, each.source) for each in parse_crypttab(text)] == [("a b", "/dev/sda3"), ("x", "/dev/sdz")]
    assert find_containers(text, SERVER) == [("a b", "sda:3")]


@pytest.mark.skipif(not GENERATOR.exists(), reason="systemd is not there to judge")
def test_systemd_waits_for_the_devices_that_were_restored(tmp_path: Path) -> None:
    text, _, _ = plan("root /dev/sda3 none luks\ncswap /dev/sda5 /dev/urandom swap,cipher=aes-xts-plain64\n")
    crypttab = tmp_path / "crypttab"
    crypttab.write_text(text)
    subprocess.run([GENERATOR, *[tmp_path] * 3], env={**os.environ, "SYSTEMD_CRYPTTAB": str(crypttab)}, check=True)
    for name, node in (("root", f"by-uuid/{LUKS}"), ("cswap", f"by-partuuid/{PART}5")):
        unit = (tmp_path / f"systemd-cryptsetup@{name}.service").read_text()
        assert f"'/dev/disk/{node}'" in unit
