"""Making out who is who: the named things of the captured layout, each with its names then and now.

`plan_identities` is pure: layouts, device nodes and places in, `Identities` out. `probe_known` and `probe_identities`
read what it needs, from the restored disks and from the files of an installed system.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from remetal.adapt.crypttab import CRYPTTAB, find_containers
from remetal.adapt.evidence import Nodes, find_nodes, partition_node
from remetal.adapt.identity import Gone, Identities, Kind, Named, Place, name_mappings
from remetal.adapt.places import probe_place
from remetal.adapt.restored import Restored
from remetal.adapt.rooted import list_inside, read_inside
from remetal.layout.model import (
    Disk,
    FileSystem,
    GptTable,
    Layer,
    Layout,
    Luks,
    MbrTable,
    MdArray,
    Partition,
    Raw,
    SpaceId,
    Swap,
    VolumeGroup,
    is_extended,
    spaces_of,
)
from remetal.layout.signatures import Signature, probe_signature

_KINDS: Mapping[str, tuple[Kind, ...]] = {
    "crypto_LUKS": ("luks",),
    "LVM2_member": ("pv",),
    "linux_raid_member": ("member", "md"),
    "swap": ("swap",),
    "swsuspend": ("swap",),
}
"""What content that was carried whole is, by blkid's name of its type; anything else with a UUID is a file system."""
_TEXTS = ("/etc/crypttab", "/etc/default/grub", "/etc/kernel/cmdline", "/etc/lvm/lvm.conf")
_FOLDERS = ("/etc/default/grub.d", "/etc/initramfs-tools/conf.d", "/etc/dracut.conf.d")
_MDADM_CONFS = ("/etc/mdadm/mdadm.conf", "/etc/mdadm.conf")


@dataclass(frozen=True, slots=True)
class Known:
    """What the restored disks themselves tell, by spaces of the result.

    `places` is where disks and partitions stand on this machine (nothing for disk files), `signatures` what blkid
    finds in content that was carried whole.
    """

    places: Mapping[SpaceId, Place] = field(default_factory=dict)
    signatures: Mapping[SpaceId, Signature] = field(default_factory=dict)


def probe_known(restored: Restored) -> Known:
    """Look at the restored disks. Raises RemetalError if one cannot be read."""
    places: dict[SpaceId, Place] = {}
    for disk in restored.result.disks:
        table = restored.result.layer_on(disk.name)
        partitions = table.partitions if isinstance(table, (GptTable, MbrTable)) else ()
        for number in (0, *(each.number for each in partitions)):
            place = probe_place(restored.devices[disk.name], number) if disk.name in restored.devices else None
            if place is not None:
                places[f"{disk.name}:{number}" if number else disk.name] = place
    return Known(
        places,
        {
            layer.on: probe_signature(restored.span(layer.on))
            for layer in restored.result.layers
            if isinstance(layer, Raw) and layer.type and restored.is_restored(layer.on)
        },
    )


def probe_identities(root: Path, space: SpaceId, root_spec: str, restored: Restored, known: Known) -> Identities:
    """Return who is who for the system mounted at `root`, whose root file system stands on `space` of the result.

    `root_spec` is how its fstab calls that.
    """
    paths = [*_TEXTS, *(f"{folder}/{name}" for folder in _FOLDERS for name in list_inside(root, folder))]
    texts = [_read(root, path) for path in ("/etc/fstab", *_MDADM_CONFS, *paths)]
    arrays = "\n".join(_read(root, path) for path in _MDADM_CONFS)
    nodes = find_nodes(restored.source, restored.before(space), root_spec, texts, arrays)
    return probe_mappings(root, plan_identities(restored, nodes, known))


def probe_mappings(root: Path, identities: Identities) -> Identities:
    """Return the identities with the device nodes that the system mounted at `root` gives opened LUKS containers.

    Its crypttab names them; where it does not, they are called `luks-UUID`.
    """
    found = find_containers(_read(root, CRYPTTAB), identities)
    found += [(f"luks-{each.uuid}", each.space) for each in identities.everything if each.kind == "luks" and each.uuid]
    return name_mappings(identities, found)


def plan_identities(restored: Restored, nodes: Nodes, known: Known) -> Identities:
    """Return everything on the captured disks that has a name, by its names then and now.

    Nothing is read: of `restored` only the layouts count, and what moved.
    """
    survey = _Survey(restored, nodes, known)
    found = list(survey.take_all())
    return Identities(
        tuple(each for each in found if isinstance(each, Named)),
        tuple(each for each in found if isinstance(each, Gone)),
    )


@dataclass(frozen=True, slots=True)
class _Here:
    """What everything that stands on a captured space has in common; see Named."""

    names: tuple[str, ...]
    lasting: tuple[str, ...]
    partuuid: str
    new_partuuid: str | None
    partlabel: str
    place: Place | None
    moved: bool


