"""Which disk of a machine is which disk of a snapshot, and which must not be written to. Pure.

Disks are matched by what they are, never by what the kernel calls them: by world-wide name, by serial number, and
where neither is known, by size, bus and role. Whatever is not clear is refused, with all candidates and what speaks
for and against each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from remetal.errors import RefusedError, UsageError
from remetal.layout.model import (
    BIOS_BOOT,
    EFI_SYSTEM,
    PREP_BOOT,
    Disk,
    GptTable,
    Layout,
    MbrTable,
    MdArray,
    Raw,
    VolumeGroup,
)
from remetal.layout.sameness import is_same_disk_by_serial, is_same_disk_by_wwn
from remetal.units import format_bytes

if TYPE_CHECKING:  # the plan asks this module what to refuse
    from remetal.layout.plan import Target

IS_MEDIUM = "is the recovery medium"
HOLDS_REPOSITORY = "holds the repository"
IS_PROTECTED = "was named with --protect"

_PORTABLE = {"usb": "by USB", "mmc": "as a memory card"}
_BOOT_TYPES = frozenset({EFI_SYSTEM, BIOS_BOOT, PREP_BOOT, "ef", "41"})
_ACTIVE = 0x80


@dataclass(frozen=True, slots=True)
class Match:
    """A target for one disk, and why it is that one: `same serial number, S3Z1NB0K123456`."""

    target: Target
    reason: str


def match_targets(layout: Layout, candidates: Sequence[Target], mapped: Collection[str] = ()) -> dict[str, Match]:
    """Propose a target for every disk of a layout that is not blank and not among `mapped`, by source name.

    In this order: the only candidate with the same world-wide name; with the same serial number; with the disk's own
    content, since some virtual disks have no other identity, and a restore that broke off has left it on a new one;
    the only free and blank one of exactly the same size on the same bus. One disk that is left goes to the only
    candidate that is free, blank, and large enough. None of the last two is portable (USB, memory card), unless the
    source was. Raises RefusedError, which lists the candidates with reasons, where that is not clear.
    """
    found: dict[str, Match] = {}
    wanted = [disk for disk in layout.disks if disk.name not in mapped and layout.layer_on(disk.name) is not None]
    for tier in (_match_by_wwn, _match_by_serial, _match_by_content, _match_by_size):
        left = [disk for disk in wanted if disk.name not in found]
        for disk, match in tier(layout, left, _without(candidates, found)):
            found[disk.name] = match
    left = [disk for disk in wanted if disk.name not in found]
    if not left:
        return found
    rest = _without(candidates, found)
    fitting = [target for target in rest if not _reason_against(left[0], target)]
    if len(left) == 1 and len(fitting) == 1:
        return {**found, left[0].name: Match(fitting[0], "the only disk that is free, blank and large enough")}
    names = " and ".join(disk.name for disk in left)
    raise RefusedError(
        f"it is not clear onto which disk {names} should go "
        f"({'; '.join(_describe(layout, disk) for disk in left)}): {_listing(left, rest)}",
        hint=" ".join(f"Say it with --map {disk.name}=TARGET." for disk in left),
    )


def find_refusals(target: Target, overwrite: Collection[str], *, own: bool) -> Iterator[tuple[str, str]]:
    """Yield every reason not to write to a target at all, with what to do about it.

    `overwrite` holds the paths of targets that the user named a second time, to say that what is on them may go.
    `own` says that what is on the target belongs to the plan (`is_own`). What is in use, what cannot be written, and
    what holds the repository that is being read stays refused however often it is named.
    """
    named = target.path in overwrite
    for use in target.uses:
        yield f"{target.path} must not be overwritten: {use}", "Unmount it, switch it off, or choose another target."
    for role in target.roles:
        if role != IS_MEDIUM:
            yield f"{target.path} must not be overwritten: it {role}", "Choose another target."
        elif not named:
            yield (
                f"{target.path} must not be overwritten: it {role}",
                f"Choose another target. If it is meant, say so: --overwrite {target.path}.",
            )
    if target.content and not own and not named:
        yield (
            f"{target.path} holds data that are not of this snapshot: {target.content}",
            f"Choose another target. If these data may be lost, say so: --overwrite {target.path}.",
        )


def find_refused(
    layout: Layout, targets: Mapping[str, Target], overwrite: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Yield every reason not to write to the targets of a layout's disks, as `find_refusals` does."""
    for name, target in targets.items():
        yield from find_refusals(target, overwrite, own=is_own(layout, layout.disk(name), target))


def check_overwrite(targets: Mapping[str, Target], overwrite: Collection[str]) -> None:
    """Raise UsageError if a path that may be overwritten is no target: somebody means another disk."""
    paths = [target.path for target in targets.values()]
    for path in overwrite:
        if path not in paths:
            raise UsageError(
                f"--overwrite names {path}, which is no target of this restore",
                hint=f"Its targets: {', '.join(paths) or 'none'}.",
            )


def is_own(layout: Layout, disk: Disk, target: Target) -> bool:
    """Whether what is on a target is the disk's own content: as it was, or as far as a restore got that broke off.

    The marks of both decide: a partition that came later is data outside of the snapshot, also on the very same disk.
    Where there are none, as on a disk whose table was destroyed, its being the same disk does.
    """
    if target.marks:
        return set(target.marks) <= find_marks(layout, disk.name)
    return is_same_disk_by_wwn(disk, target) or is_same_disk_by_serial(disk, target)


