"""A system on LVM in LUKS on a mirror is restored: what its files name is true there, also without the mirrors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.uml import python_argv, run_in_uml
from remetal.units import MIB
from tests.real_disks import blank

pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the machine, back it up, and return the folder with the repository."""
    folder = tmp_path_factory.mktemp("stack")
    disks = [blank(folder / f"{letter}.img", 320 * MIB) for letter in "ab"]
    run_inside("inside.build_and_back_up(folder)", folder, disks)
    for disk in disks:
        disk.unlink()
    return folder


def run_inside(code: str, folder: Path, disks: list[Path]) -> None:
    """Run a snippet inside, with the folder at hand."""
    head = (
        "from pathlib import Path\n"
        "from tests.storage import adapt_stacks_inside as inside\n"
        f"folder = Path({str(folder)!r})\n"
    )
    run_in_uml(python_argv(head + code), disks=disks, timeout=600)


def restore(folder: Path, code: str, disks: list[Path]) -> dict[str, Any]:
    """Restore inside and return the files, and what adaptation said of itself."""
    run_inside(code, folder, disks)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_a_stack_on_other_disks_is_found_by_its_own_names(machine: Path, tmp_path: Path) -> None:
    """Every name that the stack itself gives holds; the one that the disk gave is replaced."""
    code = """
done = inside.restore(folder, "--map", "ubda=/dev/ubdb", "--map", "ubdb=/dev/ubdc")
boot = inside.assemble(inside.BOOT, "/dev/ubdb2", "/dev/ubdc2")
crypt = inside.assemble(inside.CRYPT, "/dev/ubdb3", "/dev/ubdc3")
with inside.opened_system(folder, boot, crypt) as root:
    inside.report(folder, done, root)
"""
    found = restore(machine, code, [blank(tmp_path / f"{letter}.img", 400 * MIB) for letter in "xyz"])
    facts = json.loads((machine / "facts.json").read_text())
    expected = json.loads((machine / "files.json").read_text())
    expected["etc/fstab"] = expected["etc/fstab"].replace("/dev/ubda4", f"UUID={facts['data']}")
    assert found["files"] == expected
    assert [change["path"] for change in found["adaptation"]["changes"]] == ["/etc/fstab"]
    assert [note for note in found["adaptation"]["notes"] if "initramfs was left" not in note] == []


def test_dissolved_mirrors_leave_no_name_behind(machine: Path, tmp_path: Path) -> None:
    """What named a mirror names what stood on it; GRUB, which looks for its files on one, needs its installer."""
    code = """
words = ("--without", "ubdb", "--dissolve", "md/boot", "--dissolve", "md/crypt")
done = inside.restore(folder, "--map", "ubda=/dev/ubdb", *words)
with inside.opened_system(folder, Path("/dev/ubdb2"), Path("/dev/ubdb3")) as root:
    inside.report(folder, done, root)
"""
    found = restore(machine, code, [blank(tmp_path / f"{letter}.img", 400 * MIB) for letter in "xy"])
    facts = json.loads((machine / "facts.json").read_text())
    expected = json.loads((machine / "files.json").read_text())
    fstab = expected["etc/fstab"].replace("/dev/ubda4", f"UUID={facts['data']}")
    expected["etc/fstab"] = fstab.replace("/dev/md/boot", f"UUID={facts['boot']}")
    for name in ("etc/crypttab", "boot/grub/grub.cfg"):
        expected[name] = expected[name].replace("/dev/md/crypt", f"UUID={facts['luks']}")
    conf = expected["etc/mdadm/mdadm.conf"]
    for array, place in (("boot", "ubda:2"), ("crypt", "ubda:3")):
        told = f"# remetal: the array was dissolved; its content stands on {place}.\n# ARRAY /dev/md/{array} "
        conf = conf.replace(f"ARRAY /dev/md/{array} ", told)
    expected["etc/mdadm/mdadm.conf"] = conf
    assert found["files"] == expected
    changes = [change["path"] for change in found["adaptation"]["changes"]]
    assert changes == ["/etc/fstab", "/etc/crypttab", "/etc/mdadm/mdadm.conf", "/boot/grub/grub.cfg"]
    (note,) = [note for note in found["adaptation"]["notes"] if "GRUB for BIOS on ubda" in note]
    assert f"(mduuid/{facts['boot array'].replace(':', '')})/grub" in note
    opening = (
        f"cryptsetup open /dev/disk/by-uuid/{facts['luks']} crypt; vgchange -ay vg0; mount UUID={facts['root']} /mnt"
    )
    assert opening in note
    assert note.endswith("chroot /mnt grub-install /dev/ubdb")
