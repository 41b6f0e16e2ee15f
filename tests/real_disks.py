"""Real disk files for tests: partitioned by sfdisk, filled by the file systems' own programs."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path

from remetal.image.extents import probe_used
from remetal.layout.apply import apply_step, opened_site
from remetal.layout.model import FileSystem, Layout
from remetal.layout.plan import ImageFacts, Plan, WriteImage
from remetal.system.blockdev import Span, open_disk
from remetal.system.loop import attach_loop

MIB = 1 << 20

GPT_SCRIPT = """label: gpt
label-id: 12345678-1234-4234-8234-123456789ABC
start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649, name="BIOS boot"
start=4096, size=65536, type=uefi, name="ESP", attrs="RequiredPartition"
start=69632, size=40960, type=linux, name="wörter ☃", attrs="LegacyBIOSBootable,GUID:60"
start=110592, size=20480, type=linux, name="unknown"
start=131072, size=65536, type=linux, name="root"
start=196608, size=20480, type=swap, name="swap"
"""
MBR_SCRIPT = """label: dos
label-id: 0xdeadbeef
start=2048, size=40960, type=83, bootable
start=43008, size=200000, type=5
start=45056, size=65536, type=c
start=112640, size=40960, type=83
start=155648, size=20480, type=82
"""
SWAP_UUID = "11111111-2222-4333-8444-555555555555"


def program(*argv: str | Path, data: str | None = None) -> str:
    """Run a program and return its output."""
    done = subprocess.run(argv, input=data, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def blank(path: Path, size: int) -> Path:
    """Make a sparse disk file."""
    with path.open("wb") as disk:
        disk.truncate(size)
    return path


def fill(disk: Path, start: int, sectors: int, *argv: str) -> None:
    """Run a mkfs on the range of a disk that begins at this sector."""
    with attach_loop(Span(disk, start * 512, sectors * 512), writable=True) as device:
        program(*argv, device)


def write(disk: Path, offset: int, data: bytes) -> None:
    """Write bytes into a disk file."""
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def make_gpt_disk(path: Path, size: int = 128 * MIB) -> Path:
    """Make a GPT disk: BIOS boot, ESP, ext2, unknown bytes, ext4, swap; with boot code and a core image."""
    disk = blank(path, size)
    program("sfdisk", "-q", disk, data=GPT_SCRIPT)
    write(disk, 0, b"\xeb\x63" + b"boot code of GPT".ljust(400, b"\x90"))
    write(disk, 2048 * 512, b"core image" * 1000)
    fill(disk, 4096, 65536, "mkfs.vfat", "-n", "EFI", "-i", "cafe0123")
    fill(disk, 69632, 40960, "mkfs.ext2", "-q", "-L", "small")
    write(disk, 110592 * 512 + 4096, b"nobody knows this" * 100)
    fill(disk, 131072, 65536, "mkfs.ext4", "-q", "-L", "root")
    fill(disk, 196608, 20480, "mkswap", "-q", "-U", SWAP_UUID, "-L", "swap")
    return disk


def make_mbr_disk(path: Path, size: int = 128 * MIB) -> Path:
    """Make a DOS disk: ext3 in a primary partition; vfat, ext4 and swap in logical ones; GRUB's gap filled."""
    disk = blank(path, size)
    program("sfdisk", "-q", disk, data=MBR_SCRIPT)
    write(disk, 0, b"\xeb\x63" + b"boot code of DOS".ljust(400, b"\x90"))
    write(disk, 512, b"core image behind the table" * 900)
    fill(disk, 2048, 40960, "mkfs.ext3", "-q", "-L", "boot")
    fill(disk, 45056, 65536, "mkfs.vfat", "-n", "DATA")
    fill(disk, 112640, 40960, "mkfs.ext4", "-q", "-L", "root")
    fill(disk, 155648, 20480, "mkswap", "-q", "-U", SWAP_UUID)
    return disk


_used = functools.cache(probe_used)


@dataclass(frozen=True)
class Source:
    """A disk that was captured, as far as the layout is concerned: its bytes stand for its images."""

    path: Path
    layout: Layout

    def images(self) -> dict[str, ImageFacts]:
        """Return what a plan needs to know of the images."""
        return {
            each.volume: ImageFacts(size=self.layout.place(each.volume)[2], used=each.size, digest="d" * 64)
            for each in self.layout.captured()
        }

    def apply(self, plan: Plan, target: Path, *, until: int | None = None) -> int:
        """Apply the first `until` steps of a plan, images by comparing their used blocks; return the bytes written."""
        written = 0
        (disk,) = plan.targets
        with opened_site(plan.result, {disk: target}) as site:
            for step in plan.steps[:until]:
                written += self._copy(step, target) if isinstance(step, WriteImage) else apply_step(step, site)
        return written

    def _copy(self, step: WriteImage, target: Path) -> int:
        _, start, size = self.layout.place(step.volume)
        volume = self.layout.layer_on(step.volume)
        kind = volume.type if isinstance(volume, FileSystem) else ""
        written = 0
        with open_disk(self.path) as source, open_disk(target, writable=True) as disk:
            for extent in _used(Span(self.path, start, size), kind):
                data = source.read(start + extent.start, extent.size)
                if disk.read(step.start + extent.start, extent.size) != data:
                    disk.write(data, step.start + extent.start)
                    written += extent.size
        return written
