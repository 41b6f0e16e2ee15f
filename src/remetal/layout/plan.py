"""What a restore will do: a pure function of the layout, the images, the targets and the options.

A plan that can be built can be applied: whatever can be refused is refused here, before the first write. Its id
is a hash of all it depends on except what applying it changes itself, so that an interrupted restore goes on
under the same id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec
import msgspec.structs

from remetal.errors import RefusedError, UsageError
from remetal.layout.estimate import estimate_seconds
from remetal.layout.fitting import Fit, exact_bytes, plan_fit
from remetal.layout.layers import encode_table
from remetal.layout.matching import check_overwrite, find_refused
from remetal.layout.model import (
    Captured,
    Disk,
    FileSystem,
    GptTable,
    Layout,
    Luks,
    MbrTable,
    MdArray,
    Nic,
    Raw,
    SpaceId,
    Struct,
    Swap,
    VolumeGroup,
    spaces_of,
    table_end,
)
from remetal.layout.partial import check_choice, pinned_tables, selected_steps
from remetal.layout.record import MAX_DISK, check_layout
from remetal.layout.reshape import Reshaped, reshape
from remetal.layout.sequence import plan_steps
from remetal.layout.steps import ImageFacts, MakeSwap, OpenContainer, Step, WriteImage, images_in
from remetal.ondisk.regions import BadStructureError
from remetal.units import MIB, format_bytes

__all__ = ["Fate", "ImageFacts", "NicFate", "Plan", "PlanOptions", "Step", "Target", "WriteImage", "plan_restore"]


class Target(Struct, frozen=True, kw_only=True):
    """A disk or disk file that something may be restored onto, as it is now.

    `content` describes what is on it ("" if it is blank), and `marks` are the ids that its content is known by
    (`matching.find_marks`), `table` is its partition table; `uses` and `roles` are reasons not to write to it.
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
    marks: tuple[str, ...] = ()
    table: GptTable | MbrTable | None = None
    uses: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    room: int | None = None


class PlanOptions(Struct, frozen=True, kw_only=True):
    """What the user chose.

    `keep_sizes`: leave the additional space of a larger target free; `grow`: the only volumes that may take it;
    `without`: source disks that are left out; `dissolve`: arrays whose content goes onto one disk; `only`: the volumes
    to restore into the partitions that are there; `keep`: volumes that stay as they stand on the target.
    """

    keep_sizes: bool = False
    grow: tuple[SpaceId, ...] = ()
    without: tuple[str, ...] = ()
    dissolve: tuple[SpaceId, ...] = ()
    only: tuple[SpaceId, ...] = ()
    keep: tuple[SpaceId, ...] = ()


class Fate(Struct, frozen=True, kw_only=True):
    """What happens to one volume or container; `text` says it to a person.

    `action` is, for a volume, `restored`, `grown`, `shrunk`, `copied` (file by file), `remade` (swap space), `kept` or
    `dropped`; for a container, `made`, `opened` or `kept`.
    """

    volume: SpaceId
    action: str
    text: str


class NicFate(Struct, frozen=True, kw_only=True):
    """What becomes of one network card of the captured machine, if the system uses it; `reason` says why.

    `now` is None where it becomes none; `guess` says that it might as well be another, `chosen` that somebody said so.
    """

    before: Nic
    now: Nic | None
    reason: str
    guess: bool = False
    chosen: bool = False


class Plan(Struct, frozen=True, kw_only=True):
    """A restore, step by step. `result` is the layout as it will stand, under the source disks' names.

    `targets` are by source disk, `grown` the volumes whose file systems get larger; `bytes_to_write` is the most,
    `seconds` a rough guess of the time that it takes.
    """

    id: str
    snapshot: str
    options: PlanOptions
    targets: dict[str, Target]
    steps: tuple[Step, ...]
    fates: tuple[Fate, ...]
    grown: tuple[SpaceId, ...]
    bytes_to_write: int
    seconds: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    result: Layout
    moved: dict[SpaceId, SpaceId]
    nics: tuple[NicFate, ...] = ()
    """Empty where nobody knows on which machine the disks will be."""


