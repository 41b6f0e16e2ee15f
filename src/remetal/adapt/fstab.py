"""The restored system's fstab: every entry that names a restored volume must find it again. Pure.

Entries by UUID, label or partition GUID hold, since those survive a restore, and so do the names of arrays, logical
volumes and opened containers. Kernel names (`/dev/sda2`) and names made of the old hardware (`/dev/disk/by-id/…`,
`by-path/…`) may mean another disk tomorrow: they become `UUID=`. Everything else stays byte for byte.

Source: fstab(5), getmntent(3), udev's persistent-storage rules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from remetal.adapt.evidence import parse_node
from remetal.adapt.identity import CONTENT, Gone, Identities, Kind, Named, find_named, plan_name
from remetal.adapt.names import is_hardware_name, parse_tag, unescape
from remetal.adapt.text import TextPlan, diff_texts
from remetal.layout.model import FileSystem, Layer, Layout, Raw, Swap

FSTAB = "/etc/fstab"

_LINE = re.compile(r"([ \t]*)([^ \t\n#][^ \t\n]*)([ \t]+)([^ \t\n]+)(?:[ \t]+([^ \t\n]+))?(?:[ \t]+([^ \t\n]+))?.*")
_OPAQUE = {"LVM2_member", "crypto_LUKS", "linux_raid_member", "btrfs", "bcache", "zfs_member", "drbd", "VDO"}
_ANY_KIND = {"auto", "none", ""}
_EXT = {"ext2", "ext3", "ext4"}
_PLAIN: tuple[Kind, ...] = ("partition", "lv", "md", "disk")
"""What may hold a file system that nothing tells of: content that was carried whole."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One mount of an fstab, unescaped; `line` counts from 0."""

    line: int
    spec: str
    target: str
    kind: str
    options: tuple[str, ...]

    @property
    def subvolume(self) -> str:
        """The path of the btrfs subvolume that is mounted, without slashes at its ends; empty: the default one."""
        paths = [option.removeprefix("subvol=") for option in self.options if option.startswith("subvol=")]
        return paths[-1].strip("/") if paths else ""


def parse_fstab(text: str) -> list[Entry]:
    """Return the entries of an fstab; comments and lines with fewer than two fields are passed over."""
    entries = []
    for number, line in enumerate(text.split("\n")):
        match = _LINE.fullmatch(line)
        if match:
            _, spec, _, target, kind, options = match.groups()
            entries.append(
                Entry(number, unescape(spec), unescape(target), kind or "", tuple(unescape(options or "").split(",")))
            )
    return entries


def find_root(entries: list[Entry]) -> Entry | None:
    """Return the entry for `/`, or None."""
    return next((entry for entry in entries if entry.target == "/"), None)


def find_volume(entry: Entry, source: Layout, identities: Identities) -> Named | Gone | None:
    """Return what an entry means among what was captured, or None.

    A name made of hardware is believed where the entry's type fits what was captured there. An ambiguous label finds
    its first volume, as it does when the system boots.
    """
    found = find_named(entry.spec, identities, CONTENT)
    tagged = parse_tag(entry.spec) is not None
    if found is None and (tagged or entry.kind in _ANY_KIND):
        plain = find_named(entry.spec, identities, _PLAIN)
        found = plain if tagged or (plain is not None and isinstance(source.layer_on(plain.space), Raw)) else None
    if found is None or not is_hardware_name(entry.spec):
        return found
    return found if _kind_fits(entry.kind, source.layer_on(found.space)) else None


def plan_fstab(text: str, *, source: Layout, result: Layout, identities: Identities) -> TextPlan:
    """Check every entry against what was restored and return the fstab that finds its volumes there.

    `source` is the layout as captured, `result` as it stands. Nothing is raised: what cannot be decided is a note.
    """
    lines = text.split("\n")
    changes: list[str] = []
    notes: list[str] = []
    for entry in parse_fstab(text):
        if not _is_device(entry.spec):
            continue
        found = find_volume(entry, source, identities)
        name = plan_name(entry.spec, found) if isinstance(found, Named) else None
        if name is None and not _is_optional(entry):
            notes += _notes(entry, result, found)
        if name is None or name == entry.spec:
            continue
        match = _LINE.fullmatch(lines[entry.line])
        assert match is not None
        lines[entry.line] = lines[entry.line][: match.start(2)] + name + lines[entry.line][match.end(2) :]
        changes.append(f"{entry.target} is mounted from {name} instead of {entry.spec}")
    new = "\n".join(lines)
    return TextPlan(FSTAB, new, tuple(changes), tuple(notes), diff_texts(FSTAB, text, new))


def _kind_fits(kind: str, layer: Layer | None) -> bool:
    if isinstance(layer, Swap):
        return kind in {"swap", *_ANY_KIND}
    if isinstance(layer, (FileSystem, Raw)):
        family = _EXT if layer.type in _EXT else {layer.type}
        return kind in _ANY_KIND or bool(family & set(kind.split(",")))
    return False


def _is_device(spec: str) -> bool:
    return spec.startswith("/dev/") or parse_tag(spec) is not None


def _is_optional(entry: Entry) -> bool:
    return bool({"nofail", "noauto"} & set(entry.options)) or (entry.target == "none" and entry.kind != "swap")


def _notes(entry: Entry, result: Layout, found: Named | Gone | None) -> list[str]:
    """Return what is to be said of an entry that finds nothing."""
    if isinstance(found, Gone):
        left = "its line was left as it was. Remove it, or add the option nofail to it: the system waits for it"
        return [f"fstab: {entry.spec} ({entry.target}): {found.why}; {left}"]
    if parse_tag(entry.spec) is not None:
        return [_missing_note(entry, result)]
    is_disk = is_hardware_name(entry.spec) and parse_node(entry.spec) is not None
    return [_unknown_note(entry)] if is_disk else []


def _missing_note(entry: Entry, result: Layout) -> str:
    opaque = sorted({each.type for each in result.volumes() if isinstance(each, Raw) and each.type in _OPAQUE})
    if opaque:
        return (
            f"fstab: {entry.spec} ({entry.target}) is on none of the restored file systems; "
            f"it may lie inside a volume that was carried whole ({', '.join(opaque)})"
        )
    return (
        f"fstab: {entry.spec} ({entry.target}) is not among what was restored; the system waits for it when it "
        f"boots. Attach that disk, or add the option nofail to its line"
    )


def _unknown_note(entry: Entry) -> str:
    return (
        f"fstab: {entry.spec} ({entry.target}) names no disk that was restored, or one of another type; it was "
        f"left as it is. If that disk is not in this machine, add the option nofail to its line"
    )
