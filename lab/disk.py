"""What is on a disk file: its partitions, the machine's files on them, and their manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lab.manifest import Manifest, take_manifest
from remetal.errors import RemetalError
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run

_OPTIONS = {"ext4": ("ro", "noload"), "xfs": ("ro", "norecovery", "nouuid")}


@contextmanager
def fresh_disk(path: Path, size: int, kind: str = "ext4") -> Iterator[Path]:
    """Make a disk file of `size` bytes with a file system on all of it, and yield a device that shows it."""
    with path.open("wb") as file:
        file.truncate(size)
    run([f"mkfs.{kind}", "-q", path])
    with attach_loop(Span(path, 0, size), writable=True) as device:
        yield device


def read_partitions(disk: Path) -> dict[int, Span]:
    """Return where the disk file's partitions lie, by number, as sfdisk sees them; extended ones included."""
    table = json.loads(run(["sfdisk", "--json", disk]).stdout)["partitiontable"]
    sector = int(table.get("sectorsize", 512))
    spans = {}
    for entry in table["partitions"]:
        number = int(entry["node"].removeprefix(str(disk)).lstrip("p"))
        spans[number] = Span(disk, entry["start"] * sector, entry["size"] * sector)
    return spans


def find_mounts_of(disk: Path) -> dict[str, tuple[str, Span]]:
    """Return what the machine on this disk mounts: file system type and span by mount point, the root first.

    Read from its own fstab. Raises RemetalError if there is no file system with an /etc/fstab.
    """
    known: dict[str, tuple[str, Span]] = {}
    for span in read_partitions(disk).values():
        place = ["--offset", str(span.start), "--size", str(span.size), "--output", "export"]
        found = run(["blkid", "--probe", *place, disk], allowed=(0, 2)).text
        tags = dict(line.split("=", 1) for line in found.splitlines() if "=" in line)
        if "UUID" in tags and "TYPE" in tags:
            known[tags["UUID"]] = (tags["TYPE"], span)
    for kind, span in known.values():
        if kind in _OPTIONS:
            with _opened(kind, span) as folder:
                if (folder / "etc/fstab").is_file():
                    lines = (folder / "etc/fstab").read_text().splitlines()
                    break
    else:
        raise RemetalError(f"no file system on {disk} has an /etc/fstab")
    rows = [line.split() for line in lines if line.startswith("UUID=")]
    mounts = {row[1]: known[row[0].removeprefix("UUID=")] for row in rows if row[1].startswith("/")}
    return dict(sorted(mounts.items()))


def take_disk_manifest(disk: Path) -> Manifest:
    """Return the manifest of all that the machine on this disk file mounts. Nothing on the disk changes."""
    manifest: Manifest = {}
    for place, (kind, span) in find_mounts_of(disk).items():
        with _opened(kind, span) as folder:
            manifest.update(take_manifest(str(folder), place, plain=kind == "vfat"))
    return manifest


@contextmanager
def _opened(kind: str, span: Span) -> Iterator[Path]:
    """Yield a folder with a file system's files: mounted read-only, or, for FAT, copied out by mtools."""
    with ExitStack() as stack:
        if kind == "vfat":
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="lab-esp-")))
            image = f"{span.path}@@{span.start}"
            if run(["mdir", "-b", "-i", image, "::/"], allowed=(0, 1)).stdout:
                run(["mcopy", "-s", "-Q", "-n", "-i", image, "::/*", folder])
            yield folder
        else:
            device = stack.enter_context(attach_loop(span))
            yield stack.enter_context(mounted(device, kind=kind, options=_OPTIONS[kind]))
