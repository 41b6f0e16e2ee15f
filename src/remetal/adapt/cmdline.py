"""The kernel command line: what it says of root, resume device, LUKS, MD and LVM, wherever it is written down. Pure.

Names made of hardware become lasting ones, UUIDs that changed are replaced in the form in which they were written. A
parameter for what was dissolved or dropped is taken out where the initramfs would wait for it in vain; for `root=`
that cannot help, so there it is a note. Every other character stays.

Sources: dracut.cmdline(7), initramfs-tools(7), systemd-cryptsetup-generator(8), systemd-fstab-generator(8), Arch's
mkinitcpio hooks encrypt and lvm2, Linux Documentation/admin-guide/kernel-parameters.txt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from remetal.adapt.identity import (
    BARE,
    CONTENT,
    Gone,
    Identities,
    Kind,
    Named,
    find_named,
    find_uuid,
    name_mappings,
    plan_name,
    plan_uuid,
)
from remetal.adapt.names import is_hardware_name, parse_tag
from remetal.adapt.text import Edit
from remetal.layout.model import SpaceId

_PARAMETER = re.compile(r"(?<![^\s\"'])([A-Za-z_][A-Za-z0-9_.-]*)=([^\s\"'\\]+)")
_RESUME: tuple[Kind, ...] = ("swap", "filesystem")
_DEVICES: Mapping[str, tuple[Kind, ...]] = {
    "root": CONTENT,
    "rootfallback": CONTENT,
    "real_root": CONTENT,
    "mount.usr": CONTENT,
    "boot": CONTENT,
    "resume": _RESUME,
    "real_resume": _RESUME,
    "crypt_root": ("luks", *BARE),
}
_ROOTS = {"root", "real_root", "rootfallback", "mount.usr", "boot", "crypt_root"}
_WITH_COLONS: Mapping[str, tuple[Kind, ...]] = {"cryptdevice": ("luks", *BARE), "cryptkey": (*CONTENT, *BARE)}
_LUKS_UUIDS = {"rd.luks.uuid", "luks.uuid", "rd_LUKS_UUID", "rd.luks.allow-discards"}
_LUKS_LED = {"rd.luks.name", "luks.name", "rd.luks.options", "luks.options", "rd.luks.key", "luks.key"}
_MD_UUIDS = {"rd.md.uuid", "rd_MD_UUID"}
_LOGICAL = {"rd.lvm.lv", "rd_LVM_LV"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """`name=value` on a command line; the value stands from `start` up to `end` of the text."""

    name: str
    value: str
    start: int
    end: int

    @property
    def text(self) -> str:
        """The parameter as it is written."""
        return f"{self.name}={self.value}"


@dataclass(frozen=True, slots=True)
class Renamed:
    """What becomes of a part of a value: the name that stands in it, what that means, and how it is called now."""

    spec: str
    found: Named | Gone | None
    name: str | None


def parse_cmdline(text: str, start: int = 0, end: int | None = None) -> Iterator[Parameter]:
    """Yield the parameters with a value in a part of a text, which begins and ends at the edge of a word."""
    stop = len(text) if end is None else end
    for match in _PARAMETER.finditer(text[start:stop]):
        yield Parameter(match[1], match[2], start + match.start(2), start + match.end(2))


def find_opened(parameters: Iterator[Parameter], identities: Identities) -> list[tuple[str, SpaceId]]:
    """Return the mapping names that a command line gives, with the spaces that their LUKS containers stand on."""
    found = []
    for each in parameters:
        name = ""
        container = None
        if each.name in {"rd.luks.name", "luks.name"}:
            uuid, _, name = each.value.partition("=")
            container = find_uuid(uuid, identities, ("luks",))
        elif each.name == "cryptdevice":
            spec = _split_device(each.value, identities, ("luks",))
            container = find_named(spec, identities, ("luks",))
            name = each.value[len(spec) + 1 :].partition(":")[0]
        if container is not None and name:
            found.append((name, container.space))
    return found


def plan_cmdline(
    text: str, identities: Identities, *, start: int = 0, end: int | None = None, bare_kernel: bool = False
) -> tuple[list[Edit], list[str]]:
    """Return the edits and notes for the command line that stands from `start` up to `end` of a text.

    `bare_kernel` says that there is no initramfs: the kernel alone knows `root=PARTUUID=`, but no `root=UUID=`.
    """
    edits: list[Edit] = []
    notes: list[str] = []
    identities = name_mappings(identities, find_opened(parse_cmdline(text, start, end), identities))
    for each in parse_cmdline(text, start, end):
        done = _plan_parameter(each, identities, bare_kernel=bare_kernel)
        if done is None:
            continue
        at = each.start + each.value.index(done.spec)
        if isinstance(done.found, Gone):
            if each.name in _ROOTS:
                notes.append(f"kernel command line: {each.text}: {done.found.why}; it was left as it is")
            else:
                edits.append(_take_out(each, done.found, text, start))
        elif done.name is not None and done.name != done.spec:
            new = replace(each, value=each.value.replace(done.spec, done.name, 1))
            edits.append(Edit(at, at + len(done.spec), done.name, f"{new.text} replaces {each.text}"))
        elif done.name is None and (note := _unknown_note(each, done.spec)):
            notes.append(note)
    return edits, notes


def _plan_parameter(each: Parameter, identities: Identities, *, bare_kernel: bool) -> Renamed | None:
    """Return what becomes of a parameter, or None for one that names no storage."""
    value = each.value
    if each.name in _DEVICES:
        done = _renamed(value, find_named(value, identities, _DEVICES[each.name]))
        return _for_bare_kernel(done) if bare_kernel and each.name == "root" else done
    if each.name in _WITH_COLONS:
        kinds = _WITH_COLONS[each.name]
        spec = _split_device(value, identities, kinds)
        return _renamed(spec, find_named(spec, identities, kinds))
    if each.name in _LUKS_UUIDS:
        return _renamed_uuid(value.removeprefix("luks-"), identities, "luks")
    if each.name in _LUKS_LED:
        uuid, equals, _ = value.partition("=")
        return _renamed_uuid(uuid, identities, "luks") if equals and uuid else None
    if each.name in _MD_UUIDS:
        return _renamed_uuid(value, identities, "md")
    if each.name in _LOGICAL:
        return _renamed_volume(value, identities)
    return None


def _renamed(spec: str, found: Named | Gone | None) -> Renamed:
    return Renamed(spec, found, plan_name(spec, found) if isinstance(found, Named) else None)


def _for_bare_kernel(done: Renamed) -> Renamed:
    """Return what becomes of a `root=` that no initramfs reads: no new UUID= where there was none."""
    if not isinstance(done.found, Named) or done.name in {None, done.spec} or parse_tag(done.spec) is not None:
        return done
    partuuid = done.found.partuuid_now
    return replace(done, name=f"PARTUUID={partuuid}" if partuuid else None)


def _renamed_uuid(uuid: str, identities: Identities, kind: Kind) -> Renamed | None:
    found = find_uuid(uuid, identities, (kind,))
    if found is None:
        return None
    return Renamed(uuid, found, plan_uuid(uuid, found.uuid_now) if isinstance(found, Named) else None)


def _renamed_volume(value: str, identities: Identities) -> Renamed | None:
    """Return what becomes of `GROUP/VOLUME`, which is a device node without its /dev/."""
    node = f"/dev/{value}"
    found = find_named(node, identities, ("lv",))
    if not isinstance(found, Named):
        return Renamed(value, found, None) if found is not None else None
    nodes = [each for each in found.lasting if each.count("/") == 3 and not each.startswith("/dev/mapper/")]
    name = node if node in nodes else next(iter(nodes), None)
    return Renamed(value, found, name.removeprefix("/dev/")) if name is not None else None


def _split_device(value: str, identities: Identities, kinds: tuple[Kind, ...]) -> str:
    """Return the device that a value with colons begins with; the name of a slot may hold colons itself."""
    ends = [at for at, character in enumerate(value) if character == ":"] or [len(value)]
    for end in ends[:16]:
        if find_named(value[:end], identities, kinds) is not None:
            return value[:end]
    return value[: ends[0]]


def _take_out(each: Parameter, gone: Gone, text: str, start: int) -> Edit:
    """Return the edit that removes a parameter with one of the blanks beside it."""
    first, last = each.start - len(each.name) - 1, each.end
    if first > start and text[first - 1] in " \t":
        first -= 1
    elif text[last : last + 1] in {" ", "\t"}:
        last += 1
    return Edit(first, last, "", f"{each.text} was taken out: {gone.why}")


def _unknown_note(each: Parameter, spec: str) -> str:
    if each.name in _DEVICES and is_hardware_name(spec):
        return (
            f"kernel command line: {each.text} names no device that was restored, or one of another kind; it was left "
            f"as it is"
        )
    tag = parse_tag(spec)
    if each.name == "root" and tag is not None and tag[0] in {"uuid", "partuuid"} and "/" not in tag[1]:
        return f"kernel command line: {each.text} is not among what was restored; the system does not boot without it"
    return ""
