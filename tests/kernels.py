"""Kernels of an installed system, small ones: modules that depmod(8) takes for real, images that say their version.

Sources: ELF-64 object file format; Linux scripts/mod/modpost.c (.modinfo), kmod's libkmod-elf.c (`__ksymtab_strings`).
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from remetal.ondisk.cpio_write import encode_archive

VERSION = "6.1.0-56-amd64"


@dataclass(frozen=True)
class Module:
    """A module: what it calls its own, what it needs of others, and what it says of itself."""

    aliases: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    firmware: tuple[str, ...] = ()
    place: str = "kernel/drivers"


MODULES: Mapping[str, Module] = {
    "scsi_common": Module(place="kernel/drivers/scsi"),
    "scsi_mod": Module(needs=("scsi_common",), place="kernel/drivers/scsi"),
    "sd_mod": Module(("scsi:t-0x00*", "block-major-8-*"), ("scsi_mod",), place="kernel/drivers/scsi"),
    "libata": Module(needs=("scsi_mod",), place="kernel/drivers/ata"),
    "libahci": Module(needs=("libata",), place="kernel/drivers/ata"),
    "ahci": Module(("pci:v*d*sv*sd*bc01sc06i01*",), ("libahci",), place="kernel/drivers/ata"),
    "megaraid_sas": Module(("pci:v00001000d00000060sv*sd*bc*sc*i*",), ("scsi_mod",), place="kernel/drivers/scsi"),
    "qla2xxx": Module(
        ("pci:v00001077d00002532sv*sd*bc*sc*i*",), ("scsi_mod",), ("ql2500_fw.bin",), place="kernel/drivers/scsi"
    ),
    "nvme_core": Module(place="kernel/drivers/nvme"),
    "nvme": Module(("pci:v*d*sv*sd*bc01sc08i02*",), ("nvme_core",), place="kernel/drivers/nvme"),
    "virtio": Module(place="kernel/drivers/virtio"),
    "virtio_pci": Module(("pci:v00001AF4d*sv*sd*bc*sc*i*",), ("virtio",), place="kernel/drivers/virtio"),
    "virtio_blk": Module(("virtio:d00000002v*",), ("virtio",), place="kernel/drivers/block"),
    "e1000e": Module(("pci:v00008086d000010D3sv*sd*bc*sc*i*",), place="kernel/drivers/net"),
    "mbcache": Module(place="kernel/fs"),
    "ext4": Module(("fs-ext4", "fs-ext3", "fs-ext2"), ("mbcache",), place="kernel/fs/ext4"),
    "dm_mod": Module(place="kernel/drivers/md"),
    "dm_crypt": Module(needs=("dm_mod",), place="kernel/drivers/md"),
    "raid1": Module(("md-level-1", "md-raid1"), place="kernel/drivers/md"),
}
VIRTIO_ONLY = ("virtio", "virtio_pci", "virtio_blk", "mbcache", "ext4")
"""What `MODULES=dep` puts into the initramfs of a virtual machine."""


def encode_module(name: str, module: Module, version: str = VERSION) -> bytes:
    """Return a module's file: no code, but all that depmod and modinfo(8) read."""
    facts = [("name", name), ("vermagic", f"{version} SMP"), ("license", "GPL")]
    facts += [("alias", each) for each in module.aliases] + [("firmware", each) for each in module.firmware]
    modinfo = b"\0" + b"".join(f"{key}={value}\0".encode() for key, value in facts)
    exported = f"{name}_symbol\0".encode()
    strings = b"\0" + b"".join(f"{each}_symbol\0".encode() for each in module.needs)
    symbols, at = [bytes(24)], 1
    for each in module.needs:
        symbols.append(struct.pack("<IBBHQQ", at, 0x10, 0, 0, 0, 0))  # global, undefined
        at += len(each) + len("_symbol\0")
    sections = [
        (".modinfo", 1, modinfo, 0, 0),
        ("__ksymtab_strings", 1, exported, 0, 0),
        (".symtab", 2, b"".join(symbols), 4, 24),
        (".strtab", 3, strings, 0, 0),
    ]
    names = b"\0" + b"".join(f"{each[0]}\0".encode() for each in sections) + b".shstrtab\0"
    sections.append((".shstrtab", 3, names, 0, 0))
    body, headers = b"", [bytes(64)]
    for title, kind, data, link, entry in sections:
        start = 64 + len(body)
        at = names.index(f"{title}\0".encode())
        headers.append(struct.pack("<IIQQQQIIQQ", at, kind, 0, 0, start, len(data), link, 1, 8, entry))
        body += data + bytes(-len(data) % 8)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = struct.pack(
        "<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(headers), len(headers) - 1
    )
    return ident + head + body + b"".join(headers)


def encode_image(version: str = VERSION) -> bytes:
    """Return the first sectors of a bzImage that says its version."""
    image = bytearray(4096)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x400).to_bytes(2, "little")
    text = f"{version} (debian-kernel@lists.debian.org) #1 SMP\0".encode()
    image[0x600 : 0x600 + len(text)] = text
    return bytes(image)


def install_modules(root: Path, modules: Mapping[str, Module] = MODULES, version: str = VERSION) -> None:
    """Put modules and their lists into a system, as a kernel's package does."""
    folder = root / "usr/lib/modules" / version
    for name, module in modules.items():
        path = folder / module.place / f"{name.replace('_', '-')}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_module(name, module, version))
    (folder / "modules.builtin").write_text("kernel/drivers/scsi/scsi_transport.ko\n")
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")
    subprocess.run(["depmod", "-b", root, version], check=True, capture_output=True)


def encode_initramfs(
    held: tuple[str, ...] = VIRTIO_ONLY,
    modules: Mapping[str, Module] = MODULES,
    version: str = VERSION,
    files: Mapping[str, bytes] | None = None,
) -> bytes:
    """Return an initramfs as initramfs-tools lays it out, with these modules."""
    found = {
        f"usr/lib/modules/{version}/{modules[name].place}/{name}.ko": encode_module(name, modules[name], version)
        for name in held
    }
    own = {"conf/initramfs.conf": b"MODULES=dep\n", "conf/modules": b"", "usr/bin/udevadm": b"\x7fELF"}
    return encode_archive(found | own | dict(files or {}))


def install_kernel(root: Path, held: tuple[str, ...] = VIRTIO_ONLY, version: str = VERSION) -> None:
    """Put a kernel, its modules and its initramfs into a system."""
    install_modules(root, version=version)
    boot = root / "boot"
    boot.mkdir(exist_ok=True)
    (boot / f"vmlinuz-{version}").write_bytes(encode_image(version))
    (boot / f"initrd.img-{version}").write_bytes(encode_initramfs(held, version=version))