def plan_restore(
    layout: Layout,
    images: Mapping[SpaceId, ImageFacts],
    targets: Mapping[str, Target],
    *,
    snapshot: str,
    options: PlanOptions,
    overwrite: Collection[str] = (),
) -> Plan:
    """Plan the restore of a layout onto targets, which are given by the source disks' names.

    `overwrite` holds the paths of targets that were named a second time: what is on them may be lost. It does not
    change the plan, only whether there is one.

    Raises ImpossibleLayoutError for a hostile layout, UsageError if `targets` names a disk that it lacks, RefusedError,
    with all reasons and their numbers, if the restore is impossible or unsafe.
    """
    check_layout(layout)
    unknown = sorted(set(targets) - {disk.name for disk in layout.disks})
    if unknown:
        names = ", ".join(disk.name for disk in layout.disks)
        raise UsageError(f"the snapshot has no disk '{unknown[0]}'", hint=f"Its disks: {names}.")
    _check_growth(layout, options)
    shaped = reshape(layout, without=options.without, dissolve=options.dissolve)
    source = shaped.layout
    facts = {each.volume: _facts_of(each.volume, shaped, images) for each in source.captured()}
    check_overwrite(targets, overwrite)
    _refuse([*find_refused(layout, targets, overwrite), *_find_obstacles(source, facts, targets)])
    chosen = {disk.name: targets[disk.name] for disk in source.disks if disk.name in targets}
    disks = {name: _fitted(source.disk(name), target) for name, target in chosen.items()}
    check_choice(source, options.only, options.keep)
    current = {name: target.table for name, target in chosen.items()}
    fit = plan_fit(
        source,
        disks,
        keep_sizes=options.keep_sizes,
        grow=options.grow,
        repacked=shaped.repacked,
        pinned=pinned_tables(source, current, (*options.only, *options.keep)),
    )
    result = Layout(disks=tuple(disks.values()), layers=fit.layers)
    _refuse(list(_find_unwritable(result)))
    check_layout(result)
    files = {name: target.size for name, target in chosen.items() if target.is_file}
    known = {name: each for name, each in facts.items() if each is not None}
    every = tuple(plan_steps(source, result, fit, files, known))
    steps = tuple(selected_steps(every, result, options.only, options.keep))
    used = sum(each.used for step in steps for each in images_in(step))
    _refuse(list(_find_full(result, chosen, steps)))
    return Plan(
        id=_hash_plan(snapshot, layout, images, chosen, options, steps),
        snapshot=snapshot,
        options=options,
        targets=chosen,
        steps=steps,
        fates=(*_plan_fates(result, fit, _written(steps)), *_plan_losses(shaped)),
        grown=fit.grown,
        bytes_to_write=used,
        seconds=estimate_seconds(steps, result, {name: target.bus for name, target in chosen.items()}),
        notes=(*shaped.notes, *_plan_notes(source, result, fit, chosen)),
        warnings=tuple(_plan_warnings(result, chosen)),
        result=result,
        moved=dict(shaped.moved),
    )


def _facts_of(space: SpaceId, shaped: Reshaped, images: Mapping[SpaceId, ImageFacts]) -> ImageFacts | None:
    """Return what is known of the image that goes to a space; None if there is none."""
    name = shaped.images.get(space, space)
    facts = images.get(name)
    return facts if facts is None or name == space else msgspec.structs.replace(facts, image=name)


def _plan_losses(shaped: Reshaped) -> Iterator[Fate]:
    for space in shaped.dropped:
        yield Fate(volume=space, action="dropped", text="left out, because its disk is")


def _check_growth(layout: Layout, options: PlanOptions) -> None:
    """Raise UsageError if a volume that shall grow is none of the snapshot's, or if none may."""
    volumes = [volume.on for volume in layout.volumes() if isinstance(volume, FileSystem)]
    for space in options.grow:
        if space not in volumes:
            raise UsageError(
                f"the snapshot has no file system on '{space}' that could grow", hint=f"It has: {', '.join(volumes)}."
            )
    if options.grow and options.keep_sizes:
        raise UsageError("--grow and --keep-sizes exclude each other", hint="Give one of them.")