def find_marks(layout: Layout, name: str) -> frozenset[str]:
    """Return what the content of a disk is known by: its partition table's and every partition's id, or a volume's.

    A member of a container is known by the array's UUID, in bare digits, or by its own as a physical volume.
    Partitions of DOS tables have the ids that the kernel gives them (PARTUUID): the table's signature and a number.
    """
    layer = layout.layer_on(name)
    match layer:
        case GptTable():
            return frozenset({layer.disk_guid, *(each.uuid for each in layer.partitions)})
        case MbrTable():
            if layer.signature == "00000000":
                return frozenset()
            return frozenset({layer.signature, *(f"{layer.signature}-{each.number:02x}" for each in layer.partitions)})
        case MdArray():
            return frozenset({layer.uuid.replace(":", "")})
        case VolumeGroup():
            return frozenset(each.uuid for each in layer.members if each.space == name)
        case Raw(type="linux_raid_member"):
            return frozenset({layer.uuid.replace("-", "")} - {""})
        case _:
            return frozenset({getattr(layer, "uuid", "")} - {""})


def is_system_disk(layout: Layout, name: str) -> bool:
    """Whether a machine can have booted from this disk: a boot partition, an active one, or a boot loader says so."""
    table = layout.layer_on(name)
    if not isinstance(table, (GptTable, MbrTable)):
        return False
    if any(each.type in _BOOT_TYPES for each in table.partitions):
        return True
    active = isinstance(table, MbrTable) and any(each.attributes & _ACTIVE for each in table.partitions)
    return active or layout.layer_on(f"{name}:boot") is not None


def _match_by_wwn(layout: Layout, left: Sequence[Disk], candidates: Sequence[Target]) -> Iterator[tuple[Disk, Match]]:
    for disk, target in _find_same(is_same_disk_by_wwn, layout.disks, left, candidates):
        yield disk, Match(target, f"same world-wide name, {target.wwn}")


def _match_by_serial(
    layout: Layout, left: Sequence[Disk], candidates: Sequence[Target]
) -> Iterator[tuple[Disk, Match]]:
    for disk, target in _find_same(is_same_disk_by_serial, layout.disks, left, candidates):
        yield disk, Match(target, f"same serial number, {target.serial.strip()}")


def _match_by_content(
    layout: Layout, left: Sequence[Disk], candidates: Sequence[Target]
) -> Iterator[tuple[Disk, Match]]:
    marked = [target for target in candidates if target.marks]
    for disk, target in _find_same(lambda disk, target: is_own(layout, disk, target), layout.disks, left, marked):
        yield disk, Match(target, f"it carries what {disk.name} carried, by the ids of table and partitions")


def _match_by_size(_: Layout, left: Sequence[Disk], candidates: Sequence[Target]) -> Iterator[tuple[Disk, Match]]:
    def alike(disk: Disk, other: Disk | Target) -> bool:
        return bool(disk.bus) and disk.bus == other.bus and disk.size == other.size

    for disk in left:
        same = [target for target in candidates if alike(disk, target) and not _reason_against(disk, target)]
        if len(same) == 1 and sum(alike(each, same[0]) for each in left) == 1:
            words = f"the only free and blank disk of the same size, {disk.size} bytes, on the same bus, {disk.bus}"
            yield disk, Match(same[0], words)


def _find_same(
    is_same: Callable[[Disk, Target], bool],
    disks: Sequence[Disk],
    left: Sequence[Disk],
    candidates: Sequence[Target],
) -> Iterator[tuple[Disk, Target]]:
    """Yield the disks whose identity one candidate has, and that one, where both are the only ones."""
    for disk in left:
        same = [target for target in candidates if is_same(disk, target)]
        if len(same) == 1 and sum(is_same(each, same[0]) for each in disks) == 1:
            yield disk, same[0]


def _without(candidates: Sequence[Target], found: Mapping[str, Match]) -> list[Target]:
    taken = {match.target.path for match in found.values()}
    return [target for target in candidates if target.path not in taken]


def _describe(layout: Layout, disk: Disk) -> str:
    role = "system disk" if is_system_disk(layout, disk.name) else "data disk"
    return f"{disk.name}: a {role} of {format_bytes(disk.size)}{f' on {disk.bus}' if disk.bus else ''}"


def _listing(left: Sequence[Disk], rest: Sequence[Target]) -> str:
    if not rest:
        return "there is no other disk"
    return "; ".join(f"{target.path} ({format_bytes(target.size)}) {_verdict(left, target)}" for target in rest)


def _verdict(left: Sequence[Disk], target: Target) -> str:
    """Return what speaks for and against a candidate, for each of the disks that need one."""
    against = {disk.name: _reason_against(disk, target) for disk in left}
    taken = [name for name, reason in against.items() if not reason]
    words = [f"could take {'it' if len(left) == 1 else ' or '.join(taken)}"] if taken else []
    words += sorted({reason for reason in against.values() if reason})
    twins = [disk.name for disk in left if is_same_disk_by_wwn(disk, target) or is_same_disk_by_serial(disk, target)]
    if twins:
        words.append(f"has the identity of {' and '.join(twins)}, but is not the only one")
    return " and ".join(words)


def _reason_against(disk: Disk, target: Target) -> str:
    """Return why a candidate is not taken unasked, or an empty text."""
    if target.uses:
        return f"cannot be taken ({target.uses[0]})"
    if target.roles:
        return target.roles[0]
    if target.content:
        return f"holds {target.content}"
    if target.size < disk.size:
        return f"is smaller than {disk.name}, which has {format_bytes(disk.size)}"
    if not target.is_file and target.logical_sector != disk.logical_sector:
        return f"has sectors of {target.logical_sector} bytes"
    if target.bus in _PORTABLE and target.bus != disk.bus:
        return f"is attached {_PORTABLE[target.bus]}, as {disk.name} was not"
    return ""
