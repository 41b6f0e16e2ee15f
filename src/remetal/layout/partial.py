"""Restoring some volumes and leaving others as they stand: `--only` and `--keep`. Pure.

Both need a partition table on the target that holds the snapshot's partitions: it stays as it is, and says where
everything lies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec.structs

from remetal.errors import RefusedError, UsageError
from remetal.layout.model import GptTable, Layout, MbrTable, SpaceId, Table, spaces_of
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
)

_OF_TABLES = (WriteTable, ClearRange, WriteBootCode)


def check_choice(layout: Layout, only: Collection[SpaceId], keep: Collection[SpaceId]) -> None:
    """Raise UsageError for names that are no volumes of the snapshot, or that contradict one another."""
    known = {space for layer in layout.layers for space in spaces_of(layer)} | {disk.name for disk in layout.disks}
    for space in (*only, *keep):
        if space not in known:
            raise UsageError(
                f"the snapshot has nothing on '{space}'", hint="`remetal show SNAPSHOT` lists its disks and volumes."
            )
    if only and keep:
        raise UsageError("--only and --keep exclude each other", hint="Give one of them.")


def pinned_tables(
    layout: Layout, current: Mapping[str, Table | None], chosen: Collection[SpaceId]
) -> dict[SpaceId, Table]:
    """Return the tables that stand on the targets and stay, by source disk: those under the chosen volumes.

    Raises RefusedError if a target has no table with the snapshot's partitions, or if a volume's place depends on a
    table inside a container, which nobody sees before it is open.
    """
    pinned: dict[SpaceId, Table] = {}
    for space in chosen:
        if inner := _find_inner_table(layout, space):
            raise RefusedError(
                f"{space} is a partition of {inner}, which is inside of a container",
                hint=f"Name {inner} as a whole, or restore the whole disks, without --only and --keep.",
            )
        for name in layout.disks_under(space):
            source = layout.layer_on(name)
            if not isinstance(source, (GptTable, MbrTable)):
                continue
            found = current.get(name)
            if found is None or not _is_same_table(source, found):
                raise RefusedError(
                    f"the target of {name} does not have the partitions of the snapshot, so {space} has no place there",
                    hint="Restore the whole disk, without --only and --keep.",
                )
            pinned[name] = _renamed(found, name)
    return pinned


def _find_inner_table(layout: Layout, space: SpaceId) -> SpaceId:
    """Return the device below a space that is no disk and has partitions of which one is used; empty if none."""
    pending = [space]
    while pending:
        each = pending.pop()
        device = layout.place(each)[0].name
        provider = layout.provider_of(device)
        if provider is not None:
            if each != device:
                return device
            pending += spaces_of(provider)
    return ""


def _is_same_table(source: Table, found: Table) -> bool:
    def identity(table: Table) -> list[tuple[int, str, str]]:
        return sorted((each.number, each.type, each.uuid) for each in table.partitions)

    return type(source) is type(found) and identity(source) == identity(found)


def _renamed(table: Table, name: str) -> Table:
    """Return a table under the source disk's name."""
    return msgspec.structs.replace(table, on=name)


def selected_steps(
    steps: Sequence[Step], result: Layout, only: Collection[SpaceId], keep: Collection[SpaceId]
) -> Iterator[Step]:
    """Yield the steps that are left: those for volumes that are chosen, and what opens the way to them."""
    for step in steps:
        if only:
            if _is_wanted(step, result, only):
                yield _as_it_stands(step)
        elif not _is_kept(step, result, keep):
            if not _is_under(step, result, keep):
                yield step
            elif isinstance(step, OpenContainer):
                yield _as_it_stands(step)


def _as_it_stands(step: Step) -> Step:
    """Return a step that opens a container without making it anew; any other as it is."""
    return msgspec.structs.replace(step, make=False) if isinstance(step, OpenContainer) else step


def _is_kept(step: Step, result: Layout, keep: Collection[SpaceId]) -> bool:
    """Whether a step would touch what shall be kept."""
    touched = (step.device,) if isinstance(step, (CreateFile, *_OF_TABLES)) else _touched(step)
    return any(_stands_on(space, each, result) for space in touched for each in keep)


def _is_under(step: Step, result: Layout, keep: Collection[SpaceId]) -> bool:
    """Whether a step would write something that what shall be kept is made of, as a container and its header are."""
    touched = [space.removesuffix(":header") for space in _touched(step)]
    return any(_stands_on(each, space, result) for space in touched for each in keep)


def _is_wanted(step: Step, result: Layout, only: Collection[SpaceId]) -> bool:
    """Whether a step serves what is chosen; tables and boot code stay as they are."""
    match step:
        case OpenContainer():
            return any(_stands_on(each, space, result) for space in spaces_of(step.container) for each in only) or any(
                _stands_on(space, each, result) for space in spaces_of(step.container) for each in only
            )
        case _:
            return any(_stands_on(space, each, result) for space in _touched(step) for each in only)


def _touched(step: Step) -> tuple[SpaceId, ...]:
    """Return the spaces whose content a step writes."""
    match step:
        case WriteImage() | CopyFiles() | ClearSignatures() | MakeSwap() | GrowFileSystem():
            return (step.volume,)
        case RemakeFileSystem() | ShrinkFileSystem() | GrowSpanning():
            return step.volume.spaces
        case OpenContainer():
            return spaces_of(step.container)
        case TakeSnapshot():
            return (f"{step.group.name}/{step.volume}",)
        case _:
            return ()


def _stands_on(space: SpaceId, below: SpaceId, layout: Layout) -> bool:
    """Whether a space is another, or part of it, or made out of what stands on it."""
    pending, seen = [space], set()
    while pending:
        each = pending.pop()
        if each == below or each.startswith(f"{below}:"):
            return True
        if each in seen:
            continue
        seen.add(each)
        device = layout.place(each)[0].name
        provider = layout.provider_of(device)
        pending += [device, *(spaces_of(provider) if provider is not None else ())]
    return False
