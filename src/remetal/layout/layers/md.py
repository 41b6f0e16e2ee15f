"""Linux MD arrays (md(4)): opened to capture what is inside, made anew with the same identity and geometry."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from secrets import token_hex

from remetal.layout.keys import Key
from remetal.layout.layers.contract import CannotOpenError, Content, Found
from remetal.layout.layers.md_sizes import STRIPED, extensible_devices, is_startable, least_space, plan_container
from remetal.layout.model import ArrayMember, MdArray, SpaceId
from remetal.ondisk.md import MdSuperblock, array_size, layout_name, level_name, parse_md
from remetal.ondisk.regions import BadStructureError
from remetal.system.blockdev import Span, open_disk, probe_geometry, probe_written
from remetal.system.loop import attach_loop
from remetal.system.mapped import claimed_device, drop_mapping, find_arrays, is_left_behind, is_started, stop_array
from remetal.system.run import Argv, ProgramFailedError, ProgramMissingError, run
from remetal.system.standing import stands_on
from remetal.units import KIB

__all__ = [
    "PROGRAMS",
    "TYPES",
    "apply_container",
    "create_argv",
    "extensible_devices",
    "find_running",
    "is_made",
    "least_space",
    "open_container",
    "plan_container",
    "probe_groups",
]

TYPES: tuple[str, ...] = ("linux_raid_member",)
PROGRAMS: tuple[str, ...] = ("mdadm", "wipefs")

SECTOR = 512
_TRIES = 5


def probe_groups(members: Sequence[Content]) -> list[Found]:
    """Sort the members by their array, and describe each array that they form."""
    found: list[Found] = []
    arrays: dict[str, list[tuple[Content, MdSuperblock]]] = {}
    for member in members:
        try:
            superblock = parse_md(member.read, member.span.size)
            if superblock.problems:
                raise BadStructureError(f"it has {', '.join(superblock.problems)}")
        except BadStructureError as error:
            found.append(
                Found((member.space,), problem=f"{member.space} (RAID member) cannot be used: {error.message}")
            )
            continue
        arrays.setdefault(superblock.array_uuid, []).append((member, superblock))
    return [*found, *map(_describe, arrays.values())]


def _describe(members: list[tuple[Content, MdSuperblock]]) -> Found:
    """Describe one array by its members of the newest state; the others are stale and count as spares."""
    spaces = tuple(member.space for member, _ in members)
    newest = max((each for _, each in members), key=lambda each: each.events)
    current = [(member, each) for member, each in members if each.events >= newest.events - 1 and not each.faulty]
    active = {each.slot: member for member, each in reversed(current) if each.slot is not None}
    level = level_name(newest.level)
    words = f"the RAID array {_name_of(newest)} ({level}, UUID {newest.array_uuid})"
    doubled = _find_doubled(members, current)
    if doubled:
        return Found(
            spaces,
            problem=f"{' and '.join(doubled)} claim one place in {words}, as copies of each other do",
            hint="Back up one of them only, with --disk.",
            lacks_members=True,
        )
    if not is_startable(level, layout_name(newest.level, newest.layout), newest.raid_disks, set(active)):
        missing = newest.raid_disks - len(active)
        return Found(
            spaces,
            problem=f"{words} lacks {missing} of {newest.raid_disks} devices and cannot be started",
            hint="Attach the missing disks, or name them, too, with --disk.",
            lacks_members=True,
        )
    try:
        if (level, newest.version) == ("raid0", "0.90"):
            raise BadStructureError("mdadm makes no RAID 0 with metadata 0.90 any more")
        if newest.component_size % KIB:
            raise BadStructureError("mdadm makes no members whose data end with half a KiB")
        layer = _layer(newest, members, active, level)
    except BadStructureError as error:
        return Found(spaces, problem=f"{words} cannot be carried: {error.message}")
    complete = len(active) == newest.raid_disks
    lacking = "" if complete else f"{words} runs with {len(active)} of {newest.raid_disks} devices"
    return Found(spaces, layer, complete, problem=lacking)


def _find_doubled(
    members: list[tuple[Content, MdSuperblock]], current: list[tuple[Content, MdSuperblock]]
) -> list[SpaceId]:
    """Return the spaces of members that are one and the same, or have the same place in the array; none if all is well.

    Metadata 0.90 do not tell one device from another.
    """
    families: dict[str | int, list[SpaceId]] = {}
    for member, each in members:
        if each.device_uuid:
            families.setdefault(each.device_uuid, []).append(member.space)
    for member, each in current:
        if each.slot is not None:
            families.setdefault(each.slot, []).append(member.space)
    return next((spaces for spaces in families.values() if len(spaces) > 1), [])


def _layer(
    newest: MdSuperblock, members: list[tuple[Content, MdSuperblock]], active: Mapping[int, Content], level: str
) -> MdArray:
    slots = {member.space: slot for slot, member in active.items()}
    records = [
        ArrayMember(
            space=member.space,
            slot=slots.get(member.space, -1),
            data_offset=each.data_offset,
            data_size=each.data_size,
            write_mostly=each.write_mostly,
            fail_fast=each.fail_fast,
        )
        for member, each in members
    ]
    missing = [ArrayMember(space="", slot=slot) for slot in range(newest.raid_disks) if slot not in active]
    ordered = sorted([*records, *missing], key=lambda each: (each.slot < 0, each.slot, each.space))
    return MdArray(
        device=f"md/{re.sub(r'[^A-Za-z0-9_.+-]', '_', _name_of(newest)).lstrip('.+-') or 'array'}",
        size=array_size([each for member, each in members if member.space in slots]),
        members=tuple(ordered),
        uuid=newest.array_uuid,
        level=level,
        metadata=newest.version,
        slots=newest.raid_disks,
        component_size=0 if level in STRIPED else newest.component_size,
        layout=layout_name(newest.level, newest.layout),
        chunk=newest.chunk,
        bitmap=newest.bitmap,
        bitmap_chunk=newest.bitmap_chunk,
        name=newest.name,
        minor=-1 if newest.preferred_minor is None else newest.preferred_minor,
    )


def _name_of(superblock: MdSuperblock) -> str:
    """Return what people call the array: its name without the host's, or its number, or the start of its UUID."""
    if superblock.name:
        return superblock.name.rpartition(":")[2] or superblock.name
    minor = superblock.preferred_minor
    return str(minor) if minor is not None else superblock.array_uuid[:8]


