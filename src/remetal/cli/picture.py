"""A plan as a picture: every source disk above its target, drawn to scale, each partition with what is on it.

    sda        200 GiB  |1 vfat|2 ext4    |3 vg0                          |
    /dev/sdb   400 GiB  |1 vfat|2 ext4    |3 vg0                                                            |

Plain characters only, so that it reads the same on a serial console and in a log. Free space is drawn as dots. Small
partitions are drawn wider than they are, at the cost of the large ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from remetal.layout.model import (
    FileSystem,
    GptTable,
    Layout,
    Luks,
    MbrTable,
    MdArray,
    Raw,
    SpaceId,
    Swap,
    VolumeGroup,
    is_extended,
)
from remetal.layout.plan import Plan
from remetal.units import format_bytes

_NARROWEST = 30
"""Columns below which a bar is not worth drawing."""
_SLIVER = 0.002
"""The share of a disk below which a gap is alignment, and not drawn."""


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a bar: a partition, or free space where `label` is empty; `size` in bytes."""

    label: str
    size: int


def draw_plan(source: Layout, plan: Plan, width: int) -> list[str]:
    """Return the picture's lines, `width` columns wide at most: two for each disk. Pure."""
    rows: list[tuple[str, int, Sequence[Block]]] = []
    for name, target in sorted(plan.targets.items()):
        rows.append((name, source.disk(name).size, find_blocks(source, name)))
        rows.append((f"-> {target.path}", target.size, find_blocks(plan.result, name)))
    left = max((len(title) for title, _, _ in rows), default=0)
    bar = max(width - left - 13, _NARROWEST)
    largest = max((size for _, size, _ in rows), default=1)
    return [
        f"{title:<{left}} {format_bytes(size):>9}  {draw_bar(blocks, max(bar * size // largest, 4))}"
        for title, size, blocks in rows
    ]


def find_blocks(layout: Layout, disk: str) -> list[Block]:
    """Return what lies on a disk, in the order in which it lies, free space included."""
    table = layout.layer_on(disk)
    size = layout.disk(disk).size
    if not isinstance(table, (GptTable, MbrTable)):
        return [Block(_content(layout, disk), size)]
    blocks: list[Block] = []
    end = 0
    plain = (each for each in table.partitions if not is_extended(table, each))
    for each in sorted(plain, key=lambda each: each.start):
        if each.start - end > size * _SLIVER:
            blocks.append(Block("", each.start - end))
        content = _content(layout, f"{disk}:{each.number}")
        blocks.append(Block(f"{each.number} {content}".strip(), each.size))
        end = each.end
    if size - end > size * _SLIVER:
        blocks.append(Block("", size - end))
    return blocks


def draw_bar(blocks: Sequence[Block], width: int) -> str:
    """Return the blocks side by side in `width` columns, walls included: each to scale, but none narrower than one."""
    room = max(width - len(blocks) - 1, len(blocks))
    inner = [_fill(block, columns) for block, columns in zip(blocks, _share(blocks, room), strict=True)]
    return f"|{'|'.join(inner)}|"


def _share(blocks: Sequence[Block], room: int) -> list[int]:
    """Return the columns of each block: one at least, the rest by size; their sum is `room`."""
    total = sum(block.size for block in blocks) or 1
    spare = room - len(blocks)
    exact = [block.size * spare / total for block in blocks]
    columns = [1 + int(each) for each in exact]
    rest = room - sum(columns)
    for index in sorted(range(len(blocks)), key=lambda index: int(exact[index]) - exact[index])[:rest]:
        columns[index] += 1
    return columns


def _fill(block: Block, columns: int) -> str:
    if not block.label:
        return "." * columns
    text = block.label if len(block.label) <= columns else block.label.split(" ")[0]
    return text[:columns].ljust(columns)


def _content(layout: Layout, space: SpaceId) -> str:
    """Return what stands on a space in one or two words."""
    return " ".join(_words(layout, space))


def _words(layout: Layout, space: SpaceId) -> Iterator[str]:
    match layout.layer_on(space):
        case FileSystem() as found:
            yield found.type
        case Swap():
            yield "swap"
        case Raw(type=kind):
            yield kind or "raw"
        case MdArray() as array:
            yield array.device
        case VolumeGroup() as group:
            yield group.name
        case Luks() as luks:
            yield "LUKS"
            yield from _words(layout, luks.device)
        case _:
            pass
