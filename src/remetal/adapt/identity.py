"""Who is who: by which names the captured system knew its storage, and by which the restored one finds it. Pure.

Every planner of a configuration file asks here what a name that stands in the file means now. A name that still
finds the same thing stays; a UUID that changed is replaced in the form in which it was written; a name made of
hardware becomes a lasting one; what was dropped or dissolved is told as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from remetal.adapt.names import parse_tag
from remetal.layout.model import SpaceId

Kind: TypeAlias = Literal["disk", "partition", "member", "md", "pv", "vg", "lv", "luks", "filesystem", "swap"]

CONTENT: tuple[Kind, ...] = ("filesystem", "swap")
"""What is mounted, swapped to, or resumed from."""
BARE: tuple[Kind, ...] = ("partition", "lv", "md", "disk")
"""What may carry data without any signature: plain dm-crypt, a detached LUKS header."""

_CASE_COUNTS: frozenset[Kind] = frozenset({"pv", "vg", "lv"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where something stands on the machine that the restored system will run on, as its programs will see it."""

    devices: tuple[str, ...]
    """Its device nodes: the kernel's name first (`/dev/nvme0n1p3`), then links that udev makes of the hardware."""
    wwid: str = ""
    """The disk's `wwid` as sysfs shows it (`naa.5000c500a1b2c3d4`), without blanks at its ends; or empty."""
    serial: str = ""
    """The disk's `device/serial` as sysfs shows it, without blanks at its ends; or empty."""
    part: int = 0
    """The partition's number on that disk; 0: the whole disk, or no disk at all (an array, a logical volume)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """Something on the captured disks that is on the restored ones too, with its old and its new names.

    One space may have several: `sda:2` is a partition, and what stands on it is a LUKS container. A device node
    belongs to all of them: `/dev/sda2` names the partition and the container.
    """

    space: SpaceId
    """The space that it stood on when it was captured; for an array, a group or a volume the space that it was."""
    kind: Kind
    """What it is. `member` is a member of an MD array, `pv` an LVM physical volume, `vg` its group."""
    uuid: str = ""
    """Its UUID when it was captured, as its own tool prints it: blkid, mdadm (any punctuation), pvs, vgs, lvs,
    cryptsetup. A `member` has its array's. Empty if it has none."""
    new_uuid: str | None = None
    """Its UUID now; None: the same. Empty: it has none any more."""
    label: str = ""
    """Its label; for an array the name in its superblock (`host:0`). Labels survive a restore."""
    partuuid: str = ""
    """The PARTUUID of the partition that it stood on, as udev writes it (lower case; `deadbeef-02` for MBR)."""
    new_partuuid: str | None = None
    """The PARTUUID of the partition that it stands on now; None: the same. Empty: it stands on no partition."""
    partlabel: str = ""
    """The name of the partition that it stood on, in a GPT."""
    names: tuple[str, ...] = ()
    """Device nodes by which the captured system knew it, as far as there is evidence: kernel names (`/dev/sda2`),
    links made of hardware (`/dev/disk/by-id/…-part2`, `by-path`), `/dev/mapper/vg0-root`, `/dev/vg0/root`,
    `/dev/md0`, `/dev/md/name`. A kernel name on the day of the capture is none if another system ran then."""
    lasting: tuple[str, ...] = ()
    """Names that find it on the restored disks whatever the hardware, the best one first: `UUID=…`,
    `PARTUUID=…`, `/dev/mapper/vg0-root`, `/dev/vg0/root`, `/dev/md/name`."""
    place: Place | None = None
    """Where it stands now; None if nobody knows yet, as with disk files that are put into some machine later."""
    moved: bool = False
    """Whether it stands on other hardware than it was captured from (True too if nobody knows)."""
    now: SpaceId | None = None
    """The space that it stands on now; None: the same."""

    @property
    def space_now(self) -> SpaceId:
        """The space of the restored disks that it stands on."""
        return self.space if self.now is None else self.now

    @property
    def uuid_now(self) -> str:
        """Its UUID on the restored disks."""
        return self.uuid if self.new_uuid is None else self.new_uuid

    @property
    def partuuid_now(self) -> str:
        """The PARTUUID of what it stands on now."""
        return self.partuuid if self.new_partuuid is None else self.new_partuuid


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """Something that was captured and is on the restored disks no more: dropped, or dissolved into what it held."""

    space: SpaceId
    """As for Named: for a LUKS container the space that it stood on, for an array the space that it was."""
    kind: Kind
    why: str
    """What became of it, as the end of a sentence: `the array was dissolved; its content stands on sda:2`."""
    uuid: str = ""
    label: str = ""
    partuuid: str = ""
    partlabel: str = ""
    names: tuple[str, ...] = ()
    """As for Named. What stood on it is a Named of its own, with the same device nodes among its names."""


