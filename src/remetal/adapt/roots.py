"""The installed systems among the restored volumes, and mounting them for the length of a block.

A btrfs is looked into as a whole, and its subvolumes one by one: the default one, and those right at the top, where
Debian, Ubuntu, Fedora and others put their root (`@rootfs`, `@`, `root`). Source: btrfs(5), btrfs-subvolume(8).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from remetal.adapt.fstab import find_root, find_volume, parse_fstab, plan_fstab
from remetal.adapt.identities import Known, probe_identities, probe_known
from remetal.adapt.identity import NOTHING, Identities, Named
from remetal.adapt.restored import Restored
from remetal.adapt.rooted import find_inside, list_inside, read_inside
from remetal.adapt.text import TextPlan
from remetal.events import Report, Warn
from remetal.layout.model import FileSystem, Layer, SpaceId, VolumeGroup, spaces_of
from remetal.system.loop import open_device
from remetal.system.mounts import mounted
from remetal.system.run import ProgramFailedError, run

_SAFE = ("nodev", "nosuid", "noexec")
_LOOK = {
    "ext2": ("ro",),
    "ext3": ("ro", "noload"),
    "ext4": ("ro", "noload"),
    "xfs": ("ro", "norecovery", "nouuid"),
    "btrfs": ("ro", "rescue=nologreplay", "subvolid=5"),
    "f2fs": ("ro", "norecovery"),
}
_WRITE = {"xfs": ("nouuid",), "btrfs": ("subvolid=5", "skip_balance")}
_INNER = ("/usr", "/boot", "/boot/grub2/i386-pc", "/boot/grub2/x86_64-efi")
"""Where the files of a system lie that name its storage; openSUSE keeps GRUB's folders in subvolumes of their own."""
_USUAL_ROOTS = {"@", "@rootfs", "root"}
_SUBVOLUME = 256
"""The inode number of every subvolume's top folder (btrfs(5))."""
_SUBVOLUMES_MAX = 64


@dataclass(frozen=True, slots=True)
class System:
    """An installed system: the volume of its root, its os-release, its fstab, and its volumes by mount point.

    `fstab` is the plan for its fstab; `mounts` follows the planned text. Spaces are those of the result.
    """

    root: SpaceId
    name: str
    ids: tuple[str, ...]
    """`ID` and `ID_LIKE` of its os-release: debian; ubuntu debian; …"""
    fstab: TextPlan
    mounts: Mapping[str, SpaceId]
    subvolumes: Mapping[str, str] = field(default_factory=dict)
    """The paths of btrfs subvolumes by mount point, where they are not the default one."""
    identities: Identities = NOTHING
    """What names in its files mean."""


def find_systems(restored: Restored, report: Report) -> list[System]:
    """Look, without writing a byte, for volumes that hold an installed system, in the order in which they lie.

    A file system that this kernel cannot mount is reported and passed over. Snapshots are left as they are.
    """
    systems = []
    known = probe_known(restored)
    for volume in restored.file_systems():
        if volume.type not in _LOOK or _is_snapshot(volume.on, restored):
            continue
        try:
            with ExitStack() as stack:
                top = _Mounts(restored, stack, writable=False).top(volume)
                systems += list(_probe_systems(volume, top, restored, known))
        except ProgramFailedError as error:
            report(Warn(f"cannot look into {volume.on} ({volume.type}): {error.message}", error.hint))
    return systems


@contextmanager
def open_root(
    system: System,
    restored: Restored,
    *,
    inner: Sequence[str] = _INNER,
    writable: bool = False,
    programs: bool = False,
) -> Iterator[Path]:
    """Mount a system's root and its own volumes at `inner`, parents first, and yield the folder.

    Nothing is written unless `writable`: journals are not replayed then either. File systems that remetal reads
    by other means (the ESP) are not mounted, unless `programs` of the system are to be run, which want them.
    """
    with ExitStack() as stack:
        mounts = _Mounts(restored, stack, writable=writable, programs=programs)
        root = mounts.find(system.root, system.subvolumes.get("/", ""))
        assert root is not None
        for point in sorted(inner):
            space = system.mounts.get(point)
            target = find_inside(root, point)
            if space is None or target is None or not target.is_dir() or not _is_mountable(space, restored, programs):
                continue
            try:
                source = mounts.find(space, system.subvolumes.get(point, ""))
            except ProgramFailedError:
                if restored.is_type(space, "vfat"):  # a kernel may lack it; whoever needs it there looks
                    continue
                raise
            if source is not None:
                stack.enter_context(mounted(source, options=("bind",), target=target))
        yield root
    if writable:
        restored.flush()


def can_look_into(volume: Layer) -> bool:
    """Whether it is a file system that is looked into: by mounting it, or as firmware does."""
    return isinstance(volume, FileSystem) and (volume.type in _LOOK or volume.type == "vfat")


def parse_os_release(text: str) -> dict[str, str]:
    """Return the variables of an os-release file, without the lines that break its rules. Source: os-release(5)."""
    found = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            try:
                found[name] = "".join(shlex.split(value))
            except ValueError:
                continue
    return found


