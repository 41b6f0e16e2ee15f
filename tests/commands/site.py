"""Disk files with real partitions and real file systems, and the program run as a person runs it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB

REMETAL = Path(sys.executable).with_name("remetal")
PASSPHRASE = "correct horse battery staple"

GPT = """label: gpt
label-id: 5D1F3A52-6D7C-4B6A-9C1E-0A1B2C3D4E5F
1 : start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649, name="bios boot"
2 : start=4096, size=131072, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, uuid=11111111-2222-3333-4444-555555555555
3 : start=135168, size=655360, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name="data", attrs="LegacyBIOSBootable"
4 : start=790528, size=65536, type=0657FD6D-A4AB-43C4-84E5-0933C4B0F41D
5 : start=856064, size=262144, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name="root"
"""
"""BIOS boot, ESP (64 MiB), XFS (320 MiB), swap (32 MiB), ext4 (128 MiB), in sectors of 512 bytes."""

DISK_SIZE = 560 * MIB
PARTITIONS = {
    1: (1 * MIB, 1 * MIB),
    2: (2 * MIB, 64 * MIB),
    3: (66 * MIB, 320 * MIB),
    4: (386 * MIB, 32 * MIB),
    5: (418 * MIB, 128 * MIB),
}


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, parsed."""
        return json.loads(self.out)


class Site:
    """A folder with a repository, a passphrase file and a state folder, and the program to use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        self.secret = folder / "passphrase"
        self.secret.write_text(PASSPHRASE + "\n")
        inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        self.environment = inherited | {
            "REMETAL_REPO": str(self.repository),
            "REMETAL_STATE": str(folder / "state"),
            "REMETAL_PASSPHRASE_FILE": str(self.secret),
        }

    def remetal(self, *words: str | Path, code: int | None = 0, **environment: str) -> Ran:
        """Run the program to its end; `code` is the exit code that it must have, None for any."""
        done = subprocess.run(
            [REMETAL, *words],
            capture_output=True,
            text=True,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    def start(self, *words: str | Path, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start the program and return at once."""
        return subprocess.Popen(
            [REMETAL, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=self.environment,
        )


def build_disk(disk: Path) -> None:
    """Make the disk that `GPT` describes, with files in it."""
    with disk.open("wb") as file:
        file.truncate(DISK_SIZE)
        file.write(b"boot code of the test" * 20)
        file.seek(PARTITIONS[1][0])
        file.write(os.urandom(300_000))
    subprocess.run(["sfdisk", "-q", disk], input=GPT.encode(), check=True)
    with attach_loop(span(disk, 2), writable=True) as device:
        subprocess.run(["mkfs.vfat", "-F", "32", "-n", "ESP", device], check=True, capture_output=True)
        subprocess.run(["mcopy", "-i", device, "/etc/os-release", "::HELLO.TXT"], check=True)
    with attach_loop(span(disk, 3), writable=True) as device:
        subprocess.run(["mkfs.xfs", "-q", "-L", "data", device], check=True)
        with mounted(device) as folder:
            fill(folder, 40)
    with attach_loop(span(disk, 4), writable=True) as device:
        subprocess.run(["mkswap", "-q", "-L", "swappy", device], check=True, capture_output=True)
    with attach_loop(span(disk, 5), writable=True) as device:
        subprocess.run(["mkfs.ext4", "-q", "-L", "root", device], check=True)
        with mounted(device) as folder:
            fill(folder, 30)


def fill(folder: Path, megabytes: int) -> None:
    """Put files of many kinds into a mounted file system, then delete some, so that free blocks hold old data."""
    for number in range(megabytes):
        place = folder / f"folder-{number % 7}"
        place.mkdir(exist_ok=True)
        text = hashlib.sha256(str(number).encode()).hexdigest().encode() * 1000
        (place / f"text-{number}").write_bytes(text)
        (place / f"random-{number}").write_bytes(os.urandom(MIB // 2 + number))
        (place / f"gone-{number}").write_bytes(b"old" * 100_000)
    with (folder / "sparse").open("wb") as file:
        file.truncate(20 * MIB)
        file.seek(10 * MIB)
        file.write(b"island")
    os.link(folder / "sparse", folder / "linked")
    (folder / "pointer").symlink_to("sparse")
    os.setxattr(folder / "linked", "user.colour", b"green")
    (folder / b"latin-\xe9\xff".decode("utf-8", "surrogateescape")).write_text("odd name")
    subprocess.run(["sync", "-f", folder], check=True)
    for gone in folder.glob("*/gone-*"):
        gone.unlink()


def span(disk: Path, number: int) -> Span:
    """Return the place of one of the test disk's partitions."""
    return Span(disk, *PARTITIONS[number])


def list_tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return every file's metadata and content hash, by its path."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*"), key=os.fsencode):
        about = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
        if path.is_symlink():
            content = str(path.readlink())
        attributes = {name: os.getxattr(path, name, follow_symlinks=False) for name in _xattrs(path)}
        size = 0 if path.is_dir() else about.st_size
        name = os.fsencode(path.relative_to(folder)).hex()
        facts = (about.st_mode, about.st_uid, about.st_gid, size, about.st_mtime_ns, about.st_nlink)
        found[name] = (*facts, content, str(attributes))
    return found


def _xattrs(path: Path) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


def list_volume(place: Span, options: tuple[str, ...]) -> dict[str, tuple[object, ...]]:
    """Return the tree of a volume that is mounted without any write."""
    with attach_loop(place) as device, mounted(device, options=("ro", *options)) as folder:
        return list_tree(folder)


def hash_file(path: Path) -> str:
    """Return the hash of a whole disk file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
