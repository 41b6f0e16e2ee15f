"""LVM volume groups: opened to capture what is inside, made anew from their own metadata, so with every identity."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from remetal.layout.keys import Key
from remetal.layout.layers.contract import CannotOpenError, Content, Found
from remetal.layout.layers.lvm_extents import extensible_devices, least_space, plan_container
from remetal.layout.model import LogicalVolume, PhysicalVolume, SpaceId, VolumeGroup
from remetal.ondisk import lvm as ondisk
from remetal.ondisk.lvm_config import format_config
from remetal.ondisk.regions import BadStructureError
from remetal.system.blockdev import Span, open_disk, probe_written
from remetal.system.loop import attach_loop
from remetal.system.mapped import (
    claimed_device,
    drop_left_behind,
    find_mapping,
    find_mappings,
    is_left_behind,
    mapping_name,
    overlaid_device,
)
from remetal.system.run import ProgramFailedError, ProgramMissingError, run
from remetal.system.standing import is_made_of
from remetal.units import MIB

__all__ = [
    "PROGRAMS",
    "TYPES",
    "apply_container",
    "extensible_devices",
    "find_running",
    "is_made",
    "least_space",
    "open_container",
    "plan_container",
    "probe_groups",
    "taken_snapshot",
]

TYPES: tuple[str, ...] = ("LVM2_member",)
PROGRAMS: tuple[str, ...] = ("dmsetup", "lvm", "wipefs")

_CARRIED = {"striped", "linear", "mirror", "thin", "thin-pool"}
"""Types of segments that can be made anew, besides all of raid."""


_Labelled: TypeAlias = tuple[Content, ondisk.PvLabel]

_CONFIG = (
    "activation { monitoring = 0 udev_sync = 0 udev_rules = 0 } backup { backup = 0 archive = 0 } "
    'devices { hints = "none" } global { use_lvmpolld = 0 notify_dbus = 0 event_activation = 0 }'
)
"""Nothing is left in /etc/lvm, no daemon is started, and nobody waits for udev."""
_ACTIVATE = ("--activate", "y", "--ignoreactivationskip", "--yes")
_SYSTEM_ID = re.compile(r"[A-Za-z0-9_.+-]{1,128}")
_PLAIN = {"linear", "striped"}
"""Kinds whose activation writes nothing."""


def probe_groups(members: Sequence[Content]) -> list[Found]:
    """Sort the physical volumes by their group, and describe each group that is whole."""
    found: list[Found] = []
    labels: dict[str, _Labelled] = {}
    copies: dict[str, list[SpaceId]] = {}
    texts: dict[str, str] = {}
    for member in members:
        try:
            label = ondisk.parse_label(member.read, member.span.size)
            text = ondisk.read_metadata(member.read, member.span.size)
            group = ondisk.parse_volume_group(text) if text else None
        except BadStructureError as error:
            found.append(Found((member.space,), problem=f"{member.space} (LVM) is captured whole: {error.message}"))
            continue
        copies.setdefault(label.uuid, []).append(member.space)
        labels.setdefault(label.uuid, (member, label))
        if text and group and _is_newer(group, texts.get(group.uuid)):
            texts[group.uuid] = text
    doubled = {uuid: spaces for uuid, spaces in copies.items() if len(spaces) > 1}
    groups = [(ondisk.parse_volume_group(text), text) for text in texts.values()]
    names = [group.name for group, _ in groups]
    for group, text in groups:
        if any(pv.uuid in doubled for pv in group.pvs):
            found.append(_describe_copies(group, copies))
        else:
            found.append(_describe(group, text, labels, names.count(group.name) > 1))
    return found


def _describe_copies(group: ondisk.VolumeGroup, copies: Mapping[str, Sequence[SpaceId]]) -> Found:
    spaces = tuple(space for pv in group.pvs for space in copies.get(pv.uuid, ()))
    same = next(copies[pv.uuid] for pv in group.pvs if len(copies.get(pv.uuid, ())) > 1)
    return Found(
        spaces,
        problem=f"{' and '.join(same)} have the same LVM identity, as copies do (volume group {group.name})",
        hint="Back up one of them only, with --disk.",
        lacks_members=True,
    )


def _is_newer(group: ondisk.VolumeGroup, known: str | None) -> bool:
    return known is None or group.seqno > ondisk.parse_volume_group(known).seqno


def _describe(group: ondisk.VolumeGroup, text: str, labels: Mapping[str, _Labelled], doubled: bool) -> Found:
    spaces = tuple(labels[pv.uuid][0].space for pv in group.pvs if pv.uuid in labels)
    words = f"the volume group {group.name} (UUID {group.uuid})"
    missing = [pv.uuid for pv in group.pvs if pv.uuid not in labels]
    if missing:
        return Found(
            spaces,
            problem=f"{words} lacks {len(missing)} of {len(group.pvs)} physical volumes: {', '.join(missing)}",
            hint="Attach the missing disks, or name them, too, with --disk.",
            lacks_members=True,
        )
    if doubled:
        return Found(
            spaces,
            problem=f"two volume groups are named {group.name}; one has the UUID {group.uuid}",
            hint="Rename one: vgrename UUID NEWNAME.",
            lacks_members=True,
        )
    kinds = {segment.type for volume in group.lvs for segment in volume.segments}
    strange = sorted(kind for kind in kinds if kind not in _CARRIED and not kind.startswith("raid"))
    strange += _find_odd_pools(group)
    if strange or "EXPORTED" in group.status or group.lock_type not in {"", "none"}:
        why = f"it holds {', '.join(strange)} volumes" if strange else "it is exported, or shared by machines"
        return Found(spaces, problem=f"{words} is captured whole, as it is: {why}")
    return Found(spaces, _layer(group, text, labels))


def _find_odd_pools(group: ondisk.VolumeGroup) -> list[str]:
    """Return what of thin pools cannot be made anew: metadata in several pieces, origins outside of the pool."""
    segments = [segment for volume in group.lvs for segment in volume.segments]
    odd = []
    for pool in _find_pools(group):
        try:
            whole = len(ondisk.physical_ranges(group, pool.metadata)) == 1
        except BadStructureError:
            whole = False
        odd += [] if whole else ["thin pools with scattered metadata, and their"]
    return odd + ["thin snapshots of other"] * any(each.external_origin for each in segments)


def _layer(group: ondisk.VolumeGroup, text: str, labels: Mapping[str, _Labelled]) -> VolumeGroup:
    return VolumeGroup(
        name=group.name,
        uuid=group.uuid,
        extent_size=group.extent_size,
        members=tuple(
            PhysicalVolume(
                space=labels[pv.uuid][0].space,
                name=pv.id,
                uuid=pv.uuid,
                data_start=pv.data_start,
                extents=pv.extents,
                metadata_copies=len(labels[pv.uuid][1].metadata_areas),
            )
            for pv in group.pvs
        ),
        volumes=tuple(_volume(each) for each in ondisk.visible_volumes(group)),
        metadata=text,
    )


def _volume(volume: ondisk.LogicalVolume) -> LogicalVolume:
    first = volume.segments[0]
    plain = all(each.type in {"striped", "linear"} and len(each.stripes) == 1 for each in volume.segments)
    return LogicalVolume(
        name=volume.name,
        uuid=volume.uuid,
        size=volume.size,
        kind="linear" if plain else volume.type,
        pool=first.pool,
        origin=first.origin,
        captured=volume.type != "thin-pool",
    )


@contextmanager
def open_container(
    layer: VolumeGroup, members: Mapping[SpaceId, Span], keys: Sequence[Key], *, writable: bool
) -> Iterator[Mapping[SpaceId, Path]]:
    """Use the group if it is active already, else activate it; nothing of its members changes unless `writable`.

    Where it is writable, thin snapshots may be missing: `taken_snapshot` makes them.
    """
    try:
        for device in filter(is_left_behind, find_running(layer)):
            drop_left_behind(device)
    except ProgramFailedError as error:
        raise CannotOpenError(f"the volume group {layer.name} is in use by another remetal: {error.message}") from error
    if any(not is_made_of(device, [span.path for span in members.values()]) for device in find_running(layer)):
        raise CannotOpenError(f"a volume group {layer.name} with the same UUID is active here, on other disks")
    known = _find_devices(layer)
    if len(known) == sum(each.captured for each in layer.volumes):
        yield known
        return
    with ExitStack() as stack:
        try:
            found = _activate(layer, members, stack, writable)
        except (ProgramFailedError, ProgramMissingError) as error:
            raise CannotOpenError(
                f"the volume group {layer.name} cannot be activated here: {error.message}", hint=error.hint
            ) from error
        yield found


def _activate(
    layer: VolumeGroup, members: Mapping[SpaceId, Span], stack: ExitStack, writable: bool
) -> dict[SpaceId, Path]:
    """Activate a group until the stack is closed; return its devices."""
    plain = all(each.kind in _PLAIN for each in layer.volumes)
    devices = [stack.enter_context(attach_loop(span, writable=writable)) for span in members.values()]
    if not writable and not plain:
        devices = [stack.enter_context(overlaid_device(device)) for device in devices]
    stack.callback(_lvm, layer, devices, "vgchange", "--activate", "n", layer.name)
    snapshots = [each for each in layer.volumes if _is_thin_snapshot(each)] if writable else []
    others = [f"{layer.name}/{each.name}" for each in layer.volumes if each.captured and each not in snapshots]
    _lvm(layer, devices, "lvchange", *_ACTIVATE, *others)
    for each in snapshots:
        _map_snapshot(layer, each)
    found = _find_devices(layer)
    for each in layer.volumes:
        if each.captured and each not in snapshots and f"{layer.name}/{each.name}" not in found:
            raise CannotOpenError(f"the kernel shows no volume {layer.name}/{each.name}")
    for device in found.values():
        stack.enter_context(claimed_device(device))
    return found


def _is_thin_snapshot(volume: LogicalVolume) -> bool:
    return volume.kind == "thin" and bool(volume.origin)


def _find_devices(layer: VolumeGroup) -> dict[SpaceId, Path]:
    """Return the devices of the captured volumes that are active."""
    found = {}
    for volume in layer.volumes:
        path = find_mapping(_mapping_of(layer, volume.uuid)) if volume.captured else None
        if path is not None:
            found[f"{layer.name}/{volume.name}"] = path
    return found


def find_running(layer: VolumeGroup) -> tuple[Path, ...]:
    """Return the active devices of the group, hidden ones included: the kernel has no two of one UUID."""
    return tuple(find_mappings(_mapping_of(layer, "")))


def _mapping_of(layer: VolumeGroup, uuid: str) -> str:
    """Return how the kernel calls the mapping of a volume."""
    return "LVM-" + (layer.uuid + uuid).replace("-", "")


@contextmanager
def taken_snapshot(layer: VolumeGroup, name: str) -> Iterator[Mapping[SpaceId, Path]]:
    """Make a thin snapshot of its origin, as the pool has it now, unless it is there; yield its device by its name.

    The group is open. LVM's own metadata know of the snapshot already, so only the pool is told.
    """
    volume = layer.volume(name)
    found = _map_snapshot(layer, volume)
    if found is None:
        group = ondisk.parse_volume_group(layer.metadata)
        origin = find_mapping(_mapping_of(layer, layer.volume(volume.origin).uuid))
        pool = _find_pool(layer, volume)
        if origin is None or pool is None:
            raise CannotOpenError(f"the origin of the snapshot {layer.name}/{name} is not open")
        numbers = f"create_snap {_thin_number(group, name)} {_thin_number(group, volume.origin)}"
        run(["dmsetup", "suspend", mapping_name(origin)])
        try:
            run(["dmsetup", "message", mapping_name(pool), "0", numbers])
        finally:
            run(["dmsetup", "resume", mapping_name(origin)])
        found = _map_snapshot(layer, volume)
    if found is None:
        raise CannotOpenError(f"the kernel shows no snapshot {layer.name}/{name}")
    with claimed_device(found):
        yield {f"{layer.name}/{name}": found}


def _map_snapshot(layer: VolumeGroup, volume: LogicalVolume) -> Path | None:
    """Return the device of a thin snapshot, mapping it as LVM would; None if its pool does not know it yet."""
    uuid = _mapping_of(layer, volume.uuid)
    pool = _find_pool(layer, volume)
    if find_mapping(uuid) is None and pool is not None:
        number = _thin_number(ondisk.parse_volume_group(layer.metadata), volume.name)
        name = "-".join(part.replace("-", "--") for part in (layer.name, volume.name))
        table = f"0 {volume.size // 512} thin {pool} {number}"
        run(["dmsetup", "create", name, "--uuid", uuid, "--table", table], allowed=(0, 1))
    return find_mapping(uuid)


def _find_pool(layer: VolumeGroup, volume: LogicalVolume) -> Path | None:
    return find_mapping(f"{_mapping_of(layer, layer.volume(volume.pool).uuid)}-tpool")


def _thin_number(group: ondisk.VolumeGroup, name: str) -> int:
    """Return the number by which a thin pool knows a volume."""
    volume = ondisk.find_volume(group, name)
    assert volume is not None
    return volume.segments[0].device_id


def _lvm(layer: VolumeGroup, devices: Sequence[Path], command: str, *words: str | Path) -> None:
    """Run an LVM command that sees these devices, and nothing else of the machine and its configuration.

    It takes itself for the machine that owns the group.
    """
    owner = ondisk.parse_volume_group(layer.metadata).system_id
    own = (
        f' global {{ system_id_source = "lvmlocal" }} local {{ system_id = "{owner}" }}'
        if _SYSTEM_ID.fullmatch(owner)
        else ""
    )
    run(
        ["lvm", command, "--devices", ",".join(map(str, devices)), "--config", _CONFIG + own, *words],
        env={"LVM_SYSTEM_DIR": "", "LVM_SUPPRESS_FD_WARNINGS": "1"},
    )


def is_made(layer: VolumeGroup, members: Mapping[SpaceId, Span]) -> bool:
    """Whether this very group, with these volumes, stands on its members."""
    wanted = ondisk.parse_volume_group(layer.metadata)
    for member in layer.members:
        span = members[member.space]
        with open_disk(span.path) as disk:
            read = disk.reader(span.start)
            try:
                text = ondisk.read_metadata(read, span.size)
                if ondisk.parse_label(read, span.size).uuid != member.uuid:
                    return False
                found = ondisk.parse_volume_group(text) if text else None
            except BadStructureError:
                return False
        if found is not None and (found.uuid, found.pvs, found.lvs) != (wanted.uuid, wanted.pvs, wanted.lvs):
            return False
    return True


def apply_container(layer: VolumeGroup, members: Mapping[SpaceId, Span]) -> int:
    """Make the physical volumes and the group from its metadata, and clear what its volumes would take for theirs."""
    group = ondisk.parse_volume_group(layer.metadata)
    with ExitStack() as stack, TemporaryDirectory(prefix="remetal-") as folder:
        devices = {
            each.name: stack.enter_context(attach_loop(members[each.space], writable=True)) for each in layer.members
        }
        before = sum(map(probe_written, devices.values()))
        description = Path(folder, "group")
        description.write_text(format_config(group.config))
        for member in layer.members:
            device = devices[member.name]
            run(["wipefs", "--all", "--force", "--quiet", device])
            options = ["--uuid", member.uuid, "--restorefile", str(description), "--yes", "--force", "--force"]
            options += ["--metadatacopies", str(member.metadata_copies)]
            _lvm(layer, [device], "pvcreate", *options, device)
        _lvm(layer, list(devices.values()), "vgcfgrestore", "--force", "--file", description, group.name)
        for range_ in _find_stale(group):
            with open_disk(devices[range_.pv], writable=True) as disk:
                disk.write(bytes(min(range_.size, MIB)), range_.offset)
        for segment in _find_pools(group):
            _format_pool(group, segment, devices, Path(folder))
        return sum(map(probe_written, devices.values())) - before


def _find_pools(group: ondisk.VolumeGroup) -> list[ondisk.Segment]:
    return [segment for volume in group.lvs for segment in volume.segments if segment.type == "thin-pool"]


def _format_pool(group: ondisk.VolumeGroup, pool: ondisk.Segment, devices: Mapping[str, Path], folder: Path) -> None:
    """Give a thin pool metadata in which its volumes are empty; snapshots come later (thin_restore(8))."""
    data = ondisk.find_volume(group, pool.data)
    assert data is not None
    head = f'transaction="{pool.transaction_id}" version="2" data_block_size="{pool.chunk_size // 512}"'
    lines = [f'<superblock uuid="" time="0" {head} nr_data_blocks="{data.size // pool.chunk_size}">']
    for volume in group.lvs:
        first = volume.segments[0]
        if first.type == "thin" and not first.origin and _pool_of(group, first) is pool:
            mark = f'dev_id="{first.device_id}" mapped_blocks="0" transaction="{first.transaction_id}"'
            lines.append(f'<device {mark} creation_time="0" snap_time="0"></device>')
    description = folder / "pool.xml"
    description.write_text("\n".join([*lines, "</superblock>", ""]))
    (range_,) = ondisk.physical_ranges(group, pool.metadata)
    with attach_loop(Span(devices[range_.pv], range_.offset, range_.size), writable=True) as device:
        run(["thin_restore", "--input", description, "--output", device])


def _pool_of(group: ondisk.VolumeGroup, thin: ondisk.Segment) -> ondisk.Segment | None:
    volume = ondisk.find_volume(group, thin.pool)
    return volume.segments[0] if volume is not None else None


def _find_stale(group: ondisk.VolumeGroup) -> list[ondisk.PhysicalRange]:
    """Return where superblocks of RAID images and logs of mirrors lie: zeros there make the kernel begin anew."""
    segments = [segment for volume in group.lvs for segment in volume.segments]
    names = [name for segment in segments for name in (*segment.raid_metadata, segment.log) if name]
    return [range_ for name in dict.fromkeys(names) for range_ in ondisk.physical_ranges(group, name)[:1]]
