"""Adaptation of a disk that is a real block device, with its partitions scanned by the kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab.uml import Outcome, disk_device, python_argv
from remetal.adapt.grub_bios import probe_chain
from remetal.layout.model import Layer
from remetal.system.blockdev import open_disk
from remetal.units import MIB
from tests.adapt_disks import (
    BIOS_BOOT,
    ESP,
    LINUX,
    ROOT_UUID,
    ext4,
    layout_of,
    make_core,
    make_esp,
    make_ext4,
    partition,
    raw,
    setup_grub,
    sh,
    vfat,
)

pytestmark = pytest.mark.storage

INSIDE = f"""
import sys
from pathlib import Path
from remetal.adapt import adapt_system
from remetal.layout.probe import probe_layout
from remetal.system.blockdev import probe_written
disk = Path({disk_device(0)!r})
layout = probe_layout([disk])
(name,) = [each.name for each in layout.disks]
for time in ("first", "second"):
    before = probe_written(disk)
    done = adapt_system(layout, layout, {{name: disk}}, firmware=None)
    print(time, sorted(change.path for change in done.changes), probe_written(disk) - before > 0)
"""


def test_a_real_block_device_is_adapted_once_and_then_left_alone(tmp_path: Path, uml: Callable[..., Outcome]) -> None:
    disk = tmp_path / "disk.img"
    partition(
        disk,
        128 * MIB,
        f"label: gpt\nstart=2048,size=2048,type={BIOS_BOOT}\nsize=40M,type={ESP}\nsize=32M,type={LINUX}\n",
    )
    volumes: dict[int, Layer] = {1: raw(1), 2: vfat(2), 3: ext4(3)}
    layout = layout_of(disk, volumes)
    config = f"search.fs_uuid {ROOT_UUID} root\nset prefix=($root)/boot/grub\n"
    modules = "biosdisk part_gpt ext2 search_fs_uuid"
    core = make_core(tmp_path / "core.img", prefix="/boot/grub", modules=modules, config=config)
    setup_grub(disk, core, tmp_path)
    table = layout.layers[0]
    parts = table.partitions  # type: ignore[union-attr]
    root = tmp_path / "root"
    for path, content in {
        "etc/fstab": b"/dev/sda3 / ext4 defaults 0 1\n",
        "etc/os-release": b"ID=debian\n",
        "boot/grub/i386-pc/core.img": core,
        "boot/grub/i386-pc/boot.img": Path("/usr/lib/grub/i386-pc/boot.img").read_bytes(),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    make_ext4(disk, parts[2], root)
    make_esp(disk, parts[1], {"/EFI/debian/grubx64.efi": b"grub"})
    with disk.open("r+b") as file:
        file.seek((2048 + 9) * 512)
        file.write(b"broken" * 500)
    said = uml(python_argv(INSIDE), disks=[disk]).stdout.splitlines()
    assert said == [
        "first ['/EFI/BOOT/BOOTX64.EFI', '/etc/fstab', 'sector 0 of ubda'] True",
        "second [] False",
    ]
    with open_disk(disk) as device:
        probe_chain(device, 0, layout, "sda")
    assert sh("mtype", "-i", f"{disk}@@{parts[1].start}", "::/EFI/BOOT/BOOTX64.EFI") == "grub"
    sh("dd", f"if={disk}", f"of={tmp_path / 'root.img'}", "bs=1M", f"skip={parts[2].start}", "count=32",
       "iflag=skip_bytes", "status=none")  # fmt: skip
    sh("e2fsck", "-fn", tmp_path / "root.img")
    assert sh("debugfs", "-R", "cat /etc/fstab", tmp_path / "root.img") == f"UUID={ROOT_UUID} / ext4 defaults 0 1\n"


F2FS_INSIDE = f"""
import subprocess
from pathlib import Path
from remetal.adapt import adapt_system
from remetal.layout.probe import probe_layout
from remetal.system.mounts import mounted
disk = Path({disk_device(0)!r})
part = Path({disk_device(0, 1)!r})
subprocess.run(["mkfs.f2fs", "-q", part], check=True)
with mounted(part) as root:
    (root / "etc").mkdir()
    (root / "etc/os-release").write_text("ID=arch\\n")
    (root / "etc/fstab").write_text("/dev/ubda1 / f2fs defaults 0 1\\n")
layout = probe_layout([disk])
whole = disk.read_bytes()
adapt_system(layout, layout, {{"ubda": disk}}, firmware=None, kept=["ubda:1"])
assert disk.read_bytes() == whole
for time in ("first", "second"):
    before = disk.read_bytes()
    done = adapt_system(layout, layout, {{"ubda": disk}}, firmware=None)
    print(time, [change.path for change in done.changes], disk.read_bytes() == before)
subprocess.run(["fsck.f2fs", "--dry-run", part], check=True, capture_output=True)
with mounted(part, options=["ro"]) as root:
    (volume,) = [each for each in layout.volumes() if each.on == "ubda:1"]
    print((root / "etc/fstab").read_text().replace(volume.uuid, "ITS-OWN").strip())
"""


def test_a_root_on_f2fs_is_adapted_once_and_then_left_alone(tmp_path: Path, uml: Callable[..., Outcome]) -> None:
    disk = tmp_path / "disk.img"
    partition(disk, 96 * MIB, f"label: gpt\nsize=80M,type={LINUX}\n")
    said = uml(python_argv(F2FS_INSIDE), disks=[disk]).stdout.splitlines()
    assert said == ["first ['/etc/fstab'] False", "second [] True", "UUID=ITS-OWN / f2fs defaults 0 1"]
