"""The restored system's mdadm.conf: arrays that are there no more must not be looked for, the others be found. Pure.

An array is known by its UUID, which survives a restore. An array that was dissolved is commented out; one whose UUID
changed gets the new one; what names the members by their device nodes (`devices=`, DEVICE) gives way where the
nodes are others now. Everything else stays byte for byte. Source: mdadm.conf(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from remetal.adapt.identity import Gone, Identities, Named, find_named, find_uuid, is_same_uuid, plan_uuid
from remetal.adapt.names import as_path
from remetal.adapt.text import Edit, TextPlan, line_starts, plan_edits
from remetal.layout.model import MdArray, SpaceId

MDADM_CONF = "/etc/mdadm/mdadm.conf"

_WORD = re.compile(r"(?:[^ \t'\"]|'[^']*(?:'|$)|\"[^\"]*(?:\"|$))+")
_QUOTED = re.compile(r"'([^']*)'?|\"([^\"]*)\"?")
_ALL_DEVICES = "partitions"


@dataclass(frozen=True, slots=True)
class Word:
    """One word without its quotes; it stands from `start` up to `end` of the text."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Line:
    """A keyword with its words, continuation lines included; `starts` is where each of its lines begins."""

    keyword: str
    words: tuple[Word, ...]
    starts: tuple[int, ...]

    def find(self, tag: str) -> Word | None:
        """Return the word `tag=…`, whatever its case, or None."""
        return next((each for each in self.words if each.text.lower().startswith(f"{tag}=")), None)

    def value(self, tag: str) -> str:
        """Return what stands behind `tag=`, or an empty text."""
        word = self.find(tag)
        return word.text.partition("=")[2] if word is not None else ""


def parse_mdadm_conf(text: str) -> list[Line]:
    """Return the logical lines of an mdadm.conf; keywords are cut to their first three letters, in lower case."""
    found: list[tuple[list[Word], list[int]]] = []
    lines = text.split("\n")
    for start, line in zip(line_starts(lines), lines, strict=True):
        words = list(_words(line, start))
        if words and found and line[0] in " \t":
            found[-1][0].extend(words)
            found[-1][1].append(start)
        elif words:
            found.append((words, [start]))
    return [Line(words[0].text[:3].lower(), tuple(words[1:]), tuple(starts)) for words, starts in found]


def plan_mdadm_conf(text: str, identities: Identities, path: str = MDADM_CONF) -> TextPlan:
    """Check every array against what was restored and return the mdadm.conf that finds those that are there."""
    edits: list[Edit] = []
    lines = parse_mdadm_conf(text)
    for line in lines:
        if line.keyword == "arr":
            edits += _plan_array(line, identities, text)
    edits += _plan_devices([line for line in lines if line.keyword == "dev"], identities)
    return plan_edits(path, text, edits)


def find_array_nodes(text: str, arrays: Sequence[MdArray]) -> Iterator[tuple[SpaceId, str]]:
    """Yield the device nodes that an mdadm.conf gives to arrays, each with the array's space."""
    for line in parse_mdadm_conf(text):
        if line.keyword != "arr" or not line.words or "=" in line.words[0].text or line.words[0].text.startswith("<"):
            continue
        node = line.words[0].text
        for array in arrays:
            if _is_meant(line, array):
                yield array.device, node if node.startswith("/") else f"/dev/md/{node}"


def _is_meant(line: Line, array: MdArray) -> bool:
    if uuid := line.value("uuid"):
        return is_same_uuid(uuid, array.uuid)
    if name := line.value("name"):
        return name == array.name
    return array.minor >= 0 and line.value("super-minor") == str(array.minor)


def _words(line: str, start: int) -> Iterator[Word]:
    at = 0
    while at < len(line):
        match = _WORD.match(line, at)
        if match is None:
            at += 1
        elif match[0].startswith("#"):
            return
        else:
            plain = _QUOTED.sub(lambda quoted: quoted[1] or quoted[2] or "", match[0])
            yield Word(plain, start + match.start(), start + match.end())
            at = match.end()


