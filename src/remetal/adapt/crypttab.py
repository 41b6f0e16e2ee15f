"""The restored system's crypttab: every encrypted device must be found again, and no other one taken for it. Pure.

Sources by UUID or PARTUUID hold. Kernel names and names made of the old hardware become the container's UUID, or the
partition's where there is no container: a swap device that gets a new key at every boot is overwritten with it, so
its name must not mean another disk tomorrow. Mapping names, key files and options stay byte for byte.

Sources: crypttab(5) of systemd, crypttab(5) of Debian's cryptsetup.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from remetal.adapt.identity import BARE, Gone, Identities, Kind, Named, find_named, plan_name
from remetal.adapt.names import is_hardware_name, parse_tag, unescape
from remetal.adapt.text import Edit, TextPlan, line_starts, plan_edits
from remetal.layout.model import SpaceId

CRYPTTAB = "/etc/crypttab"

_LINE = re.compile(r"[ \t]*([^ \t\n#][^ \t\n]*)[ \t]+([^ \t\n]+)(?:[ \t]+([^ \t\n]+))?(?:[ \t]+([^ \t\n]+))?.*")
_FOREIGN: tuple[Kind, ...] = ("filesystem", "swap", "pv", "member")
_PRECIOUS: tuple[Kind, ...] = ("filesystem", "luks", "pv", "member")
_OVERWRITTEN = {"swap", "tmp"}
_OPTIONAL = {"nofail", "noauto"}


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of a crypttab, unescaped; the source stands from `start` up to `end` of the text."""

    name: str
    source: str
    options: tuple[str, ...]
    start: int
    end: int

    @property
    def is_overwritten(self) -> bool:
        """Whether it gets a new key, and new content, at every boot."""
        return any(option.partition("=")[0] in _OVERWRITTEN for option in self.options)

    @property
    def is_optional(self) -> bool:
        """Whether the system boots without it."""
        return bool(_OPTIONAL & set(self.options))


def parse_crypttab(text: str) -> list[Mapping]:
    """Return the mappings of a crypttab; comments and lines with fewer than two fields are passed over."""
    mappings = []
    lines = text.split("\n")
    for start, line in zip(line_starts(lines), lines, strict=True):
        match = _LINE.fullmatch(line)
        if match:
            options = tuple((match[4] or "").split(","))
            place = (start + match.start(2), start + match.end(2))
            mappings.append(Mapping(unescape(match[1]), unescape(match[2]), options, *place))
    return mappings


def find_containers(text: str, identities: Identities) -> list[tuple[str, SpaceId]]:
    """Return the mapping names of a crypttab with the spaces that their LUKS containers stand on."""
    found = [(each.name, find_named(each.source, identities, ("luks",))) for each in parse_crypttab(text)]
    return [(name, container.space) for name, container in found if container is not None]


def plan_crypttab(text: str, identities: Identities, path: str = CRYPTTAB) -> TextPlan:
    """Check every source against what was restored and return the crypttab that finds its devices there.

    Nothing is raised: what cannot be decided is a note.
    """
    edits: list[Edit] = []
    notes: list[str] = []
    for each in parse_crypttab(text):
        found = _find_source(each, identities)
        name = plan_name(each.source, found) if isinstance(found, Named) else None
        if name is not None and name != each.source:
            edits.append(Edit(each.start, each.end, name, f"{each.name} is opened on {name} instead of {each.source}"))
        elif isinstance(found, Gone):
            notes.append(
                f"crypttab: {each.name} ({each.source}): {found.why}; its line was left as it is. Remove it, or add "
                f"the option nofail to it: the system may wait for the device when it boots"
            )
        elif name is None and (note := _unknown_note(each)):
            notes.append(note)
    return plan_edits(path, text, edits, notes)


def _find_source(each: Mapping, identities: Identities) -> Named | Gone | None:
    """Return what a source means, if that fits what the line does with it.

    A name of hardware is not believed where other content was captured from there: what has a file system on it was
    not overwritten at every boot, so on the day of the capture the name meant another device.
    """
    found = None if each.is_overwritten else find_named(each.source, identities, ("luks",))
    if found is None and is_hardware_name(each.source):
        content = find_named(each.source, identities, _PRECIOUS if each.is_overwritten else _FOREIGN)
        return None if isinstance(content, Named) else find_named(each.source, identities, BARE)
    # A small file system in front of a swap area gives it a UUID or a label to be named by.
    return found or find_named(each.source, identities, (*BARE, "filesystem"))


def _unknown_note(each: Mapping) -> str:
    """Return what is to be said of a source that nobody knows, or an empty text."""
    if is_hardware_name(each.source):
        if each.is_overwritten:
            return (
                f"crypttab: {each.name} overwrites {each.source} at every boot, and that name means no device that was "
                f"restored. Before the system boots, put the device's PARTUUID there, or remove the line: whatever is "
                f"called {each.source} then loses its content"
            )
        known = "names no device that was restored, or one without a container"
    else:
        tag = parse_tag(each.source)
        if tag is None or tag[0] not in {"uuid", "partuuid"}:
            return ""
        known = "is not among what was restored"
    if each.is_optional:
        return ""
    return (
        f"crypttab: {each.name} ({each.source}) {known}; the system waits for it when it boots. Attach that disk, or "
        f"add the option nofail to its line"
    )