class _Survey:
    """Goes through the captured layout, and asks of everything whether it stands in the result."""

    def __init__(self, restored: Restored, nodes: Nodes, known: Known) -> None:
        self.restored = restored
        self.source, self.result = restored.source, restored.result
        self.known = known
        self.names = _by_device((*nodes.hardware, *nodes.own))
        self.own = _by_device(nodes.own)

    def take_all(self) -> Iterator[Named | Gone]:
        """Yield all things, disks first, parents before children."""
        for disk in self.source.disks:
            yield self._make("disk", disk.name, stands=self._is_there(disk.name))
        for layer in self.source.layers:
            yield from self._take(layer)

    def _take(self, layer: Layer) -> Iterator[Named | Gone]:
        match layer:
            case GptTable() | MbrTable():
                for each in layer.partitions:
                    if not is_extended(layer, each):
                        space = f"{layer.on}:{each.number}"
                        yield self._make("partition", space, stands=self._is_there(space))
            case MdArray():
                yield from self._take_array(layer)
            case VolumeGroup():
                yield from self._take_group(layer)
            case Luks():
                now = self._layer_now(layer.on)
                new = now.uuid if isinstance(now, Luks) else None
                yield self._make("luks", layer.on, stands=new is not None, uuid=layer.uuid, new=new, label=layer.label)
            case FileSystem() | Swap():
                now = self._layer_now(layer.on)
                new = now.uuid if isinstance(now, type(layer)) and isinstance(now, (FileSystem, Swap)) else None
                kind: Kind = "swap" if isinstance(layer, Swap) else "filesystem"
                yield self._make(
                    kind, *spaces_of(layer), stands=new is not None, uuid=layer.uuid, new=new, label=layer.label
                )
            case Raw():
                yield from self._take_raw(layer)

    def _take_array(self, array: MdArray) -> Iterator[Named | Gone]:
        now = next((each for each in _arrays(self.result) if each.device == array.device), None)
        new = now.uuid if now is not None else None
        yield self._make("md", array.device, stands=now is not None, uuid=array.uuid, new=new, label=array.name)
        for space in array.spaces:
            stands = now is not None and self.restored.now(space) in now.spaces
            why = "" if stands else self._why(array.device if now is None else space)
            yield self._make("member", space, stands=stands, uuid=array.uuid, new=new, label=array.name, why=why)

    def _take_group(self, group: VolumeGroup) -> Iterator[Named | Gone]:
        now = next((each for each in _groups(self.result) if each.name == group.name), None)
        yield self._make_group(group, now)
        for member in group.members:
            new = next((each.uuid for each in now.members if each.name == member.name), None) if now else None
            if member.space:
                yield self._make("pv", member.space, stands=new is not None, uuid=member.uuid, new=new)
        for volume in group.volumes:
            found = [each.uuid for each in now.volumes if each.name == volume.name and each.captured] if now else []
            if volume.captured or volume.origin:
                yield self._make(
                    "lv",
                    f"{group.name}/{volume.name}",
                    stands=bool(found),
                    uuid=volume.uuid,
                    new=next(iter(found), None),
                    why="" if found else self._why(*group.spaces),
                )

    def _make_group(self, group: VolumeGroup, now: VolumeGroup | None) -> Named | Gone:
        node = f"/dev/{group.name}"
        if now is None:
            why = self._why(*group.spaces)
            return Gone(space=group.name, kind="vg", why=why, uuid=group.uuid, names=(node,))
        new = now.uuid if now.uuid != group.uuid else None
        return Named(
            space=group.name, kind="vg", uuid=group.uuid, new_uuid=new, names=(node,), lasting=(node,), moved=False
        )

    def _take_raw(self, layer: Raw) -> Iterator[Named | Gone]:
        """Yield what blkid finds in content that was carried whole; what it stands on is told anyway."""
        signature = self.known.signatures.get(self.restored.now(layer.on))
        if signature is not None and signature.type and signature.uuid:
            for kind in _KINDS.get(signature.type, ("filesystem",)):
                yield self._make(kind, layer.on, stands=True, uuid=signature.uuid, label=signature.label)

    def _make(
        self,
        kind: Kind,
        space: SpaceId,
        *more: SpaceId,
        stands: bool,
        uuid: str = "",
        new: str | None = None,
        label: str = "",
        why: str = "",
    ) -> Named | Gone:
        """Return one thing; `more` are further spaces that it stands on."""
        here = self._describe(space)
        names = (*here.names, *(name for each in more for name in self._describe(each).names))
        if not stands:
            return Gone(
                space=space,
                kind=kind,
                why=why or self._why(space, *more),
                uuid=uuid,
                label=label,
                partuuid=here.partuuid,
                partlabel=here.partlabel,
                names=names,
            )
        by_uuid = (f"UUID={new or uuid}",) if kind in {"filesystem", "swap", "luks"} and (new or uuid) else ()
        now = self.restored.now(space)
        return Named(
            space=space,
            kind=kind,
            uuid=uuid,
            new_uuid=None if new is None or new == uuid else new,
            label=label,
            partuuid=here.partuuid,
            new_partuuid=here.new_partuuid,
            partlabel=here.partlabel,
            names=names,
            lasting=(*by_uuid, *here.lasting),
            place=here.place,
            moved=here.moved,
            now=now if now != space else None,
        )

    def _describe(self, space: SpaceId) -> _Here:
        device, part = _split(self.source, space)
        before, after = _find_partition(self.source, space), _find_partition(self.result, self.restored.now(space))
        partuuid, partuuid_now = _partuuid(self.source, before), _partuuid(self.result, after)
        own = self.own.get(device, ()) if self._is_there(device) and device not in self.restored.moved else ()
        return _Here(
            names=_nodes(self.names.get(device, ()), part),
            lasting=(*_nodes(own, part), *((f"PARTUUID={partuuid_now}",) if partuuid_now else ())),
            partuuid=partuuid,
            new_partuuid=None if partuuid_now == partuuid else partuuid_now,
            partlabel=before[1].name if before is not None else "",
            place=self.known.places.get(self.restored.now(space)),
            moved=self._has_moved(space),
        )

    def _has_moved(self, space: SpaceId) -> bool:
        """Whether a space stands on other hardware now; what is found by its own name has not moved."""
        now = self.restored.now(space)
        if not self._is_there(space):
            return True
        device = self.result.place(now)[0].name
        if self.result.provider_of(device) is not None:
            return False
        return now != space or not _is_same_disk(self.source.disk(device), self.result.disk(device))

    def _is_there(self, space: SpaceId) -> bool:
        """Whether a captured space is one of the result's."""
        try:
            self.result.place(self.restored.now(space))
        except KeyError:
            return False
        return True

    def _layer_now(self, space: SpaceId) -> Layer | None:
        return self.result.layer_on(self.restored.now(space))

    def _why(self, *spaces: SpaceId) -> str:
        """Return what became of something that stood on these spaces, or was one, as the end of a sentence."""
        for space in spaces:
            if space in self.restored.moved:
                return f"the array was dissolved; its content stands on {self.restored.moved[space]}"
        left = {disk.name for disk in self.result.disks}
        under = {disk for space in spaces for disk in self.source.disks_under(space)}
        lost = sorted(under - left)
        if not lost:
            return "it was not restored"
        return f"the disk {lost[0]} was left out" if len(lost) == 1 else f"the disks {', '.join(lost)} were left out"


