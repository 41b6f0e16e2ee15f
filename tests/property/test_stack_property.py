"""Random stacks of layers on random targets: a plan in which everything has its place and its turn, or a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec
import msgspec.structs
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from remetal.errors import RefusedError, UsageError
from remetal.layout.layers import encode_table
from remetal.layout.making import BtrfsMaking
from remetal.layout.matching import find_marks
from remetal.layout.model import (
    Disk,
    FileSystem,
    GptTable,
    Layout,
    Luks,
    MbrTable,
    MdArray,
    Part,
    Partition,
    SpaceId,
    Swap,
    VolumeGroup,
    device_names,
    spaces_of,
)
from remetal.layout.plan import ImageFacts, Plan, PlanOptions, Target, plan_restore
from remetal.layout.record import check_layout, decode_layout, encode_layout
from remetal.layout.steps import (
    ClearRange,
    ClearSignatures,
    CopyFiles,
    CreateFile,
    GrowFileSystem,
    GrowSpanning,
    MakeSwap,
    OpenContainer,
    RemakeFileSystem,
    ShrinkFileSystem,
    Step,
    TakeSnapshot,
    WriteBootCode,
    WriteImage,
    WriteTable,
    images_in,
)
from remetal.ondisk.btrfs import CHUNK_KINDS
from remetal.ondisk.lvm import parse_volume_group
from remetal.units import MIB, align_down
from tests.stacked_layouts import room_of, size_of, stacked_layouts

Case = tuple[Layout, dict[SpaceId, ImageFacts], dict[str, Target], PlanOptions]
Range = tuple[SpaceId, int, int]

CHANGES = [0, 0, 0, 512, 4096, MIB, 50 * MIB, 2000 * MIB + 7 * 512, -512, -MIB, -7 * MIB, -40 * MIB, -500 * MIB]


def images_of(layout: Layout) -> dict[SpaceId, ImageFacts]:
    """Return an image for everything that is captured."""
    found = {}
    for each in layout.captured():
        size = each.size if each.volume.endswith(":key") else layout.place(each.volume)[2]
        found[each.volume] = ImageFacts(size=size, used=min(each.size, 1000), digest="d")
    return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout = draw(stacked_layouts())
    names = [disk.name for disk in layout.disks]
    without: set[str] = draw(st.sets(st.sampled_from(names), max_size=2)) if draw(st.integers(0, 4)) == 0 else set()
    arrays = [each.device for each in layout.layers if isinstance(each, MdArray)]
    dissolve = draw(st.sets(st.sampled_from(arrays))) if bool(arrays) and draw(st.booleans()) else set()
    systems = [each.on for each in layout.volumes() if isinstance(each, FileSystem)]
    grow: set[str] = draw(st.sets(st.sampled_from(systems))) if systems and draw(st.integers(0, 3)) == 0 else set()
    targets = {}
    for disk in layout.disks:
        if disk.name in without:
            continue
        is_file = draw(st.booleans())
        sector = draw(st.sampled_from([disk.logical_sector] * 3 + [512, 4096]))
        size = max(disk.size + draw(st.sampled_from(CHANGES)), 4096)
        targets[disk.name] = Target(
            path=f"/t/{disk.name}",
            name=disk.name,
            size=size if is_file else size - size % sector,
            logical_sector=512 if is_file else sector,
            is_file=is_file,
            exists=not is_file,
        )
    options = PlanOptions(
        keep_sizes=not grow and draw(st.booleans()),
        grow=tuple(sorted(grow)),
        without=tuple(sorted(without)),
        dissolve=tuple(sorted(dissolve)),
    )
    return layout, images_of(layout), targets, options


def plan(case: Case, *, overwrite: bool = False) -> Plan:
    layout, images, targets, options = case
    named = [target.path for target in targets.values()] if overwrite else []
    return plan_restore(layout, images, targets, snapshot="snap", options=options, overwrite=named)


def plan_or_none(case: Case, *, overwrite: bool = False) -> Plan | None:
    """Return the plan; of a refusal, see that it says what is refused and what to do."""
    try:
        found = plan(case, overwrite=overwrite)
    except (RefusedError, UsageError) as error:
        check_reason(case[0], error)
        return None
    event("planned")
    return found


def check_reason(layout: Layout, error: RefusedError | UsageError) -> None:
    """See that a refusal names what it is about, and says what to do."""
    event(f"refused: {kind_of(error.message)}")
    names = {disk.name for disk in layout.disks} | {space for each in layout.layers for space in spaces_of(each)}
    names |= {each.device for each in layout.layers if isinstance(each, MdArray)}
    names |= {each.name for each in layout.layers if isinstance(each, VolumeGroup)}
    assert any(name in error.message for name in names) or "every disk" in error.message, error.message
    assert error.hint, error.message


def kind_of(message: str) -> str:
    """Return the words of a refusal without names and numbers."""
    words = [word for word in message.split() if word.isalpha()]
    return " ".join(words[:9])


def place_of(step: Step) -> Range | None:
    """Return the device and the bytes of it that a step may write, by itself, if that is one place."""
    match step:
        case WriteImage() | CopyFiles() | RemakeFileSystem() | MakeSwap() | ClearRange() | ClearSignatures():
            return step.device, step.start, step.start + step.size
        case GrowFileSystem():
            return step.device, step.start, step.start + step.size
        case WriteBootCode():
            return step.device, 0, len(step.code)
        case _:
            return None


def owner_of(step: Step, result: Layout) -> object:
    """Return for what a step writes: several steps may write to the place of one volume."""
    match step:
        case WriteImage() | CopyFiles() | ClearSignatures() | MakeSwap() | GrowFileSystem():
            return step.volume.removesuffix(":header")
        case RemakeFileSystem():
            return step.volume.on
        case _:
            return id(step)


def written_ranges(found: Plan) -> Iterator[tuple[object, Range]]:
    """Yield what the steps write, by whom it belongs to."""
    for step in found.steps:
        place = place_of(step)
        if place is not None:
            yield owner_of(step, found.result), place
        if isinstance(step, ShrinkFileSystem):
            for each in step.parts:
                yield each.volume, (each.device, each.start, each.start + each.size)
        if isinstance(step, WriteTable):
            for index, piece in enumerate(encode_table(step.table, step.size, step.sector)):
                begin = piece.offset + (440 if index == 0 else 0)
                yield (step.device, index), (step.device, begin, piece.offset + len(piece.data))
        if isinstance(step, OpenContainer) and not isinstance(step.container, Luks):
            for space in spaces_of(step.container):
                device, start, size = found.result.place(space)
                yield ("member", space), (device.name, start, start + size)


@settings(max_examples=400)
@given(cases())
def test_steps_keep_apart_and_inside_of_their_devices(case: Case) -> None:
    found = plan_or_none(case)
    if found is None:
        return
    owned: dict[object, Range] = {}
    for owner, (device, start, end) in written_ranges(found):
        assert 0 <= start <= end <= found.result.devices[device].size
        before = owned.get(owner, (device, start, end))
        assert before[0] == device
        owned[owner] = (device, min(before[1], start), max(before[2], end))
    free: dict[str, int] = {}
    for device, start, end in sorted(owned.values()):
        assert free.get(device, 0) <= start, "two steps write to the same bytes"
        free[device] = end
    chosen = case[2]
    for name in {device for device, _, _ in owned.values()}:
        assert found.result.disks_under(name) <= set(chosen), "a step writes to a disk that nobody named"
    for name, target in chosen.items():
        assert found.result.disk(name).size <= target.size if name in found.targets else True


@settings(max_examples=300)
@given(cases())
def test_everything_has_its_turn(case: Case) -> None:
    """What stands on something comes after it: disks, tables, containers, volumes, growth, boot code."""
    found = plan_or_none(case)
    if found is None:
        return
    there: set[SpaceId] = set(found.targets)
    tables = {each.on for each in found.result.layers if isinstance(each, (GptTable, MbrTable))}
    written: set[SpaceId] = set()
    for step in found.steps:
        for space in needed_by(step):
            device = found.result.place(space)[0].name
            assert device in there, f"{step} comes before its device"
            assert space == device or device not in tables or device in written, f"{step} comes before its table"
        match step:
            case WriteTable():
                assert step.device in there
                written.add(step.device)
            case OpenContainer():
                assert not isinstance(step.container, Luks) or step.container.header in written
                there |= set(device_names(step.container)) - later(found)
            case TakeSnapshot():
                volume = step.group.volume(step.volume)
                assert f"{step.group.name}/{volume.origin}" in there
                there.add(f"{step.group.name}/{step.volume}")
            case WriteImage() | CopyFiles() | ShrinkFileSystem() | MakeSwap():
                volumes = {step.volume} if isinstance(step, MakeSwap) else {each.volume for each in images_in(step)}
                assert not volumes & written, "a volume is written twice"
                written |= volumes
            case GrowFileSystem():
                assert step.volume in written
            case GrowSpanning():
                assert set(step.volume.spaces) <= written
            case _:
                pass
    kinds = [type(step) for step in found.steps]
    codes = kinds.count(WriteBootCode)
    assert WriteBootCode not in kinds[: len(kinds) - codes], "boot code comes last"
    assert written >= {each.on for each in found.result.volumes()}


def later(found: Plan) -> set[SpaceId]:
    """Return the devices that are only there once a snapshot was taken."""
    return {f"{step.group.name}/{step.volume}" for step in found.steps if isinstance(step, TakeSnapshot)}


def needed_by(step: Step) -> tuple[SpaceId, ...]:
    """Return the spaces that must be there before a step."""
    match step:
        case OpenContainer():
            return spaces_of(step.container)
        case RemakeFileSystem() | ShrinkFileSystem() | GrowSpanning():
            return step.volume.spaces
        case WriteImage() | CopyFiles() | MakeSwap() | ClearSignatures() | GrowFileSystem():
            return (step.volume,)
        case ClearRange() | WriteTable() | WriteBootCode() | CreateFile():
            return (step.device,)
        case TakeSnapshot():
            return spaces_of(step.group)


@settings(max_examples=300)
@given(cases())
def test_everything_comes_back_or_is_said_to_be_dropped(case: Case) -> None:
    layout, images, _, options = case
    found = plan_or_none(case)
    if found is None:
        return
    brought = Counter(each.image for step in found.steps for each in images_in(step))
    assert all(count == 1 for count in brought.values())
    dropped = {fate.volume for fate in found.fates if fate.action == "dropped"}
    assert not dropped or options.without
    for volume in images:
        home = volume.removesuffix(":header").removesuffix(":key")
        spanning = layout.layer_on(home)
        homes = {home, *(spanning.spaces if isinstance(spanning, FileSystem) else ())}
        if not volume.endswith(":key"):
            assert (volume in brought) != bool(homes & dropped), f"{volume} is lost, or dropped and restored"
    swaps = [volume.on for volume in layout.volumes() if isinstance(volume, Swap)]
    assert len(swaps) == sum(isinstance(step, MakeSwap) for step in found.steps) + len(dropped & set(swaps))
    assert decode_layout(encode_layout(found.result)) == found.result


@settings(max_examples=300)
@given(cases())
def test_rooms_add_up(case: Case) -> None:
    layout, _, _, options = case
    found = plan_or_none(case)
    if found is None:
        return
    check_layout(found.result)
    copied = {fate.volume for fate in found.fates if fate.action == "copied"}
    for layer in found.result.layers:
        match layer:
            case MdArray():
                check_array(layer, found.result)
            case VolumeGroup():
                check_group(layer, found.result)
            case Luks():
                check_luks(layer, found.result)
            case FileSystem(parts=parts):
                assert sum(part.size for part in parts) == (layer.size if parts else 0)
                larger = layer.size > original_size(layout, layer)
                assert not larger or layer.on in {*found.grown, *copied}
                if options.grow:
                    assert layer.on not in found.grown or layer.on in options.grow
            case _:
                pass
    assert not (options.keep_sizes and found.grown)


@st.composite
def spanning_cases(draw: st.DrawFn) -> Case:
    """One btrfs over some disks, as they are or with a partition, on targets of which most are smaller."""
    sizes = draw(st.lists(st.integers(300, 9000).map(lambda size: size * MIB), min_size=1, max_size=4))
    disks = tuple(Disk(name=f"sd{letter}", size=size) for letter, size in zip("abcd", sizes, strict=False))
    tables = tuple(table_over(disk) for disk in disks if draw(st.booleans()))
    divided = {table.on for table in tables}
    parts = tuple(
        Part(
            space=f"{disk.name}:1" if disk.name in divided else disk.name,
            number=2 * index + 1,
            size=disk.size - (2 * MIB if disk.name in divided else draw(st.sampled_from([0, 4096]))),
            allocated=draw(st.integers(MIB, disk.size // 2)),
        )
        for index, disk in enumerate(disks)
    )
    kinds = draw(st.sets(st.sampled_from(sorted(CHUNK_KINDS)), min_size=1))
    volume = FileSystem(
        on=parts[0].space,
        type="btrfs",
        size=sum(part.size for part in parts),
        used=0,
        block_size=4096,
        parts=parts,
        making=BtrfsMaking(chunks=tuple(sorted(kinds))),
    )
    layout = Layout(disks=disks, layers=(*tables, volume))
    shares = [draw(st.sampled_from([40, 60, 80, 95, 100, 130])) for _ in disks]
    targets = {
        disk.name: Target(path=f"/t/{disk.name}", name=disk.name, size=align_down(disk.size * share // 100, 512))
        for disk, share in zip(disks, shares, strict=True)
    }
    return layout, images_of(layout), targets, PlanOptions(keep_sizes=draw(st.booleans()))


def table_over(disk: Disk) -> GptTable:
    """Return a table with one partition over all but a MiB at both ends of a disk."""
    guid = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
    partition = Partition(number=1, start=MIB, size=disk.size - 2 * MIB, type=guid, uuid=guid)
    return GptTable(on=disk.name, disk_guid=guid, entry_count=128, partitions=(partition,), protective_mbr=bytes(512))


@settings(max_examples=300)
@given(st.one_of(cases(), spanning_cases(), spanning_cases()))
def test_what_shrinks_has_room_for_what_it_holds(case: Case) -> None:
    found = plan_or_none(case)
    if found is None:
        return
    shrunk = {fate.volume for fate in found.fates if fate.action == "shrunk"}
    steps = [step for step in found.steps if isinstance(step, ShrinkFileSystem)]
    assert {step.volume.on for step in steps} == shrunk
    assert not shrunk & set(found.grown)
    for step in steps:
        event("shrunk")
        assert any(each.size < each.before for each in step.parts)
        assert all(each.size <= each.before for each in step.parts)
        for part, each in zip(step.volume.parts, step.parts, strict=True):
            assert (part.space, part.number, part.size) == (each.volume, each.number, each.size)
            assert part.allocated < part.size <= found.result.place(part.space)[2]
            assert part.size % step.volume.block_size == 0


def original_size(layout: Layout, volume: FileSystem) -> int:
    """Return the largest size of a file system of that type in a layout; its space may have another name now."""
    return max(each.size for each in layout.volumes() if isinstance(each, FileSystem) and each.type == volume.type)


def check_array(array: MdArray, layout: Layout) -> None:
    """Hold an array against what mdadm and the kernel will make of its members."""
    for each in array.members:
        if each.space:
            room = room_of(array.metadata, layout.place(each.space)[2], each.data_offset)
            assert max(array.component_size, 1) <= room
            assert each.data_size == room or (each.data_size < room and array.level not in {"raid0", "linear"})
    assert array.size == size_of(array)
    assert array.component_size % (array.chunk or 1) == 0


def check_group(group: VolumeGroup, layout: Layout) -> None:
    """Hold a group's metadata against its record, its physical volumes and itself."""
    said = parse_volume_group(group.metadata)
    noted = {each.name: each for each in group.members}
    assert {pv.id for pv in said.pvs} == set(noted)
    for pv in said.pvs:
        assert (pv.uuid, pv.extents, pv.data_start) == (
            noted[pv.id].uuid,
            noted[pv.id].extents,
            noted[pv.id].data_start,
        )
        copy = MIB if noted[pv.id].metadata_copies == 2 else 0
        assert pv.data_start + pv.extents * said.extent_size + copy <= layout.place(noted[pv.id].space)[2]
    shown = {volume.name: volume.size for volume in said.lvs if volume.visible}
    assert shown == {volume.name: volume.size for volume in group.volumes}
    taken: set[tuple[str, int]] = set()
    for volume in said.lvs:
        for segment in volume.segments:
            share = len(segment.stripes) if segment.type == "striped" else 1
            for name, first in segment.stripes:
                if name in noted:
                    extents = {(name, first + index) for index in range(segment.extents // share)}
                    assert not extents & taken, "two volumes share extents"
                    assert first + segment.extents // share <= noted[name].extents
                    taken |= extents


def check_luks(luks: Luks, layout: Layout) -> None:
    room = layout.place(luks.on)[2] - luks.header_size
    assert luks.size <= room
    assert luks.fixed or luks.size == room - room % luks.sector_size


@settings(max_examples=200)
@given(cases(), st.randoms(use_true_random=False))
def test_the_same_gives_the_same(case: Case, random: object) -> None:
    layout, images, targets, options = case
    found = plan_or_none(case)
    if found is None:
        return
    turned = dict(reversed(targets.items())), dict(reversed(images.items()))
    again = plan((decode_layout(encode_layout(layout)), turned[1], turned[0], options))
    assert again.id == found.id
    assert again.steps == found.steps
    assert msgspec.json.decode(msgspec.json.encode(found), type=Plan) == found
    begun = {
        name: msgspec.structs.replace(
            target, exists=True, content="half", marks=tuple(sorted(find_marks(layout, name))), room=None
        )
        for name, target in targets.items()
        if find_marks(layout, name)
    }
    later = plan((layout, images, {**targets, **begun}, options))
    assert later.id == found.id, "an interrupted restore goes on under its id"
    assert later.steps == found.steps


@settings(max_examples=200)
@given(stacked_layouts())
def test_layouts_survive_their_record(layout: Layout) -> None:
    check_layout(layout)
    assert decode_layout(encode_layout(layout)) == layout


@settings(max_examples=150)
@given(stacked_layouts(), st.sampled_from([512, 4096]))
def test_the_same_disks_take_it_as_it_was(layout: Layout, sector: int) -> None:
    """Onto disks like those of the source everything goes as it was."""
    targets = {
        disk.name: Target(path=f"/t/{disk.name}", name=disk.name, size=disk.size, logical_sector=disk.logical_sector)
        for disk in layout.disks
    }
    found = plan((layout, images_of(layout), targets, PlanOptions()))
    assert found.result.layers == layout.layers
    assert not found.grown


@st.composite
def partial_cases(draw: st.DrawFn, word: str) -> Case:
    """Draw layouts whose disks still have their tables, and some of the volumes on them."""
    layout = draw(stacked_layouts())
    spaces = sorted(
        {space for each in layout.layers for space in spaces_of(each)} - {disk.name for disk in layout.disks}
    )
    assume(spaces)
    chosen = tuple(sorted(draw(st.sets(st.sampled_from(spaces), min_size=1, max_size=3))))
    targets = {}
    for disk in layout.disks:
        table = layout.layer_on(disk.name)
        targets[disk.name] = Target(
            path=f"/t/{disk.name}",
            name=disk.name,
            size=disk.size + draw(st.sampled_from([0, 0, 512 * 8, MIB])),
            logical_sector=disk.logical_sector,
            table=table if isinstance(table, (GptTable, MbrTable)) else None,
            content="as it was",
            marks=tuple(sorted(find_marks(layout, disk.name))),
        )
    options = PlanOptions(only=chosen) if word == "only" else PlanOptions(keep=chosen)
    return layout, images_of(layout), targets, options


def below(space: SpaceId, layout: Layout) -> set[SpaceId]:
    """Return a space, its device, and all spaces and devices that it is made of."""
    found, pending = set(), [space]
    while pending:
        each = pending.pop().removesuffix(":header")
        if each not in found:
            found.add(each)
            device = layout.place(each)[0].name
            provider = layout.provider_of(device)
            pending += [device, *(spaces_of(provider) if provider is not None else ())]
    return found


@settings(max_examples=200)
@given(partial_cases("keep"))
def test_what_is_kept_is_not_touched(case: Case) -> None:
    """Neither are its bytes, nor what it is made of: a container under it is opened as it stands, or not at all."""
    found = plan_or_none(case, overwrite=True)
    if found is None:
        return
    for space in case[3].keep:
        device, start, size = found.result.place(space)
        under = below(space, found.result)
        for step in found.steps:
            place = place_of(step)
            inside = place is not None and place[0] == device.name and place[1] < start + size and start < place[2]
            assert not inside, f"{step} touches {space}, which is kept"
            if isinstance(step, OpenContainer) and set(spaces_of(step.container)) & under:
                assert not step.make, f"{step} makes anew what {space} lies on, which is kept"
            if isinstance(step, (WriteImage, ClearSignatures, MakeSwap)):
                assert step.volume.removesuffix(":header") not in under, f"{step} writes below {space}, which is kept"


@settings(max_examples=200)
@given(partial_cases("only"))
def test_only_what_is_chosen_is_written(case: Case) -> None:
    found = plan_or_none(case, overwrite=True)
    if found is None:
        return
    chosen = set(case[3].only)
    for step in found.steps:
        assert not isinstance(step, (WriteTable, ClearRange, WriteBootCode))
        if isinstance(step, OpenContainer):
            assert not step.make or chosen & set().union(
                *(below(each, found.result) for each in spaces_of(step.container))
            )
        else:
            taken = (f"{step.group.name}/{step.volume}",) if isinstance(step, TakeSnapshot) else needed_by(step)
            written = {under for space in taken for under in below(space, found.result)}
            assert written & chosen or isinstance(step, CreateFile), f"{step} was not asked for"