@contextmanager
def open_container(
    layer: MdArray, members: Mapping[SpaceId, Span], keys: Sequence[Key], *, writable: bool
) -> Iterator[Mapping[SpaceId, Path]]:
    """Use the array if it runs already, else assemble it under a name of our own, read-only unless `writable`."""
    known = _find_array(layer, members.values())
    if known is not None and is_started(known) and not is_left_behind(known):
        yield {layer.device: known}
        return
    with ExitStack() as stack:
        try:
            array = _assemble(layer, members, known, stack, writable)
        except (ProgramFailedError, ProgramMissingError) as error:
            raise CannotOpenError(
                f"the RAID array {layer.device} cannot be assembled here: {error.message}", hint=error.hint
            ) from error
        yield {layer.device: array}


def _assemble(
    layer: MdArray, members: Mapping[SpaceId, Span], stale: Path | None, stack: ExitStack, writable: bool
) -> Path:
    """Assemble an array until the stack is closed, in place of one that a killed run left; return its device.

    Also where nothing is to be written, the kernel wants to write to the members of an array with a bitmap, and takes
    those for faulty that it cannot write to; it changes nothing.
    """
    if stale is not None:
        drop_mapping(stale)
    devices = [stack.enter_context(attach_loop(span, writable=writable or layer.bitmap)) for span in members.values()]
    mode = [] if writable else ["--readonly"]
    argv = ["mdadm", "--assemble", "--run", *mode, "--config=none", f"--uuid={layer.uuid}"]
    with _started_dirty():
        array = _start(layer, [*argv, _own_name(layer), *devices], members)
    stack.callback(stop_array, array)
    return stack.enter_context(claimed_device(array))


def _start(layer: MdArray, argv: Argv, members: Mapping[SpaceId, Span]) -> Path:
    """Run what starts an array, and return its device; mdadm makes the node itself, without waiting for udev.

    Where udev was quicker, and began to assemble what lies on the members, that is taken down first.
    """
    for attempt in range(_TRIES):
        try:
            run(argv, env={"MDADM_NO_UDEV": "1"})
        except ProgramFailedError:
            hindering = _find_array(layer, members.values())
            if hindering is None or attempt == _TRIES - 1:
                raise
            drop_mapping(hindering)
        else:
            break
    array = _find_array(layer, members.values())
    for link in Path("/dev/md").glob("remetal-*"):
        link.unlink(missing_ok=True)  # nobody needs the name, and mdadm would leave it behind
    if array is None:
        raise CannotOpenError(f"the kernel shows no RAID array {layer.device}")
    return array


@contextmanager
def _started_dirty() -> Iterator[None]:
    """Let the kernel start arrays that were neither complete nor cleanly stopped, without a write, for a block."""
    switch = Path("/sys/module/md_mod/parameters/start_dirty_degraded")
    before = switch.read_text() if switch.exists() else "1"
    if before.strip() == "0":
        switch.write_text("1")
    try:
        yield
    finally:
        if before.strip() == "0":
            switch.write_text("0")


def _own_name(layer: MdArray) -> Path:
    """Return a name that nobody else has; metadata 0.90 notes the number, which is kept if it is free."""
    number = Path(f"/dev/md{layer.minor}")
    if layer.minor >= 0 and number not in find_arrays():
        return number
    return Path("/dev/md", f"remetal-{token_hex(6)}")


