"""Swap space: made anew with the same identity."""

from __future__ import annotations

from remetal.layout.layers.contract import Content
from remetal.layout.model import Swap
from remetal.ondisk.regions import BadStructureError
from remetal.ondisk.swap import SwapHeader, parse_swap
from remetal.system.blockdev import Span, open_disk, probe_written
from remetal.system.loop import attach_loop
from remetal.system.run import run

TYPES: tuple[str, ...] = ("swap", "swsuspend")
PROGRAMS: tuple[str, ...] = ("mkswap",)


def probe_volume(content: Content) -> Swap:
    """Describe the swap space from its header."""
    found = parse_swap(content.read, content.span.size)
    return Swap(on=content.space, size=found.size, page_size=found.page_size, uuid=found.uuid, label=found.label)


def is_swap(span: Span, swap: Swap) -> bool:
    """Whether this very swap space stands on `span` already."""
    with open_disk(span.path) as disk:
        try:
            found = parse_swap(lambda offset, count: disk.read(span.start + offset, count), span.size)
        except BadStructureError:
            return False
    return found == SwapHeader(swap.size, swap.page_size, swap.uuid, swap.label)


def apply_swap(span: Span, swap: Swap) -> int:
    """Make the swap space at the start of `span`; return the bytes written."""
    with attach_loop(Span(span.path, span.start, swap.size), writable=True) as device:
        before = probe_written(device)
        identity = ["--uuid", swap.uuid] if swap.uuid else []
        label = ["--label", swap.label] if swap.label else []
        run(["mkswap", "--force", "--pagesize", str(swap.page_size), *identity, *label, device])
        return probe_written(device) - before
