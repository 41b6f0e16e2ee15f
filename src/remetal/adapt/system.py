"""Fitting a restored system to the disks and the firmware that it stands on now.

Everything is looked at first, read-only; what already fits is not written. So a repeated restore changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from remetal.adapt.change import Adaptation
from remetal.adapt.efi import adapt_efi
from remetal.adapt.grub_bios import adapt_grub_bios
from remetal.adapt.kernels.adapt import AS_USUAL, KernelChoices, adapt_kernels
from remetal.adapt.kernels.survey import Hardware
from remetal.adapt.network import Network, adapt_network
from remetal.adapt.package_cache import adapt_package_cache
from remetal.adapt.restored import Restored
from remetal.adapt.roots import find_systems
from remetal.adapt.storage_files import adapt_storage_files
from remetal.events import Note, Report, Step, silent
from remetal.layout.model import Layout, SpaceId

_NO_SYSTEM = "no installed system was found on the restored volumes; nothing was adapted inside them"
_NO_HARDWARE = (
    "nothing is known of the machine that the disk files are for, so the initramfs was left as it is: it holds the "
    "drivers of the hardware that it was made on (give the machine's record with --inventory)"
)


def adapt_system(
    source: Layout,
    result: Layout,
    devices: Mapping[SpaceId, Path],
    *,
    firmware: str | None,
    hardware: Hardware | None = None,
    kernels: KernelChoices = AS_USUAL,
    moved: Mapping[SpaceId, SpaceId] = MappingProxyType({}),
    kept: Collection[SpaceId] = (),
    network: Network | None = None,
    report: Report = silent,
) -> Adaptation:
    """Make the restored system boot where it stands now, and say what was changed.

    `source` is the layout as captured; `result` as it stands, with the same disk names; `devices` are the paths of
    its disks, block devices or disk files, and of the arrays, volumes and containers that are open on them. `moved`
    and `kept` are as in `Restored`. `firmware` is `bios` or `uefi` of the machine that we run on if the disks are its
    own, None for disk files: their NVRAM is elsewhere. `hardware` is the machine that it is to run on, if that is
    known; `kernels` is what was chosen for its drivers. `network` are the network cards of the captured machine and of
    that one.

    Raises RemetalError if a disk or a file system fails; running it again goes on.
    """
    restored = Restored(source=source, result=result, devices=devices, moved=moved, kept=frozenset(kept))
    report(Step("Looking for installed systems"))
    systems = find_systems(restored, report)
    done = Adaptation()
    for system in systems:
        report(Note(f"{system.root} holds {system.name}"))
        done += adapt_storage_files(system, restored)
        done += adapt_package_cache(system, restored)
        done += adapt_network(system, restored, network, report)
        done += adapt_kernels(system, restored, hardware, report, kernels)
    done += adapt_grub_bios(restored, systems, firmware=firmware, report=report)
    done += adapt_efi(restored, systems, firmware=firmware, report=report)
    if not systems:
        return done + Adaptation(notes=(_NO_SYSTEM,))
    return done if hardware is not None else done + Adaptation(notes=(_NO_HARDWARE,))
