"""Random layouts on random targets: a plan, whose every step stays in its own place, or a refusal with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import msgspec
import msgspec.structs
import pytest
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st

from remetal.errors import RefusedError
from remetal.layout.layers import encode_table
from remetal.layout.model import (
    BIOS_BOOT,
    EFI_SYSTEM,
    Disk,
    FileSystem,
    GptTable,
    Layer,
    Layout,
    MbrTable,
    MdArray,
    Partition,
    Raw,
    Swap,
    Table,
    Volume,
    VolumeGroup,
    boot_area,
    is_extended,
    table_end,
)
from remetal.layout.plan import ImageFacts, Plan, PlanOptions, Target, plan_restore
from remetal.layout.record import ImpossibleLayoutError, check_layout, decode_layout, encode_layout
from remetal.layout.steps import (
    ClearRange,
    ClearSignatures,
    GrowFileSystem,
    MakeSwap,
    Step,
    WriteBootCode,
    WriteImage,
    WriteTable,
)

MIB = 1 << 20
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
GUID = "12345678-1234-4234-8234-1234567890AB"
SIGNED = bytes(510) + b"\x55\xaa"


@st.composite
def volumes(draw: st.DrawFn, space: str, size: int) -> Volume:
    kind = draw(st.sampled_from(["ext4", "ext2", "xfs", "vfat", "swap", "raw", "crypto_LUKS"]))
    if kind == "swap" and size >= 40960:
        return Swap(on=space, size=size - size % 4096, uuid=GUID.lower(), label=draw(st.text("abc", max_size=3)))
    if kind in {"raw", "crypto_LUKS", "swap"} or size < 65536:
        return Raw(on=space, size=size, type="" if kind == "raw" else "crypto_LUKS")
    inside = draw(st.integers(65536 // 4096, size // 4096)) * 4096
    features = ("64bit",) if draw(st.booleans()) else ()
    return FileSystem(
        on=space, type=kind, size=inside, used=draw(st.integers(0, inside)), block_size=4096, features=features
    )


@st.composite
def gpt_layers(draw: st.DrawFn, name: str, size: int, sector: int) -> list[Layer]:
    empty = GptTable(on=name, disk_guid=GUID, entry_count=128, partitions=(), protective_mbr=SIGNED)
    first = boot_area(empty, sector)[0] // sector
    last = table_end(empty, Disk(name=name, size=size, logical_sector=sector)) // sector
    cuts = sorted(draw(st.sets(st.integers(first, last), max_size=10)))
    numbers = draw(st.permutations(range(1, 9)))
    kinds = st.sampled_from([LINUX, LINUX, LINUX, EFI_SYSTEM, BIOS_BOOT])
    partitions = tuple(
        Partition(
            number=number, start=start * sector, size=(end - start) * sector, type=draw(kinds), uuid=GUID, name="x"
        )
        for number, start, end in zip(numbers, cuts[::2], cuts[1::2], strict=False)
    )
    return draw(filled(msgspec.structs.replace(empty, partitions=partitions), sector))


@st.composite
def mbr_layers(draw: st.DrawFn, name: str, size: int, sector: int) -> list[Layer]:
    sectors = min(size // sector, 1 << 32)
    cuts = sorted(draw(st.sets(st.integers(1, sectors), max_size=8)))
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    partitions = [
        Partition(number=index + 1, start=start * sector, size=(end - start) * sector, type="83")
        for index, (start, end) in enumerate(ranges)
    ]
    extended = draw(st.none() | st.integers(0, 3))
    if extended is not None and extended < len(ranges):
        start, end = ranges[extended]
        partitions[extended] = msgspec.structs.replace(partitions[extended], type="05")
        inner = sorted(draw(st.sets(st.integers(start, end), max_size=9)))
        triples = [inner[index : index + 3] for index in range(0, len(inner) - 2, 3)]
        good = [each for each in triples if each[0] == start or each is not triples[0] or each[0] > start]
        partitions += [
            Partition(number=5 + index, start=b * sector, size=(c - b) * sector, type="83", record=a * sector)
            for index, (a, b, c) in enumerate(good)
        ]
    table = MbrTable(on=name, signature="0badcafe", partitions=tuple(partitions), boot_code=b"B" * 440)
    return draw(filled(table, sector))


@st.composite
def filled(draw: st.DrawFn, table: Table, sector: int) -> list[Layer]:
    layers: list[Layer] = [table]
    start, end = boot_area(table, sector)
    if end > start and draw(st.booleans()):
        layers.append(Raw(on=f"{table.on}:boot", size=end - start))
    plain = [each for each in table.partitions if not is_extended(table, each)]
    return [*layers, *(draw(volumes(f"{table.on}:{each.number}", each.size)) for each in plain)]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    disks, layers = [], []
    for name in ["sda", "sdb"][: draw(st.integers(1, 2))]:
        sector = draw(st.sampled_from([512, 4096]))
        sectors = st.integers(2 * MIB // sector, 64 * MIB // sector) | st.integers(2 * MIB, 1 << 33)
        disk = Disk(name=name, size=draw(sectors) * sector, logical_sector=sector)
        kind = draw(st.sampled_from(["gpt", "mbr", "whole", "blank"]))
        if kind == "gpt":
            layers += draw(gpt_layers(name, disk.size, sector))
        elif kind == "mbr":
            layers += draw(mbr_layers(name, disk.size, sector))
        elif kind == "whole":
            layers.append(draw(volumes(name, disk.size)))
        disks.append(disk)
    layout = Layout(disks=tuple(disks), layers=tuple(layers))
    try:
        check_layout(layout)
    except ImpossibleLayoutError:
        reject()  # logical partitions were drawn on top of the first record
    return layout


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, dict[str, ImageFacts], dict[str, Target]]:
    layout = draw(layouts())
    images = {
        each.volume: ImageFacts(size=layout.place(each.volume)[2], used=each.size, digest="d")
        for each in layout.captured()
    }
    targets = {}
    for disk in layout.disks:
        change = draw(st.sampled_from([0, 0, 512, MIB, 100 * MIB, 4096 * 7, 1 << 43, -512, -MIB, -40 * MIB]))
        size = max(512, disk.size + change)
        is_file = draw(st.booleans())
        targets[disk.name] = Target(
            path=f"/t/{disk.name}",
            name=disk.name,
            size=size if is_file else size - size % disk.logical_sector,
            logical_sector=512 if is_file else disk.logical_sector,
            is_file=is_file,
            exists=not is_file,
        )
    return layout, images, targets


def plan(case: tuple[Layout, dict[str, ImageFacts], Mapping[str, Target]], options: PlanOptions | None = None) -> Plan:
    layout, images, targets = case
    named_twice = [target.path for target in targets.values()]
    return plan_restore(
        layout, images, targets, snapshot="snap", options=options or PlanOptions(), overwrite=named_twice
    )


def plan_or_none(
    case: tuple[Layout, dict[str, ImageFacts], Mapping[str, Target]], options: PlanOptions | None = None
) -> Plan | None:
    with suppress(RefusedError):
        return plan(case, options)
    return None


def reach(step: Step) -> tuple[int, int] | None:
    """Return the bytes of its disk that a step may write, tables aside."""
    match step:
        case WriteImage() | MakeSwap() | ClearRange() | ClearSignatures() | GrowFileSystem():
            return step.start, step.start + step.size
        case WriteBootCode():
            return 0, len(step.code)
        case _:
            return None


@settings(max_examples=250)
@given(cases(), st.booleans())
def test_a_plan_keeps_to_its_places(case: tuple[Layout, dict[str, ImageFacts], dict[str, Target]], keep: bool) -> None:
    layout, _, targets = case
    found = plan_or_none(case, PlanOptions(keep_sizes=keep))
    if found is None:
        event("refused")
        assert any(targets[disk.name].size < disk.size for disk in layout.disks)
        return
    event("grown" if found.grown else "moved" if "moves" in " ".join(found.notes) else "planned")
    check_layout(found.result)
    for disk in layout.disks:
        steps = [step for step in found.steps if getattr(step, "device", "") == disk.name]
        size = targets[disk.name].size
        own: dict[object, tuple[int, int]] = {}
        for step in steps:
            place = reach(step)
            if place is not None:
                assert 0 <= place[0] <= place[1] <= size
                key = getattr(step, "volume", id(step))
                before = own.get(key, place)
                own[key] = (min(before[0], place[0]), max(before[1], place[1]))
            if isinstance(step, WriteTable):
                for index, piece in enumerate(encode_table(step.table, step.size, step.sector)):
                    assert piece.offset + len(piece.data) <= size
                    begin = piece.offset + (440 if index == 0 else 0)
                    own["table", index] = (begin, piece.offset + len(piece.data))
        free = 0
        for start, end in sorted(own.values()):
            assert free <= start, "two steps write to the same bytes"
            free = end


@settings(max_examples=200)
@given(cases())
def test_everything_that_was_there_is_there_again(
    case: tuple[Layout, dict[str, ImageFacts], dict[str, Target]],
) -> None:
    layout, images, targets = case
    found = plan_or_none(case)
    if found is None:
        return
    assert {step.volume for step in found.steps if isinstance(step, WriteImage)} == set(images)
    assert {fate.volume for fate in found.fates} == {volume.on for volume in layout.volumes()}
    for before in layout.layers:
        assert not isinstance(before, (MdArray, VolumeGroup)), "these cases have no containers"
        after = found.result.layer_on(before.on)
        assert type(after) is type(before)
        if isinstance(before, (GptTable, MbrTable)) and isinstance(after, (GptTable, MbrTable)):
            kept = [(each.number, each.type, each.uuid, each.name, each.attributes) for each in before.partitions]
            assert kept == [(e.number, e.type, e.uuid, e.name, e.attributes) for e in after.partitions]
            changed = {
                f"{before.on}:{a.number}" for a, b in zip(before.partitions, after.partitions, strict=True) if a != b
            }
            ends = {each.number: each.end for each in before.partitions}
            if targets[before.on].size < layout.disk(before.on).size:
                assert all(each.end <= ends[each.number] for each in after.partitions), "nothing moves backwards"
            elif not any(space.startswith(f"{before.on}:") for space in found.grown):
                assert not changed
        elif isinstance(before, FileSystem) and isinstance(after, FileSystem):
            assert after == before or (before.on in found.grown and after.size > before.size)
        elif isinstance(before, Swap) and isinstance(after, Swap):
            assert (after.uuid, after.label, after.page_size) == (before.uuid, before.label, before.page_size)
            assert before.size // 2 <= after.size <= before.size
        else:
            assert after == before
    for space in found.grown:
        name = space.partition(":")[0]
        assert targets[name].size > layout.disk(name).size
        table = found.result.layer_on(name)
        if isinstance(table, (GptTable, MbrTable)):
            last = max(each.end for each in table.partitions)
            assert 0 <= table_end(table, found.result.disk(name)) - last < MIB, "space is left at the end"
    if all(target.size == layout.disk(name).size for name, target in targets.items()):
        assert found.result.layers == layout.layers


@settings(max_examples=100)
@given(cases())
def test_what_boots_comes_last(case: tuple[Layout, dict[str, ImageFacts], dict[str, Target]]) -> None:
    found = plan_or_none(case)
    if found is None:
        return
    order = [type(step).__name__ for step in found.steps]
    first = {name: order.index(name) for name in set(order)}
    last = {name: len(order) - 1 - order[::-1].index(name) for name in set(order)}
    if "WriteBootCode" in first:
        assert all(last[name] < first["WriteBootCode"] for name in last if name != "WriteBootCode")
    if "WriteTable" in first:
        assert all(first[name] > last["WriteTable"] for name in ("WriteImage", "MakeSwap") if name in first)
    boots = [
        index
        for index, step in enumerate(found.steps)
        if isinstance(step, WriteImage) and step.volume.endswith(":boot")
    ]
    others = [
        index
        for index, step in enumerate(found.steps)
        if isinstance(step, WriteImage) and not step.volume.endswith(":boot")
    ]
    assert not boots or not others or max(others) < min(boots)


@settings(max_examples=100)
@given(cases(), st.data())
def test_the_id_depends_on_what_matters_and_on_nothing_else(
    case: tuple[Layout, dict[str, ImageFacts], dict[str, Target]], data: st.DataObject
) -> None:
    layout, images, targets = case
    found = plan_or_none(case)
    if found is None:
        return
    assert plan(case) == found
    assert msgspec.json.decode(msgspec.json.encode(found), type=Plan) == found
    begun = {
        name: msgspec.structs.replace(target, exists=True, content="half a restore", room=1 << 62)
        for name, target in targets.items()
    }
    assert plan((layout, images, begun)).id == found.id, "an interrupted restore goes on under its id"
    name = data.draw(st.sampled_from(sorted(targets)))
    own = targets[name]
    other = data.draw(
        st.sampled_from(
            [
                msgspec.structs.replace(own, serial="other"),
                msgspec.structs.replace(own, wwn="naa.5"),
                msgspec.structs.replace(own, path="/t/other"),
                msgspec.structs.replace(own, size=own.size + MIB),
            ]
        )
    )
    assert plan((layout, images, {**targets, name: other})).id != found.id
    if images:
        volume = data.draw(st.sampled_from(sorted(images)))
        changed = {**images, volume: msgspec.structs.replace(images[volume], digest="e")}
        assert plan((layout, changed, targets)).id != found.id


@settings(max_examples=100)
@given(cases(), st.data())
def test_reasons_never_to_write_always_refuse(
    case: tuple[Layout, dict[str, ImageFacts], dict[str, Target]], data: st.DataObject
) -> None:
    layout, images, targets = case
    name = data.draw(st.sampled_from(sorted(targets)))
    reason = data.draw(st.sampled_from([{"uses": ("it is mounted",)}, {"roles": ("holds the repository",)}]))
    marked = {**targets, name: msgspec.structs.replace(targets[name], **reason)}
    with pytest.raises(RefusedError, match=r"mounted|repository"):
        plan((layout, images, marked))


@settings(max_examples=150)
@given(layouts())
def test_layouts_survive_their_record(layout: Layout) -> None:
    assert decode_layout(encode_layout(layout)) == layout
