"""Whether a snapshot would boot on some hardware, and a restore onto it, as plain commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.adapt_disks import LINUX, ROOT_UUID, make_ext4, partition, read_table
from tests.commands.site import Site
from tests.kernels import VERSION, install_kernel
from tests.unit.test_adapt_kernels import MEGARAID, UNKNOWN, VIRTIO

MACHINES = Path(__file__).parents[1] / "machines"
MIB = 1 << 20


@pytest.fixture(scope="module")
def system_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk file with a small installed system, whose initramfs knows virtio only."""
    folder = tmp_path_factory.mktemp("system")
    disk = folder / "m.img"
    partition(disk, 80 * MIB, f"label: gpt\nsize=70M,type={LINUX}\n")
    root = folder / "root"
    (root / "etc/initramfs-tools/hooks").mkdir(parents=True)
    (root / "usr/sbin").mkdir(parents=True)
    (root / "usr/sbin/update-initramfs").write_text("#!/bin/sh\n")
    (root / "etc/os-release").write_text('ID=debian\nPRETTY_NAME="Debian"\n')
    (root / "etc/fstab").write_text(f"UUID={ROOT_UUID} / ext4 defaults 0 1\n")
    install_kernel(root)
    make_ext4(disk, read_table(disk, "sda").partitions[0], root)
    return disk


def record(site: Site, *modaliases: str) -> Path:
    """Write the record of a machine with these devices."""
    found: dict[str, Any] = json.loads((MACHINES / "server-blank.json").read_text())
    found["inventory"]["modaliases"] = modaliases
    path = site.folder / "spare.json"
    path.write_text(json.dumps(found))
    return path


def test_each_kernel_is_judged_before_a_disaster(site: Site, system_disk: Path) -> None:
    site.remetal("backup", "--disk", system_disk)
    fits = site.remetal("bootability", "--inventory", record(site, VIRTIO), "--json").json
    assert [(each["root"], each["outcome"]) for each in fits["systems"]] == [("m.img:1", "boots as it is")]
    lacks = site.remetal("bootability", "latest", "--inventory", record(site, MEGARAID), "--json").json["systems"][0]
    assert (lacks["outcome"], lacks["kernels"][0]["kernel"]) == ("boots after adaptation", VERSION)
    assert lacks["kernels"][0]["missing"] == ["scsi_common", "scsi_mod", "megaraid_sas"]
    shown = site.remetal("bootability", "--inventory", record(site, UNKNOWN), code=3)
    assert "cannot boot" in shown.out
    assert UNKNOWN in "".join(shown.out.split())


def test_a_restore_says_what_will_become_of_it_and_then_sees_to_it(site: Site, system_disk: Path) -> None:
    site.remetal("backup", "--disk", system_disk)
    words = ("latest", "--map", site.folder / "out.img", "--inventory", record(site, MEGARAID))
    plan = site.remetal("plan", *words, "--json").json
    assert plan["systems"][0]["outcome"] == "boots after adaptation"
    done = site.remetal("restore", *words, "--confirm", plan["id"][:12], "--json").json
    changed = [each["path"] for each in done["adaptation"]["changes"]]
    assert changed[:2] == [f"/boot/initrd.img-{VERSION}", "/etc/initramfs-tools/hooks/remetal"]
    assert any("update-initramfs -u -k all" in note for note in done["adaptation"]["notes"]), "there is no systemd"
    site.remetal("backup", "--disk", site.folder / "out.img", "--machine", "again")
    again = site.remetal("bootability", "--machine", "again", "--inventory", record(site, MEGARAID), "--json").json
    assert again["systems"][0]["outcome"] == "boots as it is"


def test_a_restore_that_would_not_boot_is_refused(site: Site, system_disk: Path) -> None:
    site.remetal("backup", "--disk", system_disk)
    out = site.folder / "out.img"
    words = ("restore", "latest", "--map", out, "--inventory", record(site, UNKNOWN), "--yes")
    refused = " ".join(site.remetal(*words, code=3).err.split())
    assert "no kernel of Debian on m.img:1 would boot there" in refused
    assert "--even-unbootable" in refused
    assert not out.exists()
    site.remetal(*words, "--even-unbootable")
    assert out.exists()


def test_bad_records(site: Site, system_disk: Path) -> None:
    site.remetal("backup", "--disk", system_disk)
    nothing = site.folder / "nothing.json"
    assert "cannot read" in site.remetal("bootability", "--inventory", nothing, code=2).err
    nothing.write_text("{}")
    assert "not the record of a machine" in site.remetal("bootability", "--inventory", nothing, code=2).err
    nothing.write_text(site.remetal("probe", "--disk", system_disk, "--json").out)
    assert "part of no machine" in " ".join(site.remetal("bootability", "--inventory", nothing, code=2).err.split())
    site.remetal("bootability", "nonsense", "--inventory", record(site, VIRTIO), code=2)


def test_data_without_a_system(site: Site, machine_disk: Path) -> None:
    site.remetal("backup", "--disk", machine_disk)
    assert "no installed system" in site.remetal("bootability", "--inventory", record(site, VIRTIO)).out