def _refuse(reasons: list[tuple[str, str]]) -> None:
    """Raise one RefusedError with all reasons, which are sentences with hints."""
    if reasons:
        raise RefusedError(
            "; ".join(dict.fromkeys(message for message, _ in reasons)),
            hint=" ".join(dict.fromkeys(hint for _, hint in reasons if hint)),
        )


def _find_obstacles(
    layout: Layout, images: Mapping[SpaceId, ImageFacts | None], targets: Mapping[str, Target]
) -> Iterator[tuple[str, str]]:
    taken: dict[str, str] = {}
    for disk in layout.disks:
        target = targets.get(disk.name)
        if target is None:
            if layout.layer_on(disk.name) is not None:
                yield (
                    f"there is no target for disk {disk.name}",
                    f"Add --map {disk.name}=TARGET, or leave it out with --without {disk.name}.",
                )
            continue
        if target.path in taken:
            yield (
                f"{taken[target.path]} and {disk.name} would both go to {target.path}",
                "Map each to its own disk.",
            )
        taken[target.path] = disk.name
        yield from _find_refusals(disk, target)
    for volume in layout.captured():
        facts = images.get(volume.volume)
        if facts is None:
            yield f"the snapshot has no image of volume {volume.volume}", "Choose another snapshot."
        elif not volume.size <= facts.size <= _most(layout, volume):
            yield (
                f"the image of {volume.volume} has {facts.size} bytes, its volume {volume.size}",
                "Try another snapshot.",
            )


def _most(layout: Layout, volume: Captured) -> int:
    """Return how long an image may be: as its space, or as what it holds where that lies in no space."""
    try:
        return layout.place(volume.volume)[2]
    except KeyError:
        return volume.size


def _find_refusals(disk: Disk, target: Target) -> Iterator[tuple[str, str]]:
    """Yield every reason not to write this disk onto this target."""
    if not disk.logical_sector <= target.size < MAX_DISK:
        yield f"{target.path} has the impossible size {target.size}", "Choose another target."


def _find_unwritable(result: Layout) -> Iterator[tuple[str, str]]:
    for layer in result.layers:
        if isinstance(layer, (GptTable, MbrTable)):
            device = result.devices[layer.on]
            try:
                encode_table(layer, device.size, device.logical_sector)
            except BadStructureError as error:
                yield f"the partition table of {layer.on} cannot be written: {error.message}", ""


