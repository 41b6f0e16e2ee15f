"""The passphrases of LUKS containers that no given key opens: whoever sits there is asked, and what is typed is tried.

A workflow knows which container is meant and whether an answer was right; its caller knows how to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from remetal.events import Event, Report
from remetal.layout.keys import Key
from remetal.layout.layers import luks
from remetal.layout.layers.contract import Content
from remetal.layout.model import Luks, Raw, SpaceId
from remetal.layout.opened import span_of
from remetal.layout.probe import Probed, opened_layout
from remetal.system.blockdev import open_disk
from remetal.system.run import find_program

AskPassphrase: TypeAlias = Callable[[Luks, int], bytes | None]
"""Asks for the passphrase of a container; the number says how many answers were wrong. None gives up."""


def ask_for_key(container: Luks, header: bytes, ask: AskPassphrase) -> Key | None:
    """Return the key that a person types for a container, or None if they give up; a wrong one is asked for again.

    `header` are the container's first `header_size` bytes. The key may be tried on other containers, too.
    """
    wrong = 0
    while (typed := ask(container, wrong)) is not None:
        key = luks.find_key(container, header, [Key(typed)])
        if key is not None:
            return key
        wrong += 1
    return None


@contextmanager
def opened_disks(
    disks: Sequence[Path], keys: Sequence[Key], ask: AskPassphrase | None, *, need_all: bool, report: Report
) -> Iterator[tuple[Probed, tuple[Key, ...]]]:
    """Open disks and all that is on them, as `opened_layout` does, and yield them with the keys that this took.

    A person is asked for containers that `keys` do not open; with `need_all`, also for those that are open already.
    Once they gave one, everything is opened anew, because there may be more inside; only the last time is reported.
    """
    known = tuple(keys)
    asked: set[SpaceId] = set()
    while True:
        said: list[Event] = []
        with opened_layout(disks, keys=known, report=report if ask is None else said.append) as probed:
            found = () if ask is None else tuple(_ask_for_closed(probed, known, ask, asked, need_all))
            if not found:
                for event in said:
                    report(event)
                yield probed, known
                return
            known = (*known, *found)


def _ask_for_closed(
    probed: Probed, keys: Sequence[Key], ask: AskPassphrase, asked: set[SpaceId], need_all: bool
) -> Iterator[Key]:
    """Yield keys for containers that are closed, and that nobody was asked for before."""
    found: list[Key] = []
    for container in _find_containers(probed, need_all):
        if container.on in asked:
            continue
        asked.add(container.on)
        span = span_of(container.on, probed.layout, probed.devices)
        with open_disk(span.path) as disk:
            header = disk.read(span.start, container.header_size)
        if luks.find_key(container, header, [*found, *keys]) is None:
            key = ask_for_key(container, header, ask)
            if key is not None:
                found.append(key)
    yield from found


def _find_containers(probed: Probed, need_all: bool) -> Iterator[Luks]:
    """Yield the containers that were not opened, and with `need_all` those that were."""
    if find_program("cryptsetup") is None:
        return
    for layer in probed.layout.layers:
        if isinstance(layer, Luks) and need_all:
            yield layer
        elif isinstance(layer, Raw) and layer.type in luks.TYPES:
            span = span_of(layer.on, probed.layout, probed.devices)
            with open_disk(span.path) as disk:
                described = luks.probe_groups([Content(layer.on, span, disk.reader(span.start), layer.type)])
            yield from (each.layer for each in described if isinstance(each.layer, Luks))