def _find_array(layer: MdArray, spans: Collection[Span]) -> Path | None:
    """Return the running array of this UUID on these members; the disks that it was copied from may be here, too."""
    return next((array for array in find_running(layer) if stands_on(array, spans)), None)


def find_running(layer: MdArray) -> tuple[Path, ...]:
    """Return the running arrays of this UUID: mdadm assembles no second one."""
    said = {array: run(["mdadm", "--detail", "--export", array], allowed=range(256)).text for array in find_arrays()}
    return tuple(array for array, text in said.items() if f"MD_UUID={layer.uuid}" in text.splitlines())


def is_made(layer: MdArray, members: Mapping[SpaceId, Span]) -> bool:
    """Whether this very array, with this geometry, stands on its members."""
    for member in layer.members:
        if not member.space:
            continue
        found = _read(members[member.space])
        if found is None or (found.slot if found.slot is not None else -1) != member.slot:
            return False
        if (found.array_uuid, found.version, level_name(found.level)) != (layer.uuid, layer.metadata, layer.level):
            return False
        if (found.raid_disks, found.chunk, found.data_offset) != (layer.slots, layer.chunk, member.data_offset):
            return False
        if layer.level not in STRIPED and found.component_size != layer.component_size:
            return False
    return True


def _read(span: Span) -> MdSuperblock | None:
    with open_disk(span.path) as disk:
        try:
            return parse_md(disk.reader(span.start), span.size)
        except BadStructureError:
            return None


def apply_container(layer: MdArray, members: Mapping[SpaceId, Span]) -> int:
    """Make the array with its identity, and leave it stopped; the kernel fills its redundancy when it runs."""
    with ExitStack() as stack:
        devices = {space: stack.enter_context(attach_loop(span, writable=True)) for space, span in members.items()}
        before = sum(map(probe_written, devices.values()))
        for device in devices.values():
            run(["wipefs", "--all", "--force", "--quiet", device])
        array = _start(layer, create_argv(layer, devices, _own_name(layer)), members)
        size = probe_geometry(array).size
        _mark_members(layer, devices, array)
        stop_array(array)
        written = sum(map(probe_written, devices.values())) - before
    if size != layer.size:
        raise ProgramFailedError(
            ["mdadm"], 0, "", ending=f"made the array {layer.device} of {size} bytes instead of {layer.size}"
        )
    return written


def _mark_members(layer: MdArray, devices: Mapping[SpaceId, Path], array: Path) -> None:
    """Mark the members that are read last, or given up at the first failure (md.rst, dev-NAME/state)."""
    for each in layer.members:
        state = Path(
            "/sys/class/block", array.name, "md", f"dev-{devices[each.space].name}" if each.space else "-", "state"
        )
        for mark in ("writemostly",) * each.write_mostly + ("failfast",) * each.fail_fast:
            state.write_text(mark)


def create_argv(layer: MdArray, devices: Mapping[SpaceId, Path], path: Path) -> list[str]:
    """Return the command that makes the array as `path` on the devices of its spaces. Pure.

    `--force` keeps every member in its slot, where a RAID 5 would else take its last one for a spare to rebuild.
    """
    version_1 = layer.metadata != "0.90"
    redundant = layer.level not in STRIPED
    slots = [each for each in layer.members if each.slot >= 0]
    spares = [each for each in layer.members if each.slot < 0]
    argv = ["mdadm", "--create", str(path), "--run", "--quiet", "--force", f"--metadata={layer.metadata}"]
    argv += [f"--uuid={layer.uuid}", f"--level={layer.level}", f"--raid-devices={layer.slots}"]
    if version_1:
        argv += ["--homehost=", *([f"--name={layer.name}"] if layer.name else [])]
    if layer.layout and layer.level != "raid4":
        argv.append(f"--layout={layer.layout}")
    if layer.chunk:
        argv.append(f"--{'rounding' if layer.level == 'linear' else 'chunk'}={layer.chunk // KIB}")
    if redundant:
        argv.append(f"--size={layer.component_size // KIB}")
        argv.append(f"--bitmap={'internal' if layer.bitmap else 'none'}")
        if layer.bitmap and layer.bitmap_chunk:
            argv.append(f"--bitmap-chunk={layer.bitmap_chunk // KIB}")
    offsets = {each.data_offset for each in layer.members if each.space}
    if version_1 and len(offsets) > 1:
        argv.append("--data-offset=variable")
    elif version_1 and offsets != {0}:
        argv.append(f"--data-offset={next(iter(offsets)) // SECTOR}s")
    if spares:
        argv.append(f"--spare-devices={len(spares)}")
    for each in (*slots, *spares):
        place = str(devices[each.space]) if each.space else "missing"
        argv.append(f"{place}:{each.data_offset // SECTOR}s" if len(offsets) > 1 and each.space else place)
    return argv
