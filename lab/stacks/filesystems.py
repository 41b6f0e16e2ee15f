"""File systems on one device, made, checked and mounted by their own tools."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lab.manifest import Manifest, take_manifest
from lab.stacks.files import FILL, Files, remove_some
from lab.stacks.machine import LabFailedError, Machine
from lab.stacks.model import Facts, Layer, Space


@dataclass(frozen=True)
class _Kind:
    """How one type of file system is made, checked and mounted."""

    make: tuple[str, ...]
    label: str
    check: tuple[str, ...]
    files: Files
    mount: str = "mount"
    facts: Callable[[Machine, Path], dict[str, str]] = lambda machine, device: {}
    manifest: Callable[[Path], Manifest] = lambda folder: take_manifest(str(folder))


@dataclass(frozen=True)
class FileSystem(Layer):
    """A file system; `options` go to its mkfs. `files` says what it is filled with, by default what its type allows."""

    on: Space
    type: str
    label: str = ""
    options: tuple[str, ...] = ()
    files: Files | None = None
    snapshot: bool = False
    """Whether it came with a snapshot of a volume: then it is not made, and some of its files are changed."""

    @property
    def _kind(self) -> _Kind:
        return _KINDS[self.type]

    def build(self, machine: Machine) -> None:
        if self.snapshot:
            return
        kind = self._kind
        label = [kind.label, self.label] if self.label else []
        machine.run(*kind.make, *label, *self.options, machine.path(self.on))

    def fill(self, machine: Machine) -> None:
        with self._mounted(machine) as folder:
            if self.snapshot:
                remove_some(folder)
                return
            FILL[self.files or self._kind.files](folder, self.on)

    def check(self, machine: Machine) -> Iterator[str]:
        machine.run(*self._kind.check, machine.path(self.on))
        yield " ".join(self._kind.check)

    def describe(self, machine: Machine) -> Facts:
        device = machine.path(self.on)
        kept = {f"{self.on} {word}": value for word, value in probe_tags(machine, device).items()}
        facts = {f"{self.on} {word}": value for word, value in self._kind.facts(machine, device).items()}
        exact = {name: facts.pop(name) for name in list(facts) if name.endswith(" Block size")}  # sectors may raise it
        with self._mounted(machine, "ro") as folder:
            status = os.statvfs(folder)
        return Facts(kept | facts, exact, {self.on: status.f_blocks * status.f_frsize})

    def manifests(self, machine: Machine) -> Iterator[tuple[str, Manifest]]:
        with self._mounted(machine, "ro") as folder:
            yield self.on, self._kind.manifest(folder)

    def _mounted(self, machine: Machine, *options: str) -> AbstractContextManager[Path]:
        program = self._kind.mount
        kind = self.type if program == "mount" else ""
        return machine.mounted(machine.path(self.on), *options, kind=kind, program=program)


def probe_tags(machine: Machine, device: Path) -> dict[str, str]:
    """Return what blkid finds on a device: type and identity."""
    found = machine.run("blkid", "--probe", "--output", "export", device)
    tags = dict(line.split("=", 1) for line in found.splitlines() if "=" in line)
    return {word: tags[word] for word in ("TYPE", "UUID", "LABEL", "VERSION", "VOLUME_ID") if word in tags}


def _ext_facts(machine: Machine, device: Path) -> dict[str, str]:
    words = {
        "Filesystem features",
        "Filesystem flags",
        "Default mount options",
        "Errors behavior",
        "Block size",
        "Inode size",
        "Reserved blocks uid",
        "Maximum mount count",
        "Default directory hash",
        "Directory Hash Seed",
        "Journal features",
    }
    lines = (line.partition(":") for line in machine.run("dumpe2fs", "-h", device).splitlines())
    found = {key: value.strip() for key, _, value in lines if key in words}
    if "Journal features" in found:  # the kernel notes its first revoked block for ever
        found["Journal features"] = found["Journal features"].replace("journal_incompat_revoke ", "")
    return found


def _xfs_facts(machine: Machine, device: Path) -> dict[str, str]:
    """Return the features, but for the one that says that sectors are larger than 512 bytes."""
    words = machine.run("xfs_db", "-r", "-c", "version", device).strip().partition("= ")[2].split(",")
    return {"features": ",".join(word for word in words if word != "SECTOR")}


def _plain_manifest(folder: Path) -> Manifest:
    """Return the manifest of a file system that knows no attributes at all, with times and names as they are."""
    manifest = take_manifest(str(folder), plain=True)
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        manifest[f"/{name.upper()}"] |= {"name": name, "mtime_ns": path.stat().st_mtime_ns}
    return manifest


_EXT_CHECK = ("e2fsck", "-fn")
_KINDS = {
    "ext2": _Kind(("mkfs.ext2", "-q", "-F", "-b", "4096"), "-L", _EXT_CHECK, "awkward", facts=_ext_facts),
    "ext3": _Kind(("mkfs.ext3", "-q", "-F", "-b", "4096"), "-L", _EXT_CHECK, "awkward", facts=_ext_facts),
    "ext4": _Kind(("mkfs.ext4", "-q", "-F", "-b", "4096"), "-L", _EXT_CHECK, "awkward", facts=_ext_facts),
    "xfs": _Kind(("mkfs.xfs", "-q", "-f"), "-L", ("xfs_repair", "-n"), "awkward", facts=_xfs_facts),
    "vfat": _Kind(("mkfs.vfat",), "-n", ("fsck.vfat", "-n"), "plain"),
    "exfat": _Kind(("mkfs.exfat",), "-L", ("fsck.exfat", "-n"), "plain", "mount.exfat-fuse", manifest=_plain_manifest),
    "ntfs": _Kind(("mkfs.ntfs", "--quick", "--force"), "-L", ("ntfsfix", "-n"), "plain", "ntfs-3g"),
    "f2fs": _Kind(("mkfs.f2fs", "-q", "-f"), "-l", ("fsck.f2fs", "--dry-run"), "awkward"),
}


@dataclass(frozen=True)
class Btrfs(Layer):
    """A btrfs on one or more devices, with subvolumes, a snapshot that differs, and a default subvolume."""

    members: tuple[Space, ...]
    label: str
    data: str = "single"
    metadata: str = "dup"
    options: tuple[str, ...] = ()

    @property
    def _first(self) -> Space:
        return self.members[0]

    def build(self, machine: Machine) -> None:
        devices = [machine.path(member) for member in self.members]
        profiles = [f"--data={self.data}", f"--metadata={self.metadata}"]
        machine.run("mkfs.btrfs", "--quiet", "--force", f"--label={self.label}", *profiles, *self.options, *devices)
        machine.settle()

    def fill(self, machine: Machine) -> None:
        btrfs = ("btrfs", "subvolume")
        with self._mounted(machine) as top:
            for name in ("@", "@home", "@home/inner"):
                machine.run(*btrfs, "create", top / name)
            FILL["awkward"](top / "@", self.label)
            FILL["plain"](top / "@home" / "inner", self.label)
            machine.run(*btrfs, "snapshot", "-r", top / "@", top / "@before")
            machine.run(*btrfs, "snapshot", top / "@home/inner", top / "@writable")
            remove_some(top / "@")
            (top / "on-top").write_text(self.label)
            machine.run(*btrfs, "set-default", top / "@")
            machine.run("btrfs", "property", "set", top / "@home", "compression", "zstd")

    def open(self, machine: Machine) -> None:
        machine.run("btrfs", "device", "scan", *(machine.path(member) for member in self.members))

    def check(self, machine: Machine) -> Iterator[str]:
        machine.run("btrfs", "check", "--readonly", machine.path(self._first))
        yield "btrfs check"
        with self._mounted(machine, "ro") as top:
            machine.run("btrfs", "scrub", "start", "-B", "-r", top)
            errors = machine.run("btrfs", "device", "stats", "--check", top, allowed=(0, 64))
            if any(not line.endswith(" 0") for line in errors.splitlines()):
                raise LabFailedError(f"btrfs counts errors:\n{errors}")
        yield "btrfs scrub"

    def describe(self, machine: Machine) -> Facts:
        place = f"btrfs {self.label}"
        with self._mounted(machine, "ro") as top:
            listed = machine.run("btrfs", "subvolume", "list", "-p", "-u", "-q", top)
            readonly = machine.run("btrfs", "subvolume", "list", "-r", top)
            profiles = machine.run("btrfs", "filesystem", "df", "--raw", top)
            default = machine.run("btrfs", "subvolume", "get-default", top)
            compression = machine.run("btrfs", "property", "get", top / "@home", "compression")
            status = os.statvfs(top)
        kept = {f"{place} {word}": value for word, value in probe_tags(machine, machine.path(self._first)).items()}
        kept |= {
            f"{place} subvolumes": " ".join(sorted(_last_words(listed))),
            f"{place} read-only": " ".join(sorted(_last_words(readonly))),
            f"{place} default": _last_words(default)[0],
            f"{place} profiles": " / ".join(sorted({line.partition(":")[0] for line in profiles.splitlines()})),
            f"{place} devices": str(len(self.members)),
            f"{place} compression": compression.strip(),
        }
        return Facts(kept, {f"{place} list": listed}, {self._first: status.f_blocks * status.f_frsize})

    def manifests(self, machine: Machine) -> Iterator[tuple[str, Manifest]]:
        with self._mounted(machine, "ro") as top:
            listed = machine.run("btrfs", "subvolume", "list", top)
            for path in ("", *sorted(_last_words(listed))):
                yield f"{self.label}/{path}", take_manifest(str(top / path))

    def _mounted(self, machine: Machine, *options: str) -> AbstractContextManager[Path]:
        return machine.mounted(machine.path(self._first), "subvolid=5", *options, kind="btrfs")

    def close(self, machine: Machine) -> None:
        machine.run(
            "btrfs", "device", "scan", "--forget", *(machine.path(member) for member in self.members), allowed=(0, 1)
        )


def _last_words(text: str) -> list[str]:
    return [line.split()[-1] for line in text.splitlines()]