@dataclass(frozen=True, slots=True)
class Identities:
    """All that configuration files may name. Where a name means several of one kind, the first one counts."""

    volumes: tuple[Named, ...] = ()
    gone: tuple[Gone, ...] = ()

    @property
    def everything(self) -> tuple[Named | Gone, ...]:
        """What is there and what is gone, in this order."""
        return (*self.volumes, *self.gone)


NOTHING = Identities()


def find_named(spec: str, identities: Identities, kinds: Sequence[Kind]) -> Named | Gone | None:
    """Return what a name of a configuration file means: a device node, `UUID=…` or a link for it, and so on.

    `kinds` are those that can stand in that place, the likeliest first. None for a name that nobody knows.
    """
    for kind in kinds:
        for each in identities.everything:
            if each.kind == kind and _is_meant(spec, each):
                return each
    return None


def find_uuid(uuid: str, identities: Identities, kinds: Sequence[Kind]) -> Named | Gone | None:
    """Return what a bare UUID means, whatever punctuation it is written with."""
    for each in identities.everything:
        if each.kind in kinds and _is_uuid(uuid, each):
            return each
    return None


def plan_name(spec: str, named: Named) -> str | None:
    """Return how a name that means `named` has to be written now: the same one where it holds.

    None if nothing lasting finds it.
    """
    tag = parse_tag(spec)
    if tag is None:
        if spec in named.lasting:
            return spec
    elif tag[0] in {"label", "partlabel"}:
        return spec
    else:
        new = named.uuid_now if tag[0] == "uuid" else named.partuuid_now
        at = spec.rfind(tag[1])
        if new and at >= 0:
            return spec[:at] + plan_uuid(tag[1], new) + spec[at + len(tag[1]) :]
    return next(iter(named.lasting), None)


def plan_uuid(written: str, new: str) -> str:
    """Return a new UUID in the punctuation in which the old one was written; the old text if it is the same one."""
    old, fresh = _letters(written), _letters(new)
    if old.lower() == fresh.lower():
        return written
    if len(old) != len(fresh):
        return new
    letters = iter(fresh)
    return "".join(next(letters) if each.isalnum() else each for each in written)


def is_same_uuid(written: str, other: str) -> bool:
    """Whether two UUIDs are one, whatever their case and punctuation; LVM's, where case counts, are not asked here."""
    return bool(_letters(written)) and _letters(written).lower() == _letters(other).lower()


def name_mappings(identities: Identities, mappings: Iterable[tuple[str, SpaceId]]) -> Identities:
    """Return the identities with the names that opened LUKS containers get: pairs of mapping and container's space.

    Only crypttab and the kernel command line tell them. They last where the container does.
    """
    given: dict[SpaceId, tuple[str, ...]] = {}
    for name, space in mappings:
        given[space] = (*given.get(space, ()), f"/dev/mapper/{name}")
    if not given:
        return identities
    dissolved = {each.space for each in identities.gone if each.kind == "luks"}

    def paths_of(each: Named | Gone) -> tuple[str, ...]:
        container = each.space.removesuffix(":luks")
        return given.get(container, ()) if container != each.space else ()

    def with_names(each: Named) -> Named:
        paths = paths_of(each)
        lasting = () if each.space.removesuffix(":luks") in dissolved else paths
        return replace(each, names=each.names + paths, lasting=each.lasting + lasting) if paths else each

    return Identities(
        tuple(with_names(each) for each in identities.volumes),
        tuple(replace(each, names=each.names + paths_of(each)) for each in identities.gone),
    )


def _is_meant(spec: str, each: Named | Gone) -> bool:
    tag = parse_tag(spec)
    if tag is None:
        return spec in each.names or (isinstance(each, Named) and spec in each.lasting)
    kind, value = tag
    if kind == "uuid":
        return _is_uuid(value, each)
    if kind == "partuuid":
        known = {each.partuuid, each.partuuid_now} if isinstance(each, Named) else {each.partuuid}
        return bool(value) and value.lower() in {one.lower() for one in known}
    return value != "" and value == (each.label if kind == "label" else each.partlabel)


def _is_uuid(written: str, each: Named | Gone) -> bool:
    known = {each.uuid, each.uuid_now} if isinstance(each, Named) else {each.uuid}
    return _fold(written, each.kind) != "" and _fold(written, each.kind) in {_fold(one, each.kind) for one in known}


def _fold(uuid: str, kind: Kind) -> str:
    letters = _letters(uuid)
    return letters if kind in _CASE_COUNTS else letters.lower()


def _letters(uuid: str) -> str:
    return "".join(each for each in uuid if each.isalnum())
