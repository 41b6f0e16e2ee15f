"""Files of a FAT file system, read and written without mounting it: a kernel may lack vfat. Source: mtools(1)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from remetal.errors import RemetalError
from remetal.system.blockdev import Span, flush_cache
from remetal.system.loop import open_device
from remetal.system.run import Completed, ProgramFailedError, need_programs, run

_ENVIRONMENT = {"MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": os.devnull}


@dataclass(frozen=True, slots=True)
class FatTree:
    """All paths of a FAT file system, as `/EFI/BOOT/BOOTX64.EFI`; folders end with a slash."""

    span: Span
    paths: tuple[str, ...]

    def find(self, path: str) -> str | None:
        """Return a path in the letter case in which it is stored, or None; FAT does not tell the cases apart."""
        wanted = path.lower()
        return next((each for each in self.paths if each.lower() == wanted), None)


def probe_fat(span: Span) -> FatTree:
    """List a FAT file system. Raises RemetalError if it cannot be read as one."""
    need_programs("mdir")
    try:
        with open_device(span) as device:
            listing = _run("mdir", device, "-/", "-a", "-b", "::/").text
    except ProgramFailedError as error:
        if 'File "::/" not found' in error.stderr:  # what mdir says of an empty file system
            return FatTree(span, ())
        raise
    return FatTree(span, tuple(line.removeprefix("::") for line in listing.splitlines() if line.startswith("::")))


def read_fat_file(span: Span, path: str) -> bytes:
    """Return a file's whole content. Raises RemetalError if there is none."""
    with open_device(span) as device:
        return _run("mtype", device, f"::{path}").stdout


def apply_fat_file(tree: FatTree, path: str, content: bytes) -> FatTree:
    """Write a file and the folders above it, replacing an old one, and return the tree with it.

    The file system sees a device of its own size, so however wrong its numbers are, nothing behind it is written.
    Raises RemetalError if the file system is full or broken.
    """
    folders = path.strip("/").split("/")[:-1]
    wanted = [f"/{'/'.join(folders[: depth + 1])}/" for depth in range(len(folders))]
    missing = [folder for folder in wanted if tree.find(folder) is None]
    try:
        with open_device(tree.span, writable=True) as device, NamedTemporaryFile(prefix="remetal-") as file:
            file.write(content)
            file.flush()
            for folder in missing:
                _run("mmd", device, f"::{folder.rstrip('/')}")
            _run("mcopy", device, "-o", file.name, f"::{path}")
    except ProgramFailedError as error:
        if "Disk full" in error.stderr:
            raise RemetalError(
                f"no room for {path} on the EFI system partition {tree.span}",
                hint="Remove files that are no longer needed from it, such as old kernels or firmware updates.",
            ) from error
        raise
    flush_cache(tree.span.path)
    if read_fat_file(tree.span, path) != content:
        raise RemetalError(
            f"{path} on the EFI system partition {tree.span} reads back differently than it was written",
            hint="Check the file system with fsck.vfat and the disk with smartctl.",
        )
    return FatTree(tree.span, (*tree.paths, *missing, *([] if tree.find(path) else [path])))


def _run(program: str, device: Path, *words: str) -> Completed:
    return run([program, "-i", device, *words], env=_ENVIRONMENT, timeout=120)