def _plan_array(line: Line, identities: Identities, text: str) -> list[Edit]:
    found = _find_array(line, identities)
    if isinstance(found, Gone) and "<ignore>" not in (word.text for word in line.words):
        what = f"the array {_name(line)} was commented out: {found.why}"
        first, *rest = line.starts
        return [
            Edit(first, first, f"# remetal: {found.why}.\n# ", what),
            *(Edit(start, start, "# ") for start in rest),
        ]
    if not isinstance(found, Named):
        return []
    edits = []
    word, old = line.find("uuid"), line.value("uuid")
    if word is not None and (new := plan_uuid(old, found.uuid_now)) != old:
        edits.append(Edit(word.start, word.end, f"{word.text[:5]}{new}", f"the array {_name(line)} has the UUID {new}"))
    return edits + _plan_members(line, found, identities, text)


def _plan_members(line: Line, array: Named, identities: Identities, text: str) -> list[Edit]:
    """Return what becomes of `devices=`: where it does not name the members any more, the UUID takes its place."""
    word = line.find("devices")
    if word is None or not array.uuid_now:
        return []
    patterns = line.value("devices").split(",")
    members = [each for each in _members(identities) if find_uuid(each.uuid, identities, ("md",)) == array]
    if not _has_lost(members, patterns):
        return []
    if line.find("uuid") is not None:
        start = len(text[: word.start].rstrip(" \t"))
        return [Edit(start, word.end, "", f"the array {_name(line)} is found by its UUID alone, not by {word.text}")]
    uuid = f"UUID={array.uuid_now}"
    return [Edit(word.start, word.end, uuid, f"the array {_name(line)} is found by {uuid} instead of {word.text}")]


def _plan_devices(lines: Sequence[Line], identities: Identities) -> list[Edit]:
    """Return what lets mdadm look at members that the DEVICE lines led to before, and do not now."""
    words = [word for line in lines for word in line.words]
    patterns = [word.text for word in words]
    if not words or _ALL_DEVICES in patterns:
        return []
    if not _has_lost(_members(identities), patterns):
        return []
    what = f"mdadm looks at all partitions, since DEVICE {' '.join(patterns)} does not lead to the restored members"
    return [Edit(words[0].start, words[0].start, f"{_ALL_DEVICES} ", what)]


def _find_array(line: Line, identities: Identities) -> Named | Gone | None:
    """Return the array that a line means: by UUID if it has one, else by name, number, device node or members."""
    if uuid := line.value("uuid"):
        return find_uuid(uuid, identities, ("md",))
    specs = [f"LABEL={name}"] if (name := line.value("name")) else []
    if (number := line.value("super-minor")).isdigit():
        specs.append(f"/dev/md{number}")
    if line.words and "=" not in line.words[0].text:
        node = line.words[0].text
        specs.append(node if node.startswith("/") else f"/dev/md/{node}")
    for spec in specs:
        if (found := find_named(spec, identities, ("md",))) is not None:
            return found
    patterns = [each for each in line.value("devices").split(",") if each]
    for member in identities.everything:
        if member.kind == "member" and any(_matches(name, patterns) for name in member.names):
            return find_uuid(member.uuid, identities, ("md",))
    return None


def _name(line: Line) -> str:
    word = next((each.text for each in line.words if "=" not in each.text), "")
    return word or line.value("name") or line.value("uuid") or line.value("devices")


def _members(identities: Identities) -> list[Named]:
    return [each for each in identities.volumes if each.kind == "member"]


def _has_lost(members: Sequence[Named], patterns: Sequence[str]) -> bool:
    """Whether device patterns led to a member before, or may have, and do not now."""
    led = (each for each in members if any(_matches(name, patterns) for name in each.names) or not each.names)
    return any(not _is_covered(each, patterns) for each in led)


def _is_covered(member: Named, patterns: Sequence[str]) -> bool:
    """Whether device patterns lead to a member where it stands now."""
    if member.place is None and not member.moved:
        return True
    nodes = [*(as_path(each) for each in member.lasting), *(member.place.devices if member.place is not None else ())]
    return any(_matches(each, patterns) for each in nodes)


def _matches(node: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(node, pattern) for pattern in patterns)
