"""The installed systems among the restored volumes, and mounting them for the length of a block."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from remetal.adapt.fstab import FstabPlan, find_volume, parse_fstab, plan_fstab
from remetal.adapt.rooted import find_inside, read_inside
from remetal.events import Report, Warn
from remetal.layout.model import FileSystem, Layout, SpaceId
from remetal.system.blockdev import Span
from remetal.system.loop import open_device
from remetal.system.mounts import mounted
from remetal.system.run import ProgramFailedError

_SAFE = ("nodev", "nosuid", "noexec")
_LOOK = {
    "ext2": ("ro",),
    "ext3": ("ro", "noload"),
    "ext4": ("ro", "noload"),
    "xfs": ("ro", "norecovery", "nouuid"),
}
_WRITE = {"xfs": ("nouuid",)}
_INNER = ("/boot", "/usr")


@dataclass(frozen=True, slots=True)
class System:
    """An installed system: the volume of its root, its os-release, its fstab, and its volumes by mount point.

    `fstab` is the plan for its fstab; `mounts` follows the planned text.
    """

    root: SpaceId
    name: str
    ids: tuple[str, ...]
    """`ID` and `ID_LIKE` of its os-release: debian; ubuntu debian; …"""
    fstab: FstabPlan
    mounts: Mapping[str, SpaceId]


def span_of(space: SpaceId, layout: Layout, targets: Mapping[str, Path]) -> Span:
    """Return the bytes of a space on its target."""
    disk, start, size = layout.place(space)
    return Span(targets[disk.name], start, size)


def find_systems(source: Layout, result: Layout, targets: Mapping[str, Path], report: Report) -> list[System]:
    """Look, without writing a byte, for volumes that hold an installed system, in the order in which they lie.

    `source` is the layout as captured, `result` as it stands on the targets. A file system that this kernel cannot
    mount is reported and passed over.
    """
    systems = []
    for volume in result.volumes():
        if isinstance(volume, FileSystem) and volume.type in _LOOK:
            try:
                with _mounted(volume.on, result, targets) as root:
                    system = _probe_system(volume.on, root, source, result)
            except ProgramFailedError as error:
                report(Warn(f"cannot look into {volume.on} ({volume.type}): {error.message}", error.hint))
                continue
            if system is not None:
                systems.append(system)
    return systems


@contextmanager
def open_root(system: System, layout: Layout, targets: Mapping[str, Path], *, writable: bool = False) -> Iterator[Path]:
    """Mount a system's root and its own /boot, /usr, /etc and /var, and yield the folder.

    Nothing is written unless `writable`: journals are not replayed then either. File systems that remetal reads
    by other means (the ESP) are not mounted.
    """
    with ExitStack() as stack:
        root = stack.enter_context(_mounted(system.root, layout, targets, writable=writable))
        for point in _INNER:
            space = system.mounts.get(point)
            folder = find_inside(root, point)
            if space is not None and folder is not None and folder.is_dir() and _is_mountable(layout, space):
                stack.enter_context(_mounted(space, layout, targets, folder, writable=writable))
        yield root


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


def _probe_system(space: SpaceId, root: Path, source: Layout, result: Layout) -> System | None:
    """Return the system mounted at `root`; None if it has no fstab, or neither an os-release nor a passwd."""
    fstab = read_inside(root, "/etc/fstab")
    release = read_inside(root, "/etc/os-release") or read_inside(root, "/usr/lib/os-release")
    if fstab is None or (release is None and find_inside(root, "/etc/passwd") is None):
        return None
    plan = plan_fstab(fstab.decode("utf-8", "surrogateescape"), source=source, result=result, root=space)
    facts = parse_os_release((release or b"").decode("utf-8", "replace"))
    mounts: dict[str, SpaceId] = {}
    for entry in parse_fstab(plan.text):
        found = find_volume(entry.spec, result)
        if found is not None and entry.target.startswith("/"):
            mounts[entry.target.rstrip("/") or "/"] = found
    return System(
        root=space,
        name=facts.get("PRETTY_NAME") or facts.get("NAME") or "an installed system",
        ids=tuple(f"{facts.get('ID', '')} {facts.get('ID_LIKE', '')}".split()),
        fstab=plan,
        mounts=mounts | {"/": space},
    )


def _is_mountable(layout: Layout, space: SpaceId) -> bool:
    layer = layout.layer_on(space)
    return isinstance(layer, FileSystem) and layer.type in _LOOK


@contextmanager
def _mounted(
    space: SpaceId,
    layout: Layout,
    targets: Mapping[str, Path],
    folder: Path | None = None,
    *,
    writable: bool = False,
) -> Iterator[Path]:
    volume = layout.layer_on(space)
    assert isinstance(volume, FileSystem)
    options = (*_SAFE, *(_WRITE.get(volume.type, ()) if writable else _LOOK[volume.type]))
    with (
        open_device(span_of(space, layout, targets), writable=writable) as device,
        mounted(device, kind=volume.type, options=options, target=folder) as place,
    ):
        yield place