class _Mounts:
    """File systems, each mounted once until the stack is closed, a btrfs by its top."""

    def __init__(self, restored: Restored, stack: ExitStack, *, writable: bool, programs: bool = False) -> None:
        self.restored = restored
        self.stack = stack
        self.writable = writable
        self.programs = programs
        self.tops: dict[SpaceId, Path] = {}

    def top(self, volume: FileSystem) -> Path:
        """Return where a file system is mounted."""
        if volume.on not in self.tops:
            self.tops[volume.on] = self._mount(volume)
        return self.tops[volume.on]

    def find(self, space: SpaceId, subvolume: str) -> Path | None:
        """Return the folder of a file system's subvolume (empty: the default one); None if there is none."""
        volume = self.restored.result.layer_on(space)
        assert isinstance(volume, FileSystem)
        top = self.top(volume)
        if volume.type != "btrfs":
            return top
        return _find_subvolume(top, subvolume or _probe_default(top))

    def _mount(self, volume: FileSystem) -> Path:
        devices = [
            self.stack.enter_context(open_device(self.restored.span(space), writable=self.writable))
            for space in spaces_of(volume)
        ]
        safe = _SAFE[:-1] if self.programs else _SAFE
        options = (*safe, *(_WRITE.get(volume.type, ()) if self.writable else _LOOK[volume.type]))
        if volume.type == "btrfs":
            # All are named: else the kernel may take the others from another copy of the same file system.
            options += tuple(f"device={device}" for device in devices)
            for device in devices:
                self.stack.callback(run, ["btrfs", "device", "scan", "--forget", device], allowed=range(256))
        return self.stack.enter_context(mounted(devices[0], kind=volume.type, options=options))


def _probe_systems(volume: FileSystem, top: Path, restored: Restored, known: Known) -> Iterator[System]:
    if volume.type != "btrfs":
        system = _probe_system(volume.on, "", top, restored, known)
        if system is not None:
            yield system
        return
    default = _probe_default(top)
    for subvolume in dict.fromkeys((default, *_probe_subvolumes(top))):
        folder = _find_subvolume(top, subvolume)
        if folder is not None and _is_own_root(folder, subvolume, default):
            system = _probe_system(volume.on, subvolume, folder, restored, known)
            if system is not None:
                yield system


def _probe_system(space: SpaceId, subvolume: str, root: Path, restored: Restored, known: Known) -> System | None:
    """Return the system mounted at `root`; None if it has no fstab, or neither an os-release nor a passwd."""
    fstab = read_inside(root, "/etc/fstab")
    release = read_inside(root, "/etc/os-release") or read_inside(root, "/usr/lib/os-release")
    if fstab is None or (release is None and find_inside(root, "/etc/passwd") is None):
        return None
    text = fstab.decode("utf-8", "surrogateescape")
    entry = find_root(parse_fstab(text))
    identities = probe_identities(root, space, entry.spec if entry is not None else "", restored, known)
    plan = plan_fstab(text, source=restored.source, result=restored.result, identities=identities)
    facts = parse_os_release((release or b"").decode("utf-8", "replace"))
    mounts: dict[str, SpaceId] = {}
    subvolumes: dict[str, str] = {}
    for each in parse_fstab(plan.text):
        found = find_volume(each, restored.source, identities)
        if isinstance(found, Named) and each.target.startswith("/"):
            point = each.target.rstrip("/") or "/"
            mounts[point] = found.space_now
            subvolumes[point] = each.subvolume
    return System(
        root=space,
        name=facts.get("PRETTY_NAME") or facts.get("NAME") or "an installed system",
        ids=tuple(f"{facts.get('ID', '')} {facts.get('ID_LIKE', '')}".split()),
        fstab=plan,
        mounts=mounts | {"/": space},
        subvolumes={point: path for point, path in (subvolumes | {"/": subvolume}).items() if path},
        identities=identities,
    )


def _is_snapshot(space: SpaceId, restored: Restored) -> bool:
    group = restored.result.provider_of(restored.result.place(space)[0].name)
    return isinstance(group, VolumeGroup) and any(
        volume.origin and f"{group.name}/{volume.name}" == space for volume in group.volumes
    )


def _is_mountable(space: SpaceId, restored: Restored, programs: bool) -> bool:
    known = restored.is_type(space, *_LOOK) or (programs and restored.is_type(space, "vfat"))
    return known and restored.is_restored(space)


def _probe_default(top: Path) -> str:
    """Return the path of the default subvolume, empty for the top itself. Raises ProgramFailedError."""
    # ID 256 gen 9 top level 5 path @, or: ID 5 (FS_TREE)
    return run(["btrfs", "subvolume", "get-default", top]).text.strip().partition(" path ")[2].strip("/")


def _probe_subvolumes(top: Path) -> list[str]:
    """Return the subvolumes right at the top of a btrfs, those where a root usually lies first."""
    names = sorted(list_inside(top, "/"), key=lambda name: (name not in _USUAL_ROOTS, name))
    found = (name for name in names if _find_subvolume(top, name) is not None)
    return ["", *(name for name, _ in zip(found, range(_SUBVOLUMES_MAX), strict=False))]


def _find_subvolume(top: Path, path: str) -> Path | None:
    """Return the folder of a subvolume of a mounted btrfs, or None if there is none."""
    place = find_inside(top, path)
    try:
        return place if place is not None and place.stat().st_ino == _SUBVOLUME else None
    except OSError:
        return None


def _is_own_root(folder: Path, subvolume: str, default: str) -> bool:
    """Whether a subvolume is the root that its own fstab means, and no snapshot of it."""
    text = (read_inside(folder, "/etc/fstab") or b"").decode("utf-8", "surrogateescape")
    entry = find_root(parse_fstab(text))
    if entry is not None and entry.subvolume:
        return entry.subvolume == subvolume
    return subvolume == default or subvolume in _USUAL_ROOTS
