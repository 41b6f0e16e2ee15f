"""The restored system's lvm.conf: its filters must let the physical volumes through where they stand now. Pure.

A filter is a list of patterns for device names; on other hardware the same volume has other names, and LVM would
not see it. Only where a filter that let a volume through before hides it now, entries are put in front that accept
it: by the link that udev makes of its UUID, and by the kernel's name if that is known. Source: lvm.conf(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from remetal.adapt.identity import Identities, Named
from remetal.adapt.lvm_filter import PatternError, Rule, accepts, format_accept, parse_rules
from remetal.adapt.names import as_path
from remetal.adapt.text import Edit, TextPlan, plan_edits
from remetal.ondisk.lvm_config import Entry, find_entry, parse_config, replace_entry
from remetal.ondisk.regions import BadStructureError

LVM_CONF = "/etc/lvm/lvm.conf"

_FILTERS = ("filter", "global_filter")
_LIST = r"\b{}[\"']?\s*=\s*\["
_SINGLE = r"\b{}[\"']?\s*=\s*(\"(?:[^\"\\]|\\.)*\"|'[^']*')"
_PLACES_MAX = 8
_ANY_DISK = ("/dev/sda1", "/dev/vda1", "/dev/nvme0n1p1")
"""What a volume's node may be on hardware of which nothing is known."""


def plan_lvm_conf(text: str, identities: Identities, path: str = LVM_CONF) -> TextPlan:
    """Check the filters of an lvm.conf or lvmlocal.conf and return the text with which all volumes are seen.

    A text that LVM itself would not read is left as it is.
    """
    edits: list[Edit] = []
    notes: list[str] = []
    for name in _FILTERS:
        try:
            entries = _strings(find_entry(parse_config(text), "devices", name))
            rules = parse_rules(entries)
        except (BadStructureError, PatternError):
            continue
        hidden = [each for each in identities.volumes if each.kind == "pv" and _is_hidden(each, rules)]
        if not hidden:
            continue
        added = tuple(format_accept(node) for each in hidden for node in _accepted_nodes(each))
        volumes = ", ".join(each.uuid_now for each in hidden)
        edit = _find_edit(text, name, added, entries)
        if edit is None:
            notes.append(f"lvm.conf: devices/{name} hides the volume {volumes}; put {', '.join(added)} in front of it")
        else:
            what = f"devices/{name} lets the physical volume {volumes} through, which has another device name now"
            edits.append(Edit(edit.start, edit.end, edit.text, what))
    return plan_edits(path, text, edits, notes)


def _strings(entry: Entry | None) -> tuple[str, ...]:
    """Return a filter's entries. Raises PatternError if it is anything but texts."""
    values = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    texts = tuple(each for each in values if isinstance(each, str))
    if len(texts) != len(values):
        raise PatternError
    return texts


def _is_hidden(volume: Named, rules: tuple[Rule, ...]) -> bool:
    """Whether a filter hides a volume now that it let through where it was captured."""
    before = [*_links(volume.uuid), *volume.names]
    if volume.names and not accepts(rules, before):
        return False
    return any(not accepts(rules, nodes) for nodes in _nodes_now(volume))


def _nodes_now(volume: Named) -> list[list[str]]:
    """Return the nodes of a volume where it stands now; several lists where nobody knows which hardware it will be."""
    lasting = [as_path(each) for each in volume.lasting]
    known = [*_links(volume.uuid_now), *lasting]
    if volume.place is not None:
        return [[*known, *volume.place.devices]]
    if not volume.moved:
        return [[*known, *volume.names]]
    if any(each == path for each, path in zip(volume.lasting, lasting, strict=True)):
        return [known]
    return [[*known, disk] for disk in _ANY_DISK]


def _accepted_nodes(volume: Named) -> list[str]:
    kernel = volume.place.devices[:1] if volume.place is not None else ()
    return [*_links(volume.uuid_now), *kernel]


def _links(uuid: str) -> list[str]:
    return [f"/dev/disk/by-id/lvm-pv-uuid-{uuid}"] if uuid else []


def _find_edit(text: str, name: str, added: tuple[str, ...], entries: tuple[str, ...]) -> Edit | None:
    """Return the edit that puts entries in front of a filter and changes nothing else of what the text says."""
    wanted = replace_entry(parse_config(text), ("devices", name), added + entries)
    for edit in islice(_places(text, name, added), _PLACES_MAX):
        try:
            if parse_config(text[: edit.start] + edit.text + text[edit.end :]) == wanted:
                return edit
        except BadStructureError:
            continue
    return None


def _places(text: str, name: str, added: tuple[str, ...]) -> Iterator[Edit]:
    """Yield the edits that may do it, one for each place outside a comment where the filter's name stands.

    The last one comes first, since it is the one that counts.
    """
    words = ", ".join(f'"{each}"' for each in added)
    for match in reversed(list(re.finditer(_LIST.format(name), text))):
        if not _is_comment(text, match.start()):
            yield Edit(match.end(), match.end(), f" {words},")
    for match in reversed(list(re.finditer(_SINGLE.format(name), text, re.DOTALL))):
        if not _is_comment(text, match.start()):
            yield Edit(match.start(1), match.end(1), f"[ {words}, {match[1]} ]")


def _is_comment(text: str, at: int) -> bool:
    return "#" in text[text.rfind("\n", 0, at) + 1 : at]
