"""What a restore will do: a pure function of the layout, the images, the targets and the options.

A plan that can be built can be applied: whatever can be refused is refused here, before the first write. Its id
is a hash of all it depends on except what applying it changes itself, so that an interrupted restore goes on
under the same id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import msgspec.structs

from remetal.errors import RefusedError, UsageError
from remetal.layout.fitting import Fit, find_shortage, plan_fit
from remetal.layout.layers import encode_table
from remetal.layout.model import (
    MAX_DISK,
    Disk,
    FileSystem,
    GptTable,
    Layout,
    MbrTable,
    Raw,
    SpaceId,
    Struct,
    Swap,
    Table,
    check_layout,
    table_end,
)
from remetal.layout.sequence import Seat, plan_steps
from remetal.layout.steps import ImageFacts, Step, WriteImage
from remetal.ondisk.regions import BadStructureError
from remetal.units import MIB, format_bytes

__all__ = ["Fate", "ImageFacts", "Plan", "PlanOptions", "Step", "Target", "WriteImage", "plan_restore"]


class Target(Struct, frozen=True, kw_only=True):
    """A disk or disk file that something may be restored onto, as it is now.

    `content` describes what is on it ("" if it is blank); `uses` and `roles` are reasons never to write to it.
    `room` is how many bytes a disk file can hold before its file system is full; None for block devices.
    """

    path: str
    name: str
    size: int
    logical_sector: int = 512
    physical_sector: int = 512
    is_file: bool = False
    exists: bool = True
    model: str = ""
    serial: str = ""
    wwn: str = ""
    bus: str = ""
    content: str = ""
    uses: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    room: int | None = None


class PlanOptions(Struct, frozen=True, kw_only=True):
    """`keep_sizes`: leave the additional space of a larger target free."""

    keep_sizes: bool = False


class Fate(Struct, frozen=True, kw_only=True):
    """What happens to one volume; `action` is `restored`, `grown` or `remade`, `text` says it to a person."""

    volume: SpaceId
    action: str
    text: str


class Plan(Struct, frozen=True, kw_only=True):
    """A restore, step by step. `result` is the layout as it will stand, under the source disks' names.

    `targets` are by source disk, `grown` the volumes whose file systems get larger; `bytes_to_write` is the most.
    """

    id: str
    snapshot: str
    options: PlanOptions
    targets: dict[str, Target]
    steps: tuple[Step, ...]
    fates: tuple[Fate, ...]
    grown: tuple[SpaceId, ...]
    bytes_to_write: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    result: Layout


@dataclass(frozen=True, slots=True)
class _Disk:
    """One disk's share of the plan."""

    source: Disk
    target: Target
    result: Disk
    fit: Fit
    table: Table | None


def plan_restore(
    layout: Layout,
    images: Mapping[SpaceId, ImageFacts],
    targets: Mapping[str, Target],
    *,
    snapshot: str,
    options: PlanOptions,
) -> Plan:
    """Plan the restore of a layout onto targets, which are given by the source disks' names.

    Raises DamagedError for a hostile layout, UsageError if `targets` names a disk that it lacks, RefusedError,
    with all reasons and their numbers, if the restore is impossible or unsafe.
    """
    check_layout(layout)
    unknown = sorted(set(targets) - {disk.name for disk in layout.disks})
    if unknown:
        names = ", ".join(disk.name for disk in layout.disks)
        raise UsageError(f"the snapshot has no disk '{unknown[0]}'", hint=f"Its disks: {names}.")
    _refuse(list(_find_obstacles(layout, images, targets)))
    disks = [_plan_disk(layout, disk, targets[disk.name], options) for disk in layout.disks if disk.name in targets]
    _refuse(list(_find_unwritable(disks)))
    result = Layout(
        disks=tuple(each.result for each in disks),
        layers=tuple(layer for each in disks for layer in each.fit.layers),
    )
    check_layout(result)
    seats = [Seat(each.result, each.target.size if each.target.is_file else None, each.fit) for each in disks]
    steps = tuple(plan_steps(layout, seats, images))
    used = sum(step.used for step in steps if isinstance(step, WriteImage))
    _refuse(list(_find_full(disks, steps)))
    chosen = {each.source.name: each.target for each in disks}
    return Plan(
        id=_hash_plan(snapshot, layout, images, chosen, options, steps),
        snapshot=snapshot,
        options=options,
        targets=chosen,
        steps=steps,
        fates=tuple(fate for each in disks for fate in _plan_fates(each)),
        grown=tuple(space for each in disks for space in each.fit.grown),
        bytes_to_write=used,
        notes=tuple(note for each in disks for note in _plan_notes(each)),
        warnings=tuple(text for each in disks for text in _plan_warnings(each)),
        result=result,
    )


def _refuse(reasons: list[tuple[str, str]]) -> None:
    """Raise one RefusedError with all reasons, which are sentences with hints."""
    if reasons:
        raise RefusedError(
            "; ".join(dict.fromkeys(message for message, _ in reasons)),
            hint=" ".join(dict.fromkeys(hint for _, hint in reasons if hint)),
        )


def _find_obstacles(
    layout: Layout, images: Mapping[SpaceId, ImageFacts], targets: Mapping[str, Target]
) -> Iterator[tuple[str, str]]:
    taken: dict[str, str] = {}
    for disk in layout.disks:
        target = targets.get(disk.name)
        if target is None:
            if layout.layer_on(disk.name) is not None:
                yield f"there is no target for disk {disk.name}", f"Add --map {disk.name}=TARGET."
            continue
        if target.path in taken:
            yield (
                f"{taken[target.path]} and {disk.name} would both go to {target.path}",
                "Map each to its own disk.",
            )
        taken[target.path] = disk.name
        yield from _find_refusals(disk, target, layout)
    for volume in layout.captured():
        facts = images.get(volume.on)
        space = layout.place(volume.on)[2]
        if facts is None:
            yield f"the snapshot has no image of volume {volume.on}", "Choose another snapshot."
        elif not volume.size <= facts.size <= space:
            yield (
                f"the image of {volume.on} has {facts.size} bytes, its volume {volume.size}",
                "Try another snapshot.",
            )