def _find_full(result: Layout, targets: Mapping[str, Target], steps: tuple[Step, ...]) -> Iterator[tuple[str, str]]:
    images = [(each.used, result.disks_under(each.device)) for step in steps for each in images_in(step)]
    for name, target in targets.items():
        used = sum(size for size, disks in images if name in disks)
        if target.room is not None and used > target.room:
            yield (
                f"{target.path} may take up {exact_bytes(used)}, but where it lies there is {exact_bytes(target.room)}",
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


def _written(steps: tuple[Step, ...]) -> frozenset[SpaceId]:
    """Return what the steps make or write: volumes, and the first spaces of containers."""
    found = set()
    for step in steps:
        match step:
            case OpenContainer():
                found.add(spaces_of(step.container)[0])
            case MakeSwap():
                found.add(step.volume)
            case _:
                found.update(each.volume for each in images_in(step))
    return frozenset(found)


def _plan_fates(result: Layout, fit: Fit, written: frozenset[SpaceId]) -> Iterator[Fate]:
    for layer in result.layers:
        if isinstance(layer, (GptTable, MbrTable)):
            continue
        if spaces_of(layer)[0] not in written and not (isinstance(layer, Luks) and layer.header in written):
            yield Fate(volume=spaces_of(layer)[0], action="kept", text="left as it stands on the target")
            continue
        match layer:
            case MdArray():
                spaces = ", ".join(each.space or "a missing disk" for each in layer.members)
                yield Fate(volume=layer.spaces[0], action="made", text=f"{layer.level} made anew of {spaces}")
            case VolumeGroup():
                spaces = ", ".join(each.space or "a missing disk" for each in layer.members)
                yield Fate(volume=layer.spaces[0], action="made", text=f"{layer.name} made anew on {spaces}")
            case Luks():
                slots = len(layer.key_slots)
                text = f"restored with its header and {slots} key slot{'' if slots == 1 else 's'}, then opened"
                yield Fate(volume=layer.on, action="opened", text=text)
            case Swap():
                text = "made anew at the end of the disk" if layer.on in fit.moved else "made anew"
                yield Fate(volume=layer.on, action="remade", text=text)
            case FileSystem() if layer.on in fit.remade:
                text = "made anew and its files copied, because it does not fit as it is"
                yield Fate(volume=layer.on, action="copied", text=text)
            case FileSystem() if layer.on in fit.shrunk:
                text = f"restored and shrunk to {format_bytes(layer.size)}, because it does not fit as it is"
                yield Fate(volume=layer.on, action="shrunk", text=text)
            case FileSystem() | Raw():
                grown = layer.on in fit.grown
                text = f"restored, then grown to {format_bytes(layer.size)}" if grown else "restored"
                yield Fate(volume=layer.on, action="grown" if grown else "restored", text=text)
            case _:
                pass


def _plan_notes(layout: Layout, result: Layout, fit: Fit, targets: Mapping[str, Target]) -> Iterator[str]:
    volumes = [volume for volume in result.volumes() if volume.on in fit.grown]
    taken = {disk for volume in volumes for space in spaces_of(volume) for disk in result.disks_under(space)}
    for name, target in targets.items():
        more = result.disk(name).size - layout.disk(name).size
        if more >= MIB and name not in taken and layout.layer_on(name) is not None:
            because = f", because {fit.blocked[name]} follows what could grow" if name in fit.blocked else ""
            yield f"{target.path} is {format_bytes(more)} larger than {name}; that stays free{because}"
    for space in fit.moved:
        device = result.place(space)[0].name
        place = targets[device].path if device in targets else device
        yield f"{space} moves to the end of {place}, behind what grows; its UUID stays"
    for table in (layer for layer in result.layers if isinstance(layer, (GptTable, MbrTable))):
        sector, source = result.devices[table.on].logical_sector, layout.devices.get(table.on)
        if table.on not in targets and source is not None and sector != source.logical_sector:
            yield (
                f"the partition table of {table.on} is now for sectors of {sector} bytes; a virtual machine that uses "
                "it has to be told of them"
            )
    for volume in result.volumes():
        for loss in fit.remade[volume.on].losses if volume.on in fit.remade else ():
            yield f"{volume.on}: {loss}"
        if isinstance(volume, Swap):
            yield f"{volume.on} is swap space, made anew with its UUID; what was swapped out does not come back"
        if isinstance(volume, Raw) and volume.type and not volume.sector:
            before, after = (each.place(volume.on)[0].logical_sector for each in (layout, result))
            if after > before:
                yield (
                    f"{volume.on} ({volume.type}) comes byte for byte from a disk with sectors of {before} bytes to "
                    f"one with {after}; whether it opens there only its own system knows"
                )


def _plan_warnings(result: Layout, targets: Mapping[str, Target]) -> Iterator[str]:
    for name, target in targets.items():
        if target.content:
            yield f"what is on {target.path} now will be overwritten: {target.content}"
        table = result.layer_on(name)
        if isinstance(table, MbrTable):
            end = table_end(table, result.disk(name))
            if end < result.disk(name).size:
                rest = format_bytes(result.disk(name).size - end)
                yield f"a DOS partition table cannot use the last {rest} of {target.path}"


def hash_choice(plan: Plan, words: Sequence[str]) -> str:
    """Return the id of a plan that depends on more than its disks: `words` say on what."""
    record = msgspec.json.encode([plan.id, list(words)])
    return hashlib.blake2b(record, digest_size=16, person=b"remetal plan 1").hexdigest()


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
        name: msgspec.structs.replace(target, exists=True, content="", marks=(), table=None, room=None)
        for name, target in targets.items()
    }
    record = msgspec.json.encode(
        [snapshot, layout, dict(images), identities, options, list(steps)], order="deterministic"
    )
    return hashlib.blake2b(record, digest_size=16, person=b"remetal plan 1").hexdigest()
