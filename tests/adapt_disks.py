"""Real disks in files for the tests of adaptation: partitioned by sfdisk, filled by mkfs, GRUB and mtools."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from remetal.layout.model import Disk, FileSystem, GptTable, Layer, Layout, MbrTable, Partition, Raw, Swap
from remetal.units import MIB

PC_MODULES = Path("/usr/lib/grub/i386-pc")
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
ROOT_UUID = "6f9c3a52-6d3f-4f0a-9a35-1d2c3b4a5e6f"
BOOT_UUID = "0b7c9a10-58a8-4d07-8f2e-7a6b5c4d3e2f"
DATA_UUID = "5c1c2d3e-4f50-4162-8374-95a6b7c8d9e0"
SWAP_UUID = "9d8c7b6a-5948-4736-a5b4-c3d2e1f00112"
ESP_UUID = "1234-ABCD"


def sh(*argv: str | os.PathLike[str], text: str | None = None) -> str:
    """Run a program of the host and return what it said."""
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def partition(path: Path, size: int, script: str) -> None:
    """Create a disk file and write the table that an sfdisk script describes."""
    path.touch()
    os.truncate(path, size)
    sh("sfdisk", "--quiet", path, text=script)


def read_table(path: Path, name: str) -> GptTable | MbrTable:
    """Return the table on a disk file, as sfdisk sees it."""
    facts = json.loads(sh("sfdisk", "--json", path))["partitiontable"]
    with path.open("rb") as file:
        head = file.read(512)
    gpt = facts["label"] == "gpt"
    partitions = tuple(
        Partition(
            number=index,
            start=each["start"] * 512,
            size=each["size"] * 512,
            type=each["type"] if gpt else each["type"].rjust(2, "0"),
            uuid=each.get("uuid", ""),
            name=each.get("name", ""),
        )
        for index, each in enumerate(facts.get("partitions", ()), 1)
    )
    if gpt:
        return GptTable(on=name, disk_guid=facts["id"], entry_count=128, partitions=partitions, protective_mbr=head)
    return MbrTable(on=name, signature=facts["id"].removeprefix("0x"), partitions=partitions, boot_code=head[:440])


def layout_of(path: Path, volumes: Mapping[int, Layer], name: str = "sda") -> Layout:
    """Return the layout of a disk file: its real table, and the volumes given by partition number."""
    disk = Disk(name=name, size=path.stat().st_size, serial="QM00001", wwn="0x5000c500a1b2c3d4")
    return Layout(disks=(disk,), layers=(read_table(path, name), *(volumes[number] for number in sorted(volumes))))


def ext4(number: int, *, uuid: str = ROOT_UUID, label: str = "", name: str = "sda", kind: str = "ext4") -> FileSystem:
    """Return a file-system volume; sizes play no part here."""
    return FileSystem(on=f"{name}:{number}", type=kind, size=MIB, used=0, block_size=4096, uuid=uuid, label=label)


def vfat(number: int, *, name: str = "sda") -> FileSystem:
    """Return an ESP's volume."""
    return FileSystem(on=f"{name}:{number}", type="vfat", size=MIB, used=0, block_size=512, uuid=ESP_UUID)


def swap(number: int, *, name: str = "sda") -> Swap:
    """Return a swap volume."""
    return Swap(on=f"{name}:{number}", size=MIB, uuid=SWAP_UUID)


def raw(number: int | str, *, name: str = "sda", kind: str = "") -> Raw:
    """Return a volume of unknown content, such as a BIOS boot partition."""
    return Raw(on=f"{name}:{number}", size=0, type=kind)


def make_ext4(disk: Path, part: Partition, folder: Path, *, uuid: str = ROOT_UUID, kind: str = "ext4") -> None:
    """Make a file system with a folder's content inside a partition of a disk file."""
    image = disk.with_name(f"{disk.name}.{part.number}.part")
    image.touch()
    os.truncate(image, part.size)
    sh(f"mkfs.{kind}", "-q", "-U", uuid, "-d", folder, image)
    sh("dd", f"if={image}", f"of={disk}", "bs=1M", f"seek={part.start}", "oflag=seek_bytes", "conv=notrunc,sparse")
    image.unlink()


def make_esp(disk: Path, part: Partition, files: Mapping[str, bytes]) -> None:
    """Make a FAT file system inside a partition of a disk file and put files into it."""
    sh(
        "mkfs.vfat",
        "-F",
        "32",
        "-i",
        ESP_UUID.replace("-", ""),
        "--offset",
        str(part.start // 512),
        disk,
        str(part.size // 1024),
    )
    folders: list[str] = []
    for path in files:
        parts = path.strip("/").split("/")[:-1]
        folders += [f"::/{'/'.join(parts[: depth + 1])}" for depth in range(len(parts))]
    address = f"{disk}@@{part.start}"
    if folders:
        sh("mmd", "-i", address, *_unlike(folders))
    for path, content in files.items():
        source = disk.with_name("esp-file")
        source.write_bytes(content)
        sh("mcopy", "-i", address, source, f"::{path}")
        source.unlink()


def make_core(path: Path, *, prefix: str, modules: str, config: str = "", target: str = "i386-pc") -> bytes:
    """Make a GRUB image with grub-mkimage and return it."""
    argv = ["grub-mkimage", "-O", target, "-o", str(path), "-p", prefix]
    if config:
        script = path.with_suffix(".cfg")
        script.write_text(config)
        argv += ["-c", str(script)]
    sh(*argv, *modules.split())
    return path.read_bytes()


def setup_grub(disk: Path, core: bytes, folder: Path, *options: str) -> None:
    """Let GRUB's own installer embed a core image into a disk file."""
    holder = folder / "holder.img"
    holder.touch()
    os.truncate(holder, 8 * MIB)
    tree = folder / "tree"
    tree.mkdir(exist_ok=True)
    (tree / "boot.img").write_bytes((PC_MODULES / "boot.img").read_bytes())
    (tree / "core.img").write_bytes(core)
    sh("mkfs.ext4", "-q", "-F", "-d", tree, holder)
    loop = sh("losetup", "--find", "--show", holder).strip()
    mount = folder / "mount"
    mount.mkdir(exist_ok=True)
    try:
        sh("mount", loop, mount)
        try:
            device_map = folder / "device.map"
            device_map.write_text(f"(hd0) {disk}\n(hd1) {loop}\n")
            sh(PC_MODULES / "grub-bios-setup", "-s", *options, "-d", mount, "-m", device_map, "(hd0)")
        finally:
            sh("umount", mount)
    finally:
        sh("losetup", "--detach", loop)


def _unlike(names: list[str]) -> list[str]:
    """Return the names without those that FAT takes for the same."""
    seen: dict[str, str] = {}
    for name in names:
        seen.setdefault(name.lower(), name)
    return list(seen.values())
