"""By which device nodes an installed system knew its disks and arrays, as its own files show. Pure.

The kernel names of the day of the capture may differ from those of the installed system, and a disk file has none. So
the fstab's entry for `/` is asked first: it tells where its own disk is, and whether equal kernel names mean equal
disks at all. A name that is left over may well mean a disk that was never captured.

Sources: fstab(5), mdadm(8) ("--name", "--homehost"), udev's 60-persistent-storage.rules, 63-md-raid-arrays.rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from remetal.adapt.mdadm_conf import find_array_nodes
from remetal.adapt.names import is_hardware_name
from remetal.layout.model import Disk, Layout, MdArray, SpaceId, VolumeGroup

_KERNEL_NODE = re.compile(
    r"(/dev/(?:(?:[shv]d|xvd|ubd)[a-z]+|(?:nvme\d+n|mmcblk|pmem|md)\d+(?=p\d|$)))(?:p?(\d+))?", re.ASCII
)
_LINK = re.compile(r"(/dev/disk/by-(?:id|path)/.+?)(?:-part(\d+))?", re.ASCII)
_MENTIONED = re.compile(r"/dev/disk/by-id/[^\s\"',;=|(){}\[\]]+")
_SUFFIX = re.compile(r"(?:_\d+|-\d+:\d+)$")
_MARK_MIN = 4


@dataclass(frozen=True, slots=True)
class Nodes:
    """Device nodes of the captured devices, as pairs of device and node.

    `hardware` are made of the kernel's count or of the hardware; `own` of what the device itself says, so they last as
    long as it does.
    """

    hardware: tuple[tuple[SpaceId, str], ...] = ()
    own: tuple[tuple[SpaceId, str], ...] = ()


def find_nodes(source: Layout, root: SpaceId, root_spec: str, texts: Iterable[str], mdadm_conf: str = "") -> Nodes:
    """Return by which nodes a system knew the devices of the layout as captured.

    `root` is the captured space of its root file system, `root_spec` how its fstab calls that (empty if it does not);
    `texts` are files of its that may name disks, `mdadm_conf` is the one that names arrays.
    """
    known = _find_disks(source, root, root_spec, texts)
    own = [*_own_nodes(source, mdadm_conf)]
    device = source.place(root)[0].name
    if device == root and root_spec.startswith("/dev/") and not is_hardware_name(root_spec):
        own.append((device, root_spec))
    hardware = tuple((name, node) for node, name in known.items() if (name, node) not in own)
    return Nodes(hardware, tuple(dict.fromkeys(own)))


def parse_node(spec: str) -> tuple[str, str] | None:
    """Return the device and the partition number ("" for all of it) of a kernel name or a by-id or by-path link."""
    match = _KERNEL_NODE.fullmatch(spec) or _LINK.fullmatch(spec)
    return (match[1], match[2] or "") if match else None


def partition_node(node: str, number: int | str) -> str:
    """Return the node of a device's partition. Source: the kernel's disk_name(), udev's links, kpartx(8)."""
    if node.startswith(("/dev/disk/by-id/", "/dev/disk/by-path/")):
        return f"{node}-part{number}"
    return f"{node}p{number}" if node[-1].isdigit() else f"{node}{number}"


def mapper_node(group: str, volume: str) -> str:
    """Return the device-mapper node of a logical volume: hyphens in its names are doubled (lvm(8))."""
    return f"/dev/mapper/{group.replace('-', '--')}-{volume.replace('-', '--')}"


def _find_disks(source: Layout, root: SpaceId, root_spec: str, texts: Iterable[str]) -> dict[str, SpaceId]:
    """Return node → disk (or array, where the root stands on one), as far as there is evidence."""
    root_device = source.place(root)[0].name
    links = {parsed[0] for text in texts for spec in _mentioned(text) if (parsed := parse_node(spec)) is not None}
    evidence = parse_node(root_spec)
    if evidence is not None:
        links.add(evidence[0])
    known = {node: disk.name for node in sorted(links) if (disk := _find_by_serial(node, source)) is not None}
    equal = {f"/dev/{disk.name}": disk.name for disk in source.disks}
    if evidence is None or evidence[0] in {f"/dev/{root_device}", *known} or "/by-path/" in evidence[0]:
        known |= equal
    if evidence is not None:
        known.pop(evidence[0], None)
        if evidence[1] == root.removeprefix(root_device).removeprefix(":"):
            known[evidence[0]] = root_device
    return known


def _mentioned(text: str) -> Iterator[str]:
    """Yield the links of disks in a text; what follows a colon may belong to it or not."""
    for match in _MENTIONED.finditer(text):
        parts = match[0].split(":")
        for count in range(len(parts), max(len(parts) - 8, 0), -1):
            yield ":".join(parts[:count])


def _find_by_serial(node: str, source: Layout) -> Disk | None:
    """Return the disk whose serial number or world-wide name ends a by-id link (`ata-MODEL_SERIAL`, `wwn-0x…`)."""
    if not node.startswith("/dev/disk/by-id/"):
        return None
    ends = (node, _SUFFIX.sub("", node))
    for disk in source.disks:
        world_wide = re.sub(r"^(?:0x|[a-z]+\.)", "", disk.wwn)
        marks = [mark for mark in (disk.serial.replace(" ", "_"), world_wide) if len(mark) >= _MARK_MIN]
        if any(end.endswith(mark) for end in ends for mark in marks):
            return disk
    return None


def _own_nodes(source: Layout, mdadm_conf: str) -> Iterator[tuple[SpaceId, str]]:
    """Yield the nodes that arrays and logical volumes have by what they say of themselves, the best first."""
    arrays = [layer for layer in source.layers if isinstance(layer, MdArray)]
    yield from find_array_nodes(mdadm_conf, arrays)
    for layer in source.layers:
        match layer:
            case MdArray():
                for node in _array_nodes(layer):
                    yield layer.device, node
            case VolumeGroup():
                for volume in layer.volumes:
                    device = f"{layer.name}/{volume.name}"
                    mapper = mapper_node(layer.name, volume.name)
                    yield device, mapper
                    yield device, f"/dev/{device}"
                    yield device, f"/dev/disk/by-id/dm-name-{mapper.removeprefix('/dev/mapper/')}"
                    yield device, f"/dev/disk/by-id/dm-uuid-LVM-{(layer.uuid + volume.uuid).replace('-', '')}"
            case _:
                pass


def _array_nodes(array: MdArray) -> Iterator[str]:
    name = array.name.rpartition(":")[2] or (str(array.minor) if array.minor >= 0 else "")
    if name:
        yield f"/dev/md/{name}"
    if name.isascii() and name.isdigit():
        yield f"/dev/md{name}"
    if array.name:
        yield f"/dev/disk/by-id/md-name-{array.name}"
    yield f"/dev/disk/by-id/md-uuid-{array.uuid}"
