"""The ISO: one file that boots from CD and USB stick, by BIOS and UEFI, with Secure Boot or without.

UEFI starts the EFI system partition's BOOTX64.EFI: the distribution's signed shim, which starts its signed GRUB for
CDs, which looks for /.disk/info and reads /boot/grub/grub.cfg beside it. BIOS starts GRUB's El Torito image from
CD, and from a disk through boot_hybrid.img in the first sector. Sources: El Torito 1.0; xorrisofs(1), "Bootable
ISO images"; GRUB manual, "Making a GRUB bootable CD-ROM".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from remetal.media.root import BaseRoot
from remetal.system.run import run
from remetal.units import KIB, MIB, align_up

LABEL = "REMETAL_RECOVERY"
"""The ISO's volume id. Not `REMETAL`, which is the label of a volume that holds an answer file."""

_BIOS = "boot/grub/bios.img"


def write_iso(output: Path, work: Path, base: BaseRoot, files: Mapping[str, Path], texts: Mapping[str, str]) -> None:
    """Write the ISO to `output`: `files` and `texts` by their path on it, and what boots them from `base`.

    `work` is a folder for what lies between. Raises ProgramFailedError if xorriso or mtools fail.
    """
    tree = work / "iso"
    for name, text in texts.items():
        _place(tree, name).write_text(text)
    for name, file in files.items():
        _place(tree, name).symlink_to(file)
    _place(tree, _BIOS).write_bytes(base.path("bios.img").read_bytes())
    esp = work / "esp.img"
    write_esp(esp, {name: base.path(name) for name in ("bootx64.efi", "grubx64.efi", "mmx64.efi")})
    for name in ("bootx64.efi", "grubx64.efi", "mmx64.efi"):
        _place(tree, f"EFI/BOOT/{name.upper()}").symlink_to(base.path(name))
    unfinished = output.with_name(f".{output.name}.part")
    try:
        run(["xorriso", "-as", "mkisofs", *_options(base, esp), "-o", unfinished, tree])
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


def write_esp(image: Path, programs: Mapping[str, Path]) -> None:
    """Write an EFI system partition (FAT) that holds these programs in EFI/BOOT.

    Its empty folder `boot` only keeps GRUB from complaining that it is not there.
    """
    content = sum(program.stat().st_size for program in programs.values())
    size = align_up(content + content // 8 + 256 * KIB, MIB)
    image.write_bytes(b"")
    with image.open("r+b") as file:
        file.truncate(size)
    run(["mformat", "-i", image, "-v", "REMETAL_EFI", "-T", str(size // 512), "-h", "64", "-s", "32", "::"])
    run(["mmd", "-i", image, "::/EFI", "::/EFI/BOOT", "::/boot"])
    for name, program in programs.items():
        run(["mcopy", "-i", image, program, f"::/EFI/BOOT/{name.upper()}"])


def _options(base: BaseRoot, esp: Path) -> list[str]:
    boot_image = ["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "--grub2-boot-info"]
    return [
        *("-r", "-J", "-joliet-long", "-follow-links", "-V", LABEL, "-iso-level", "3"),
        *("--grub2-mbr", str(base.path("boot_hybrid.img")), "-partition_offset", "16", "--mbr-force-bootable"),
        *("-append_partition", "2", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", str(esp), "-appended_part_as_gpt"),
        *("-c", "boot/boot.cat", "-b", _BIOS, *boot_image),
        *("-eltorito-alt-boot", "-e", "--interval:appended_partition_2:all::", "-no-emul-boot"),
    ]


def _place(tree: Path, name: str) -> Path:
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