def _by_device(pairs: Iterable[tuple[SpaceId, str]]) -> dict[SpaceId, tuple[str, ...]]:
    found: dict[SpaceId, tuple[str, ...]] = {}
    for device, node in pairs:
        found[device] = (*found.get(device, ()), node)
    return found


def _split(layout: Layout, space: SpaceId) -> tuple[SpaceId, str]:
    """Return the device of a space, and the part of it ("" for all); a volume that is not captured has no place."""
    try:
        device = layout.place(space)[0].name
    except KeyError:
        return space, ""
    return device, space.removeprefix(device).removeprefix(":")


def _nodes(nodes: Sequence[str], part: str) -> tuple[str, ...]:
    return tuple(partition_node(node, part) if part else node for node in nodes)


def _find_partition(layout: Layout, space: SpaceId) -> tuple[GptTable | MbrTable, Partition] | None:
    below, _, number = space.rpartition(":")
    table = layout.layer_on(below) if below else None
    if isinstance(table, (GptTable, MbrTable)):
        for each in table.partitions:
            if str(each.number) == number:
                return table, each
    return None


def _partuuid(layout: Layout, found: tuple[GptTable | MbrTable, Partition] | None) -> str:
    """Return a partition's PARTUUID as udev writes it; empty for what is none."""
    if found is None:
        return ""
    table, partition = found
    return partition.uuid.lower() if isinstance(table, GptTable) else f"{table.signature}-{partition.number:02x}"


def _is_same_disk(before: Disk, now: Disk) -> bool:
    """Whether a disk is the very one that was captured, by what it says of itself."""
    if before.wwn or now.wwn:
        return before.wwn == now.wwn
    return bool(before.serial) and (before.serial, before.model) == (now.serial, now.model)


def _arrays(layout: Layout) -> Iterator[MdArray]:
    return (layer for layer in layout.layers if isinstance(layer, MdArray))


def _groups(layout: Layout) -> Iterator[VolumeGroup]:
    return (layer for layer in layout.layers if isinstance(layer, VolumeGroup))


def _read(root: Path, path: str) -> str:
    return (read_inside(root, path) or b"").decode("utf-8", "surrogateescape")
