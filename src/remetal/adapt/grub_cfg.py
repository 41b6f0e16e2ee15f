"""GRUB's own configuration: the kernel command lines in a grub.cfg, and by what GRUB looks for its files. Pure.

GRUB finds file systems, arrays, logical volumes and LUKS containers by UUID; one that changed is replaced. Names such
as `hd0,gpt2` stay: they count the disks in the firmware's order and the partitions by number, and a restore keeps the
numbers. What was dissolved is told in a note where GRUB would look for it and nothing else.

Source: GRUB manual ("search", "cryptomount", "Device syntax"), util/grub-mkconfig_lib.in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from remetal.adapt.cmdline import plan_cmdline
from remetal.adapt.identity import Gone, Identities, Kind, Named, find_uuid, plan_uuid
from remetal.adapt.text import Edit, TextPlan, plan_edits

GRUB_CFG = "/boot/grub/grub.cfg"

_LINE = re.compile(r"^(?![ \t]*#)(.+)$", re.MULTILINE)
_LINUX = re.compile(r"^[ \t]*linux(?:16|efi)?[ \t]", re.MULTILINE)
_INITRD = re.compile(r"^[ \t]*initrd", re.MULTILINE)
_SEARCH = re.compile(r"[ \t]*search(?:\.fs_uuid[ \t]|[ \t](?:.*[ \t])?(?:--fs-uuid|-u)[ \t])")
_WORD = re.compile(r"[^ \t\"']+")
_DEVICES: tuple[tuple[re.Pattern[str], tuple[tuple[Kind, ...], ...]], ...] = (
    (re.compile(r"\bmduuid/([0-9A-Fa-f:-]+)"), (("md",),)),
    (re.compile(r"\blvmid/([0-9A-Za-z-]+)/([0-9A-Za-z-]+)"), (("vg",), ("lv",))),
    (re.compile(r"\bcryptouuid/([0-9A-Fa-f-]+)"), (("luks",),)),
    (re.compile(r"\bcryptomount[ \t]+(?:-u|--uuid)[ \t=]*\"?'?([0-9A-Fa-f-]+)"), (("luks",),)),
)


@dataclass(frozen=True, slots=True)
class _Uuid:
    """A UUID in the text, from `start` up to `end`, and what it may belong to."""

    text: str
    start: int
    end: int
    kinds: tuple[Kind, ...]


def plan_grub_cfg(text: str, identities: Identities, path: str = GRUB_CFG) -> TextPlan:
    """Check what a grub.cfg looks for and the command lines in it, and return the text that finds it all."""
    edits: list[Edit] = []
    notes: list[str] = []
    bare_kernel = _LINUX.search(text) is not None and _INITRD.search(text) is None
    searches = any(_SEARCH.match(line[1]) for line in _LINE.finditer(text))
    for line in _LINE.finditer(text):
        more, told = plan_cmdline(text, identities, start=line.start(1), end=line.end(1), bare_kernel=bare_kernel)
        edits += more
        notes += told
        for uuid in _uuids(line):
            found = find_uuid(uuid.text, identities, uuid.kinds)
            if isinstance(found, Named):
                new = plan_uuid(uuid.text, found.uuid_now)
                if new != uuid.text and new:
                    edits.append(Edit(uuid.start, uuid.end, new, f"GRUB looks for {new} instead of {uuid.text}"))
            elif isinstance(found, Gone) and (found.kind == "filesystem" or not searches):
                notes.append(f"{path}: GRUB looks for {uuid.text}, but {found.why}. Make that file anew: grub-mkconfig")
    return plan_edits(path, text, edits, notes)


def find_device_uuids(text: str) -> Iterator[tuple[str, tuple[Kind, ...]]]:
    """Yield the UUIDs by which GRUB names arrays, volume groups and containers in a text, with what they are of."""
    for pattern, groups in _DEVICES:
        for match in pattern.finditer(text):
            for number, kinds in enumerate(groups, 1):
                yield match[number], kinds


def _uuids(line: re.Match[str]) -> Iterator[_Uuid]:
    """Yield the UUIDs by which a line names a device or searches for a file system."""
    for pattern, groups in _DEVICES:
        for match in pattern.finditer(line.string, line.start(1), line.end(1)):
            for number, kinds in enumerate(groups, 1):
                yield _Uuid(match[number], *match.span(number), kinds)
    if _SEARCH.match(line[1]):
        for match in _WORD.finditer(line.string, line.start(1), line.end(1)):
            if not match[0].startswith("-"):
                yield _Uuid(match[0], *match.span(), ("filesystem",))
