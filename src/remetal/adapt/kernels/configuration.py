"""The files in an initramfs that name storage and network cards: copies of the system's own, which must say the same.

Sources: Debian's cryptsetup-initramfs (cryptroot/crypttab), mdadm's and lvm2's hooks for initramfs-tools;
initramfs-tools(7) (conf/conf.d); dracut.cmdline(7) (etc/cmdline.d); systemd.link(5).
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from remetal.adapt.crypttab import plan_crypttab
from remetal.adapt.identity import Identities
from remetal.adapt.kernels.initramfs import Initramfs
from remetal.adapt.lvm_conf import plan_lvm_conf
from remetal.adapt.lvm_devices import plan_lvm_devices
from remetal.adapt.mdadm_conf import plan_mdadm_conf
from remetal.adapt.network.files import decode, probe_naming_files
from remetal.adapt.resume import plan_kernel_cmdline, plan_resume
from remetal.adapt.storage_files import Planner
from remetal.adapt.text import TextPlan, diff_texts

_FILES: tuple[tuple[str, Planner], ...] = (
    ("cryptroot/crypttab", plan_crypttab),
    ("etc/crypttab", plan_crypttab),
    ("etc/mdadm.conf", plan_mdadm_conf),
    ("etc/mdadm/mdadm.conf", plan_mdadm_conf),
    ("etc/lvm/*.conf", plan_lvm_conf),
    ("etc/lvm/devices/system.devices", plan_lvm_devices),
    ("etc/cmdline.d/*.conf", plan_kernel_cmdline),
    ("conf/conf.d/*", plan_resume),
)


def plan_configuration(initramfs: Initramfs, identities: Identities) -> Iterator[TextPlan]:
    """Yield the files of an initramfs that have to change, by their paths in it."""
    for path, text in initramfs.texts.items():
        planner = next((each for pattern, each in _FILES if fnmatchcase(path, pattern)), None)
        plan = planner(text, identities, path) if planner is not None else None
        if plan is not None and plan.changes:
            yield plan


def plan_naming(root: Path, initramfs: Initramfs) -> Iterator[TextPlan]:
    """Yield the files of the system at `root` that give names to network cards, and that its initramfs has to hold.

    It names the cards first, and some mistakes cannot be undone later.
    """
    for path, data in probe_naming_files(root).items() if initramfs.loads_for_devices else ():
        name, text = path.lstrip("/"), decode(data)
        held = initramfs.texts.get(name)
        if text != held and (held is not None or "remetal" in name):
            yield TextPlan(name, text, ("as the system has it now",), diff=diff_texts(path, held or "", text))
