"""Which of this machine's disks the running system uses, and so are captured where nobody names any.

A disk counts if it is mounted where a system keeps itself, where /etc/fstab or a mount unit of systemd says, or if it
is active swap space, whatever disk it is. One that is mounted by other means (a script, by hand) counts if it is built
in: a database may lie on it. One that comes and goes is somebody's medium, perhaps for other backups. Where not even
the root lies on a disk, only what is named counts: what is mounted in a container may be its host's. What is mounted
and does not count is told.

Source: fstab(5), systemd.mount(5), systemd.unit(5) ("String Escaping for Inclusion in Unit Names"), file-hierarchy(7).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remetal.errors import RefusedError
from remetal.events import Note, Report, silent
from remetal.layout.disks import device_of, find_covered, find_disk_names
from remetal.layout.identity import is_fixed
from remetal.layout.uses import disks_of_number, numbers_of_mount, probe_swaps
from remetal.system.blockdev import is_block_device
from remetal.system.mounts import find_mount_of, parse_fstab_places, probe_mounts

_SYSTEM_PLACES = frozenset(map(Path, ("/", "/usr", "/boot", "/boot/efi", "/efi", "/var", "/home", "/opt", "/srv")))
_PASSING = ("/media", "/run", "/tmp", "/var/tmp")  # noqa: S108 - where what is mounted is not to stay
_UNITS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/run/systemd/generator.early",
    "/run/systemd/generator",
    "/run/systemd/generator.late",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)
"""Where mount units are that somebody wrote, or that a generator made. What systemd makes of a mount by hand is not."""
_ESCAPE = re.compile(rb"\\x([0-9a-fA-F]{2})")


@dataclass(frozen=True, slots=True)
class _Mounted:
    """A file system that is mounted from disks, and whether the repository lies on it.

    `parts` are the kernel names of what lies under it, `disks` of what stands for that (multipath, firmware RAID).
    """

    place: Path
    parts: frozenset[str]
    disks: frozenset[str]
    holds_repository: bool


def find_system_disks(repository: Path | None = None, report: Report = silent) -> list[Path]:
    """Return the disks that the running system uses, and tell which others something is mounted from.

    One that the folder `repository` is mounted from is not among them unless something else of the system lies on it.
    Raises RefusedError if there is none: a recovery medium runs from memory.
    """
    names, covered = find_disk_names(), find_covered()
    mounted = list(_probe_mounted(frozenset(names), covered, repository))
    own = _find_own(mounted) | _find_swap(covered)
    found = [device_of(name) for name in names if name in own]
    if not found:
        on = next((mount.kind for mount in reversed(probe_mounts()) if mount.target == Path("/")), "")
        where = f": its root is of the kind {on}, as in a container or a live system" if on else ""
        raise RefusedError(
            f"the running system uses no disk of its own{where}",
            hint="Name the disks to back up with --disk; those of a container are its host's, so run remetal there.",
        )
    for name in names:
        uses = [each for each in mounted if name in each.disks and name not in own]
        if uses:
            report(Note(_describe_passed_over(device_of(name), uses)))
    return found


def find_named_places(root: Path = Path("/")) -> set[Path]:
    """Return the places where fstab or a mount unit of systemd mounts something, in the system at `root`."""
    try:
        text = os.fsdecode((root / "etc/fstab").read_bytes())
    except OSError:
        text = ""
    places = set(parse_fstab_places(text))
    for folder in _UNITS:
        for unit in (root / folder.lstrip("/")).glob("*.mount"):
            places.add(parse_unit_place(unit.name))
    return places


def parse_unit_place(name: str) -> Path:
    """Return where the mount unit of this name mounts something, which systemd lets it say in no other way."""
    path = name.removesuffix(".mount").replace("-", "/").encode("utf-8", "surrogateescape")
    plain = _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), path)
    return Path("/", os.fsdecode(plain).lstrip("/"))


def _probe_mounted(names: frozenset[str], covered: Mapping[str, str], repository: Path | None) -> Iterator[_Mounted]:
    """Yield what is mounted from real disks."""
    stored = set() if repository is None else numbers_of_mount(find_mount_of(repository))
    for mount in probe_mounts():
        numbers = numbers_of_mount(mount)
        parts = frozenset(disk for number in numbers for disk in disks_of_number(number))
        disks = frozenset(covered.get(part, part) for part in parts) & names
        if disks:
            yield _Mounted(mount.target, parts, disks, holds_repository=bool(numbers & stored))


def _find_own(mounted: Sequence[_Mounted]) -> set[str]:
    """Return the kernel names of the disks under what is mounted that the system uses."""
    named = _without_links(find_named_places())
    stored = {disk for each in mounted if each.holds_repository for disk in each.disks}
    on_disk = any(each.place == Path("/") for each in mounted)  # else what is mounted may be a container's host's
    own: set[str] = set()
    for each in mounted:
        passing = any(each.place.is_relative_to(place) for place in _PASSING)
        built_in = not passing and not each.disks & stored and any(map(is_fixed, each.parts))
        if (each.place in named and not each.holds_repository) or (
            on_disk and (each.place in _SYSTEM_PLACES or built_in)
        ):
            own |= each.disks
    return own


def _without_links(places: set[Path]) -> set[Path]:
    """Return places as the kernel knows them. What is mounted is known already: nobody is to wait for its server."""
    known = places & {mount.target for mount in probe_mounts()}
    return known | {Path(os.path.realpath(place)) for place in places - known}


def _find_swap(covered: Mapping[str, str]) -> set[str]:
    numbers = [path.stat().st_rdev for path in probe_swaps() if is_block_device(path)]
    found = {disk for number in numbers for disk in disks_of_number((os.major(number), os.minor(number)))}
    return {covered.get(name, name) for name in found}


def _describe_passed_over(device: Path, uses: Sequence[_Mounted]) -> str:
    where = f"{device} (mounted at {', '.join(sorted({str(each.place) for each in uses}))}) is not captured"
    if any(each.holds_repository for each in uses):
        return f"{where}: the repository lies on it"
    return (
        f"{where}: neither fstab nor a mount unit of systemd names it, so it may be a medium that comes and goes. "
        "To capture it, too, name every disk with --disk"
    )
