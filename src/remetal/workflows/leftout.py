"""What a backup leaves out by its meaning: the content of files that nobody needs back, or that somebody has named.

Without a word that is the content of what the running system itself calls temporary, or can fetch or make again: paths
below its own root, wherever they are mounted. A file system that is mounted elsewhere is somebody's data, so only what
is named is left out of it. One that is not mounted is not mounted for this: nobody could say of which system its paths
are, and a file system that rests should not have to be believed by the kernel. Of an NTFS at rest the page files and
the hibernation file are told by its file table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import msgspec.structs

from remetal.errors import RefusedError, RemetalError, UsageError
from remetal.events import Note, Report
from remetal.image.extents import probe_used
from remetal.image.leftout import FEW, KINDS, PATIENCE, Budget, Omission, Place
from remetal.image.ranges import Extent, Extents, subtract
from remetal.layout.disks import find_mounted
from remetal.layout.model import FileSystem, SpaceId
from remetal.layout.plan import Plan
from remetal.layout.probe import Probed
from remetal.layout.steps import images_in
from remetal.layout.uses import Use, probe_swaps
from remetal.ondisk.bitmaps import merge
from remetal.ondisk.ntfs import find_memory_files
from remetal.ondisk.regions import BadStructureError
from remetal.ondisk.swap import parse_swap
from remetal.repository.snapshots import MAX_PATH, LeftOut, Snapshot, describe_left_out
from remetal.system.blockdev import Span, is_block_device, open_disk
from remetal.system.mounts import find_mount_of

_TEMPORARY = {
    "/tmp": "",  # noqa: S108 - nothing is written there
    "/var/tmp": "",  # noqa: S108
    "/var/cache/apt/archives": ".deb",
    "/var/cache/dnf": "",
    "/var/cache/libdnf5": "",
    "/var/cache/yum": "",
    "/var/cache/pacman/pkg": "",
    "/var/cache/zypp/packages": "",
}
"""Folders of which the content is left out, and with what the names of the files end that are meant."""

_NEEDED = frozenset(map(Path, ("/", "/boot", "/etc", "/usr", "/var")))
"""Folders without which no system starts."""

_MOST = 1000
"""So many paths may be named."""

_Mounted: TypeAlias = Mapping[str, tuple[FileSystem, Use]]
"""The captured file systems that are mounted, by where."""


class LeavingOut:
    """What is left out of the volumes of one backup; `named` are the paths that somebody has named."""

    def __init__(self, omissions: Mapping[SpaceId, Omission], named: Collection[Path], *, keep_all: bool) -> None:
        self._omissions = omissions
        self._named = named
        self._keep_all = keep_all
        self._memory: dict[SpaceId, dict[Path, int]] = {}

    def rehearse(self, live: Collection[SpaceId]) -> None:
        """Look at what will have to be looked at while these volumes are held still."""
        budget = Budget(FEW, PATIENCE)
        for space, omission in self._omissions.items():
            if space in live:
                omission.rehearse(budget)

    def around(self, volume: SpaceId, look: Callable[[], Extents]) -> Callable[[], Extents]:
        """Return what tells which blocks are used of a volume that is held still, without those that are left out."""
        omission = self._omissions.get(volume)
        return look if omission is None else lambda: omission.take_from(look(), held=True)

    def from_copy(self, volume: SpaceId) -> Callable[[Extents, Path], Extents] | None:
        """Return what takes that from the used blocks of a snapshot that is mounted at a folder; None if all stays."""
        omission = self._omissions.get(volume)
        return None if omission is None else lambda used, copy: omission.take_from(used, held=False, copy=copy)

    def find_rest(self, volume: SpaceId, span: Span, kind: str, report: Report) -> Sequence[Extent] | None:
        """Return what is to be captured of a volume at rest, or None if nothing is left out of it.

        Where all of it counts as used, its files may not lie where it says, and nothing is left out.
        """
        omission = self._omissions.get(volume)
        memory = {} if self._keep_all or kind != "ntfs" else _find_memory_files(span)
        if omission is None and not memory:
            return None
        used = probe_used(span, kind, report=report)
        if used == [Extent(0, span.size)]:
            return used
        if omission is not None:
            return omission.take_from(used, held=False)
        self._memory[volume] = {Path("/", name): sum(size for _, size in each) for name, each in memory.items()}
        ranges = sorted(each for found in memory.values() for each in found)
        return Extents(subtract(used, (Extent(*each) for each in merge(ranges))))

    def records(self) -> tuple[LeftOut, ...]:
        """Return what was left out, as the snapshot keeps it."""
        sizes = {volume: each.sizes for volume, each in self._omissions.items()} | self._memory
        return tuple(
            LeftOut(volume=volume, path=_text(path), bytes=size)
            for volume, found in sizes.items()
            for path, size in found.items()
        )

    def tell(self, report: Report) -> None:
        """Report what was left out, and what was not though it should have been."""
        for text in describe_left_out(self.records()):
            report(Note(text))
        for each in self._omissions.values():
            for place in each.given_up:
                report(Note(f"{place.path} is captured: it has too many files to be looked at in a moment"))
            for place in each.places:
                if place.path in self._named and place.path not in each.sizes:
                    report(Note(f"nothing of {place.path} could be left out: it has no blocks of its own"))


def plan_leaving_out(probed: Probed, named: Sequence[Path], *, keep_all: bool, report: Report) -> LeavingOut:
    """Find the volumes of what is left out: what is `named`, and unless `keep_all` what remetal leaves out by itself.

    Raises UsageError for a path that is none, RefusedError for one that is needed, or on no volume that is captured.
    """
    mounted = {use.where: (layer, use) for layer, use in find_mounted(probed.layout, probed.devices)}
    found = list(_find_named(named, mounted))
    if not keep_all:
        found = [*_find_swap_files(mounted), *found, *_find_temporary(mounted)]
    places: dict[SpaceId, list[Place]] = {}
    for layer, place in found:
        places.setdefault(layer.on, []).append(place)
    for layer in {layer.on: layer for layer, _ in found}.values():
        if layer.type not in KINDS:
            paths = ", ".join(str(place.path) for place in places.pop(layer.on))
            report(Note(f"captured with all they hold, because nothing can be left out of a {layer.type}: {paths}"))
    blocks = {layer.on: layer.block_size for layer, _ in found}
    omissions = {space: Omission(each[0].folder.stat().st_dev, blocks[space], each) for space, each in places.items()}
    return LeavingOut(omissions, frozenset(named), keep_all=keep_all)


def with_left_out(plan: Plan, snapshot: Snapshot) -> Plan:
    """Return the plan with notes about what was left out of the images that it writes."""
    images = {each.image for step in plan.steps for each in images_in(step)}
    told = describe_left_out(each for each in snapshot.left_out if each.volume in images)
    return msgspec.structs.replace(
        plan, notes=(*plan.notes, *(f"{text}; they come back without their content" for text in told))
    )


def _find_named(named: Sequence[Path], mounted: _Mounted) -> Iterator[tuple[FileSystem, Place]]:
    if len(named) > _MOST:
        raise UsageError(f"{len(named)} paths cannot be left out", hint=f"Name up to {_MOST}, or folders above them.")
    for path in dict.fromkeys(named):
        if not path.is_absolute():
            raise UsageError(f"{path} is no path from the root", hint="Name what to leave out as /PATH.")
        if len(_text(path)) > MAX_PATH:
            raise UsageError(f"{path} is too long", hint="Name a folder above it.")
        if not path.is_file() and not path.is_dir():
            raise UsageError(f"there is no folder or file {path} that could be left out", hint="Is it mounted?")
        if path.resolve() in _NEEDED:
            raise RefusedError(f"no system would start without {path}", hint="Name what in it is to be left out.")
        found = _locate(path, mounted)
        if found is None:
            raise RefusedError(
                f"{path} is on no volume that is captured, so it cannot be left out",
                hint="Name what lies on a mounted file system of the disks that are backed up.",
            )
        yield found


def _find_swap_files(mounted: _Mounted) -> Iterator[tuple[FileSystem, Place]]:
    """Yield the files that are active swap space. Their headers stay, so that they are swap space again."""
    for path in probe_swaps():
        with suppress(OSError, RemetalError):
            if not is_block_device(path):
                with open_disk(path) as file:
                    header = parse_swap(file.read, file.size())
                found = _locate(path, mounted, keep=header.page_size)
                if found is not None:
                    yield found


def _find_temporary(mounted: _Mounted) -> Iterator[tuple[FileSystem, Place]]:
    """Yield the folders of the running system; one that is a link elsewhere may be anybody's."""
    for name, suffix in _TEMPORARY.items():
        path = Path(name)
        with suppress(OSError, RemetalError):
            found = _locate(path, mounted, suffix=suffix) if path.resolve() == path and path.is_dir() else None
            if found is not None:
                yield found


def _locate(path: Path, mounted: _Mounted, *, suffix: str = "", keep: int = 0) -> tuple[FileSystem, Place] | None:
    """Return the captured file system that a path is on, and where on it; None if it is on none."""
    mount = find_mount_of(path)
    folder = mount.target
    if str(folder) not in mounted:
        return None
    layer, use = mounted[str(folder)]
    if layer.type in KINDS and folder.stat().st_dev != Path(use.device).stat().st_rdev:
        return None  # something else is mounted over it
    return layer, Place(path, folder, str(path.resolve().relative_to(folder)), suffix, keep, mount.root)


def _text(path: Path) -> str:
    """Return a path as a snapshot keeps it: in letters, whatever its bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _find_memory_files(span: Span) -> Mapping[str, list[tuple[int, int]]]:
    with open_disk(span.path) as disk, suppress(BadStructureError):
        return find_memory_files(disk.reader(span.start), span.size)
    return {}
