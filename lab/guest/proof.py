#!/usr/bin/python3 -B
"""Runs in the lab machine after each boot: says on the serial console that the machine is up.

If a disk with the serial number `proof` is attached, the manifest of all that the machine holds is written to it
as well (`lab.proof` reads it), and the machine is switched off if that disk asks for it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from io import FileIO
from pathlib import Path

sys.path.insert(0, "/usr/lib/lab")
from manifest import encode_manifest, take_manifest  # type: ignore[import-not-found]

BLOCK = 4096


def main() -> None:
    """Say so, prove it, switch off: what is asked for."""
    argv = ["systemctl", "is-system-running", "--wait"]
    state = subprocess.run(argv, check=False, stdout=subprocess.PIPE, text=True).stdout
    firmware = "uefi" if Path("/sys/firmware/efi").exists() else "bios"
    say(f"booted name={os.uname().nodename} firmware={firmware} state={state.strip()} seconds={uptime():.1f}")
    disk = next(Path("/dev/disk/by-id").glob("*[-_]proof"), None) if Path("/dev/disk/by-id").is_dir() else None
    if disk is None:
        return
    with disk.open("r+b", buffering=0) as proof:
        asked = proof.read(BLOCK).split(b"\0")[0].decode("ascii", "replace").split()
        digest, size = write_proof(proof)
    say(f"done sha256={digest} size={size} seconds={uptime():.1f}")
    if "end=poweroff" in asked:
        subprocess.run(["systemctl", "poweroff"], check=True)


def write_proof(proof: FileIO) -> tuple[str, int]:
    """Write the manifest behind the first block, then the first block, which says how much and what there is."""
    entries = {}
    for place, kind in find_mounts():
        # A bind mount shows the file system itself, and not what is mounted over its folders.
        with tempfile.TemporaryDirectory(dir="/run") as folder:
            subprocess.run(["mount", "--bind", place, folder], check=True)
            try:
                entries.update(take_manifest(folder, place, plain=kind == "vfat", workers=os.cpu_count() or 1))
            finally:
                subprocess.run(["umount", folder], check=True)
    text = encode_manifest(entries)
    digest = hashlib.sha256(text).hexdigest()
    proof.seek(BLOCK)
    for start in range(0, len(text), 1 << 20):
        proof.write(text[start : start + (1 << 20)])
    proof.seek(0)
    proof.write(f"lab-proof size={len(text)} sha256={digest}\n".encode().ljust(BLOCK, b"\0"))
    os.fsync(proof.fileno())
    return digest, len(text)


def find_mounts() -> list[tuple[str, str]]:
    """Return where file systems on disks are mounted, and their types."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [(fields[1], fields[2]) for fields in lines if fields[0].startswith("/dev/")]


def uptime() -> float:
    """Return the seconds since the kernel started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def say(text: str) -> None:
    """Write a line to the serial console, apart from whatever else is being written there."""
    with Path("/dev/ttyS0").open("w") as console:
        console.write(f"\r\nlab-proof: {text}\r\n")


if __name__ == "__main__":
    main()
