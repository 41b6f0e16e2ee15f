"""The files of a restored system that name its storage: read, planned, and written where they must change.

`adapt_storage_files` takes a system on file systems that the kernel mounts; `adapt_esp_files` takes the EFI system
partition, which is read and written without a mount. What already fits is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeAlias

from remetal.adapt.change import Adaptation, Change
from remetal.adapt.crypttab import CRYPTTAB, plan_crypttab
from remetal.adapt.fat_files import FatTree, apply_fat_file, read_fat_file
from remetal.adapt.grub_cfg import plan_grub_cfg
from remetal.adapt.identity import Identities
from remetal.adapt.lvm_conf import plan_lvm_conf
from remetal.adapt.lvm_devices import plan_lvm_devices
from remetal.adapt.mdadm_conf import plan_mdadm_conf
from remetal.adapt.restored import Restored
from remetal.adapt.resume import (
    plan_boot_entry,
    plan_default_grub,
    plan_dracut_conf,
    plan_grubenv,
    plan_kernel_cmdline,
    plan_resume,
)
from remetal.adapt.rooted import list_inside, overwrite_inside, read_inside
from remetal.adapt.roots import System, open_root
from remetal.adapt.text import TextPlan

Planner: TypeAlias = Callable[[str, Identities, str], TextPlan]

_FILES: tuple[tuple[str, Planner], ...] = (
    (CRYPTTAB, plan_crypttab),
    ("/etc/mdadm/mdadm.conf", plan_mdadm_conf),
    ("/etc/mdadm/mdadm.conf.d/*", plan_mdadm_conf),
    ("/etc/mdadm.conf", plan_mdadm_conf),
    ("/etc/mdadm.conf.d/*", plan_mdadm_conf),
    ("/etc/lvm/lvm.conf", plan_lvm_conf),
    ("/etc/lvm/lvmlocal.conf", plan_lvm_conf),
    ("/etc/lvm/devices/system.devices", plan_lvm_devices),
    ("/etc/initramfs-tools/initramfs.conf", plan_resume),
    ("/etc/initramfs-tools/conf.d/*", plan_resume),
    ("/etc/dracut.conf", plan_dracut_conf),
    ("/etc/dracut.conf.d/*.conf", plan_dracut_conf),
    ("/etc/default/grub", plan_default_grub),
    ("/etc/default/grub.d/*.cfg", plan_default_grub),
    ("/etc/kernel/cmdline", plan_kernel_cmdline),
    ("/etc/cmdline.d/*.conf", plan_kernel_cmdline),
    ("/boot/loader/entries/*.conf", plan_boot_entry),
    ("/boot/grub/grub.cfg", plan_grub_cfg),
    ("/boot/grub/grubenv", plan_grubenv),
    ("/boot/grub2/grub.cfg", plan_grub_cfg),
    ("/boot/grub2/grubenv", plan_grubenv),
)
_ESP_FILES: tuple[tuple[str, Planner], ...] = (
    ("/loader/entries/*.conf", plan_boot_entry),
    ("/efi/*/grub.cfg", plan_grub_cfg),
    ("/efi/*/grubenv", plan_grubenv),
    ("/grub/grub.cfg", plan_grub_cfg),
    ("/grub/grubenv", plan_grubenv),
    ("/grub2/grub.cfg", plan_grub_cfg),
    ("/grub2/grubenv", plan_grubenv),
)
_IN_KERNEL_IMAGE = ("/etc/kernel/cmdline", "/etc/cmdline.d/")
_KERNEL_IMAGE = (
    "unified kernel images, if the system boots from one, hold the kernel command line as it was: make them anew once "
    "the system runs"
)


def probe_storage_files(root: Path, identities: Identities) -> tuple[TextPlan, ...]:
    """Return the plans for the files of the system mounted at `root`, without those that have nothing to say.

    Nothing is written. A file that is not there, or is larger than any that somebody would write, is passed over.
    """
    plans = []
    for pattern, planner in _FILES:
        for path in _paths(root, pattern):
            data = read_inside(root, path)
            if data is not None:
                plans.append(planner(_decode(data), identities, path))
    return tuple(plan for plan in plans if plan.changes or plan.notes)


def adapt_storage_files(system: System, restored: Restored) -> Adaptation:
    """Make the files of a restored system name its storage as it stands now, its fstab first; say what was changed.

    Raises RemetalError if a file system fails; running it again goes on.
    """
    with open_root(system, restored) as root:
        plans = (system.fstab, *probe_storage_files(root, system.identities))
    changed = [plan for plan in plans if plan.changes]
    if changed:
        with open_root(system, restored, writable=True) as root:
            for plan in changed:
                overwrite_inside(root, plan.path, _encode(plan.text))
    return _summary(plans) + Adaptation(notes=_copies_notes([plan.path for plan in changed]))


def adapt_esp_files(tree: FatTree, identities: Identities) -> Adaptation:
    """Do the same for an EFI system partition or another FAT: boot entries, GRUB's configuration and environment.

    Raises RemetalError if it cannot be read or written.
    """
    plans = [
        planner(_decode(read_fat_file(tree.span, path)), identities, path)
        for pattern, planner in _ESP_FILES
        for path in tree.paths
        if fnmatchcase(path.lower(), pattern) and path.count("/") == pattern.count("/")
    ]
    for plan in plans:
        if plan.changes:
            apply_fat_file(tree, plan.path, _encode(plan.text))
    return _summary(tuple(plans))


def _paths(root: Path, pattern: str) -> Iterator[str]:
    folder, _, name = pattern.rpartition("/")
    if "*" not in name:
        yield pattern
        return
    for each in list_inside(root, folder):
        if fnmatchcase(each, name):
            yield f"{folder}/{each}"


def _summary(plans: tuple[TextPlan, ...]) -> Adaptation:
    changed = [plan for plan in plans if plan.changes]
    return Adaptation(
        changes=tuple(Change(plan.path, "; ".join(plan.changes), plan.diff) for plan in changed),
        notes=tuple(dict.fromkeys(note for plan in plans for note in plan.notes)),
        bytes_written=sum(len(_encode(plan.text)) for plan in changed),
    )


def _copies_notes(paths: list[str]) -> tuple[str, ...]:
    """Return what is to be said of copies of changed files that nobody can change from here."""
    return (_KERNEL_IMAGE,) if any(path.startswith(_IN_KERNEL_IMAGE) for path in paths) else ()


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
