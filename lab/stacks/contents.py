"""Leaves that hold no files: swap, unknown bytes, and what is recognised by its mark only."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import file_digest, sha256, shake_128
from pathlib import Path
from typing import Literal, TypeAlias

from lab.stacks.filesystems import probe_tags
from lab.stacks.machine import LabFailedError, Machine, mapping_name
from lab.stacks.model import Facts, Layer, Space
from remetal.units import MIB


@dataclass(frozen=True)
class Swap(Layer):
    """Swap space; the kernel itself must take it."""

    on: Space
    label: str = ""

    def build(self, machine: Machine) -> None:
        machine.run("mkswap", "--quiet", *(["--label", self.label] if self.label else []), machine.path(self.on))

    def check(self, machine: Machine) -> Iterator[str]:
        machine.run("swapon", machine.path(self.on))
        machine.run("swapoff", machine.path(self.on))
        yield "swapon"

    def describe(self, machine: Machine) -> Facts:
        tags = probe_tags(machine, machine.path(self.on))
        return Facts({f"{self.on} {word}": value for word, value in tags.items()})


@dataclass(frozen=True)
class Bytes(Layer):
    """`size` MiB that nobody knows the meaning of, from the space's start; what follows is zero."""

    on: Space
    size: int

    def build(self, machine: Machine) -> None:
        with machine.path(self.on).open("r+b") as device:
            for number in range(self.size):
                device.write(shake_128(f"{self.on} {number}".encode()).digest(MIB))

    def describe(self, machine: Machine) -> Facts:
        with machine.path(self.on).open("rb") as device:
            known = sha256(device.read(self.size * MIB)).hexdigest()
            device.seek(0)
            return Facts(
                {f"{self.on} bytes": known}, {f"{self.on} all bytes": file_digest(device, "sha256").hexdigest()}
            )


MarkKind: TypeAlias = Literal["zfs_member", "drbd", "BitLocker"]


@dataclass(frozen=True)
class Mark(Layer):
    """Unknown bytes with the mark of something that this kernel has no tools for, where blkid looks for it."""

    on: Space
    kind: MarkKind

    def build(self, machine: Machine) -> None:
        path = machine.path(self.on)
        Bytes(self.on, 3).build(machine)
        with path.open("r+b") as device:
            size = device.seek(0, 2)
            for place, data in _MARKS[self.kind](size):
                device.seek(place)
                device.write(data)
        self.describe(machine)

    def describe(self, machine: Machine) -> Facts:
        device = machine.path(self.on)
        found = probe_tags(machine, device).get("TYPE", "")
        if found != self.kind:
            raise LabFailedError(f"blkid finds {found or 'nothing'} on {device}, not {self.kind}")
        return Bytes(self.on, 3).describe(machine)


def _mark_zfs(size: int) -> Iterator[tuple[int, bytes]]:
    """Uberblocks in the first two labels (ZFS on-disk specification, chapter 1)."""
    for label in (0, 256 << 10):
        for number in range(8):
            yield (
                label + (128 << 10) + number * 1024,
                struct.pack("<5Q", 0x00BAB10C, 28, 100 + number, 7, 1_700_000_000),
            )


def _mark_drbd(size: int) -> Iterator[tuple[int, bytes]]:
    """Internal metadata at the very end (struct md_on_disk_08 in drbd-utils)."""
    words = struct.pack(">7QII", 0, 1, 2, 3, 4, 5, 0, 0, 0x8374026B)
    yield size - 4096, words + struct.pack(">5I", 72, 8, 61, 1, 4096)


def _mark_bitlocker(size: int) -> Iterator[tuple[int, bytes]]:
    """The boot sector of a volume of Windows 7 and later, and the header of its metadata (libbde's documentation)."""
    boot = bytearray(512)
    boot[:13] = b"\xeb\x58\x90-FVE-FS-\x00\x02"
    boot[160:176] = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")
    boot[176:184] = struct.pack("<Q", 2 * MIB)
    boot[510:] = b"\x55\xaa"
    yield 0, bytes(boot)
    yield 2 * MIB, b"-FVE-FS-" + struct.pack("<HH", 64, 2)


_MARKS = {"zfs_member": _mark_zfs, "drbd": _mark_drbd, "BitLocker": _mark_bitlocker}


@dataclass(frozen=True)
class Bcache(Layer):
    """A backing device with its cache, written through; provides `bcache0`."""

    backing: Space
    cache: Space

    def build(self, machine: Machine) -> None:
        machine.run(
            "make-bcache", "--bucket=64k", "--bdev", machine.path(self.backing), "--cache", machine.path(self.cache)
        )
        self.open(machine)

    def open(self, machine: Machine) -> None:
        machine.run("modprobe", "bcache")
        for space in (self.cache, self.backing):
            name = machine.path(space).name
            if not Path("/sys/block", name, "bcache").exists():
                Path("/sys/fs/bcache/register").write_text(f"/dev/{name}")
        machine.wait_for(Path("/dev/bcache0"))
        machine.settle()

    def describe(self, machine: Machine) -> Facts:
        facts: dict[str, str] = {}
        for space in (self.backing, self.cache):
            said = machine.run("bcache-super-show", machine.path(space))
            words = ("sb.version", "dev.uuid", "cset.uuid")
            lines = (line.split(None, 1) for line in said.splitlines() if line.startswith(words))
            facts |= {f"{space} {name}": value for name, value in lines}
        return Facts(facts)

    def close(self, machine: Machine) -> None:
        Path("/sys/block/bcache0/bcache/stop").write_text("1")
        for folder in Path("/sys/fs/bcache").glob("*-*"):
            (folder / "stop").write_text("1")
        end = time.monotonic() + 20
        while list(Path("/sys/fs/bcache").glob("*-*")) or Path("/sys/block/bcache0").exists():
            if time.monotonic() > end:
                raise LabFailedError("bcache does not stop")
            time.sleep(0.05)
        machine.settle()


@dataclass(frozen=True)
class Integrity(Layer):
    """dm-integrity by itself: every sector with its checksum; provides `X:integrity`."""

    on: Space

    def build(self, machine: Machine) -> None:
        machine.run("integritysetup", "format", "--batch-mode", machine.path(self.on))
        self.open(machine)

    def open(self, machine: Machine) -> None:
        machine.run("integritysetup", "open", machine.path(self.on), mapping_name(f"{self.on}:integrity"))
        machine.settle()

    def describe(self, machine: Machine) -> Facts:
        return Facts(
            {f"{self.on} integrity": machine.run("integritysetup", "dump", machine.path(self.on)).split("\n", 1)[1]}
        )

    def close(self, machine: Machine) -> None:
        machine.run("integritysetup", "close", mapping_name(f"{self.on}:integrity"))


@dataclass(frozen=True)
class MultipathMember(Layer):
    """A disk that is one path of a multipath device, which stays open: nobody may touch the path itself."""

    on: Space

    def build(self, machine: Machine) -> None:
        device = machine.path(self.on)
        sectors = machine.run("blockdev", "--getsz", device).strip()
        table = f"0 {sectors} multipath 0 0 1 1 round-robin 0 1 1 {device} 1000"
        machine.run("dmsetup", "create", "mpatha", "--uuid=mpath-lab", f"--table={table}")
        machine.settle()