def _find_refusals(disk: Disk, target: Target, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield every reason not to write this disk onto this target."""
    for use in target.uses:
        yield f"{target.path} must not be overwritten: {use}", "Unmount it, switch it off, or choose another target."
    for role in target.roles:
        yield f"{target.path} must not be overwritten: it {role}", "Choose another target."
    if not target.is_file and target.logical_sector != disk.logical_sector:
        sectors = f"{target.path} has sectors of {target.logical_sector} bytes, {disk.name} had {disk.logical_sector}"
        yield (
            f"{sectors}: partition table and file systems cannot be written there as they are",
            f"Choose a target with sectors of {disk.logical_sector} bytes.",
        )
        return
    if not disk.logical_sector <= target.size < MAX_DISK:
        yield f"{target.path} has the impossible size {target.size}", "Choose another target."
        return
    shortage = find_shortage(layout, disk, _fitted(disk, target))
    if shortage is not None:
        needed, there = _exact(shortage.needed), _exact(shortage.there)
        short = _exact(shortage.needed - shortage.there)
        yield (
            f"{target.path} is too small: {shortage.what} needs {needed}, the target has {there}, short by {short}",
            "Choose a larger target.",
        )


def _find_unwritable(disks: list[_Disk]) -> Iterator[tuple[str, str]]:
    for each in disks:
        if each.table is not None:
            try:
                encode_table(each.table, each.result.size, each.result.logical_sector)
            except BadStructureError as error:
                yield f"the partition table of {each.source.name} cannot be written: {error.message}", ""


def _find_full(disks: list[_Disk], steps: tuple[Step, ...]) -> Iterator[tuple[str, str]]:
    for each in disks:
        name, room = each.source.name, each.target.room
        used = sum(step.used for step in steps if isinstance(step, WriteImage) and step.disk == name)
        if room is not None and used > room:
            yield (
                f"{each.target.path} may take up {_exact(used)}, but where it lies there is {_exact(room)}",
                "Make room there, or choose another place.",
            )


def _fitted(source: Disk, target: Target) -> Disk:
    """Return the target as a disk under the source's name; a disk file has the sectors that it is used with."""
    sector = source.logical_sector if target.is_file else target.logical_sector
    return Disk(
        name=source.name,
        size=target.size - target.size % sector,
        logical_sector=sector,
        physical_sector=max(sector, target.physical_sector),
        model=target.model,
        serial=target.serial,
        wwn=target.wwn,
        bus=target.bus,
    )


def _plan_disk(layout: Layout, source: Disk, target: Target, options: PlanOptions) -> _Disk:
    result = _fitted(source, target)
    fit = plan_fit(layout, source, result, keep_sizes=options.keep_sizes)
    table = next((layer for layer in fit.layers if isinstance(layer, (GptTable, MbrTable))), None)
    return _Disk(source, target, result, fit, table)


def _plan_fates(disk: _Disk) -> Iterator[Fate]:
    for volume in disk.fit.layers:
        if isinstance(volume, Swap):
            text = "made anew at the end of the disk" if volume.on in disk.fit.moved else "made anew"
            yield Fate(volume=volume.on, action="remade", text=text)
        elif isinstance(volume, (FileSystem, Raw)):
            grown = volume.on in disk.fit.grown
            text = f"restored, then grown to {format_bytes(volume.size)}" if grown else "restored"
            yield Fate(volume=volume.on, action="grown" if grown else "restored", text=text)


def _plan_notes(disk: _Disk) -> Iterator[str]:
    more = disk.result.size - disk.source.size
    if more >= MIB and not disk.fit.grown and disk.fit.layers:
        because = f", because {disk.fit.blocked_by} follows what could grow" if disk.fit.blocked_by else ""
        yield f"{disk.target.path} is {format_bytes(more)} larger than {disk.source.name}; that stays free{because}"
    for space in disk.fit.moved:
        yield f"{space} moves to the end of {disk.target.path}, behind what grows; its UUID stays"
    for volume in disk.fit.layers:
        if isinstance(volume, Swap):
            yield f"{volume.on} is swap space, made anew with its UUID; what was swapped out does not come back"


def _plan_warnings(disk: _Disk) -> Iterator[str]:
    if disk.target.content:
        yield f"what is on {disk.target.path} now will be overwritten: {disk.target.content}"
    if isinstance(disk.table, MbrTable):
        end = table_end(disk.table, disk.result)
        if end < disk.result.size:
            rest = format_bytes(disk.result.size - end)
            yield f"a DOS partition table cannot use the last {rest} of {disk.target.path}"


def _hash_plan(
    snapshot: str,
    layout: Layout,
    images: Mapping[SpaceId, ImageFacts],
    targets: Mapping[str, Target],
    options: PlanOptions,
    steps: tuple[Step, ...],
) -> str:
    """Return 32 hexadecimal digits; what is on a target, and whether its file exists, do not count."""
    identities = {
        name: msgspec.structs.replace(target, exists=True, content="", room=None) for name, target in targets.items()
    }
    record = msgspec.json.encode(
        [snapshot, layout, dict(images), identities, options, list(steps)], order="deterministic"
    )
    return hashlib.blake2b(record, digest_size=16, person=b"remetal plan 1").hexdigest()


def _exact(count: int) -> str:
    return f"{format_bytes(count)} ({count} bytes)" if count >= 1024 else format_bytes(count)
