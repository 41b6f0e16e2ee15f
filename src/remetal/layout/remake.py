"""Making file systems anew where their blocks do not fit: a smaller target, or one with larger sectors.

The plan is pure, and names the very commands. Files are copied afterwards, by `remetal.image.copy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from remetal.layout.layers import VOLUMES, remake_ext, remake_f2fs, remake_fat, remake_xfs
from remetal.layout.layers.contract import Content
from remetal.layout.layers.remaking import Plan, Remake
from remetal.layout.making import Making
from remetal.layout.model import FileSystem
from remetal.layout.signatures import probe_signature
from remetal.ondisk.regions import BadStructureError
from remetal.system.blockdev import Span, open_disk, probe_written
from remetal.system.loop import attach_loop
from remetal.system.run import ProgramFailedError, run

_PLANS: Mapping[str, Callable[[FileSystem, Making | None, int, int], Plan]] = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), remake_ext.plan_remake),
    "xfs": remake_xfs.plan_remake,
    "vfat": remake_fat.plan_vfat,
    "exfat": remake_fat.plan_exfat,
    "f2fs": remake_f2fs.plan_remake,
}
"""By blkid's name of the type."""

_SET_BY_THE_KERNEL = {"needs_recovery", "orphan_present", "large_file", "ext_attr"}
"""Features that come with the first file of their kind, or with a mount."""

_NTFS = "NTFS cannot be made anew without losing what only Windows can set: shrink it there, then back it up again"


def plan_remake(volume: FileSystem, making: Making | None, space: int, sector: int) -> Plan:
    """Decide how to bring a file system's files onto a space of `space` bytes on a device with `sector`-byte sectors.

    Returns the way, or the sentence why there is none. `making` is how it was made, if that was captured.
    """
    if volume.type == "ntfs":
        return _NTFS
    plan = _PLANS.get(volume.type)
    return (
        f"a file system of the type {volume.type} is not made anew"
        if plan is None
        else plan(volume, making, space, sector)
    )


def apply_remake(span: Span, volume: FileSystem, remake: Remake) -> int:
    """Make the file system on `span`, empty, unless it is there; return the bytes written.

    One that is there may hold files already: it is checked, so that copying can go on. Raises ProgramFailedError if its
    programs cannot make it.
    """
    there = is_remade(span, volume, remake)
    with attach_loop(span, writable=True) as device:
        before = probe_written(device)
        if not (there and _is_in_order(remake, str(device))):
            run(["wipefs", "--all", "--force", "--quiet", device])
            for command in remake.commands:
                run([*command, device])
        return probe_written(device) - before


def is_remade(span: Span, volume: FileSystem, remake: Remake) -> bool:
    """Whether a file system of this identity, made as planned, stands on `span`. Its files may be others."""
    signature = probe_signature(span)
    if signature.type != volume.type or signature.ambiguous or volume.type not in VOLUMES:
        return False
    with open_disk(span.path) as disk:
        content = Content(volume.on, span, disk.reader(span.start), signature.type, signature.label)
        try:
            found = VOLUMES[volume.type].probe_volume(content)
        except BadStructureError:
            return False
    if not isinstance(found, FileSystem) or not remake.size <= found.size <= span.size:
        return False
    same = (found.uuid, found.label, found.block_size) == (volume.uuid, volume.label, remake.block_size)
    return same and not (set(found.features) ^ set(remake.features)) - _SET_BY_THE_KERNEL


def _is_in_order(remake: Remake, device: str) -> bool:
    """Let its own program repair what an interruption left; False if it cannot."""
    try:
        for command in remake.checks:
            run([*command, device], allowed=(0, 1))
    except ProgramFailedError:
        return False
    return True
