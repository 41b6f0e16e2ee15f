"""What an administrator has to run where GRUB needs an image that remetal cannot make: it is for the restored system's
own grub-install, from the recovery shell. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote

from remetal.adapt.restored import Restored
from remetal.adapt.roots import System
from remetal.layout.model import FileSystem, Luks, MdArray, SpaceId, VolumeGroup, spaces_of

_GRUB2 = {"fedora", "rhel", "centos", "suse", "opensuse"}


def plan_grub_install(system: System, restored: Restored, words: str) -> str:
    """Return the commands that open a restored system, and install GRUB in it with these words.

    `words` are grub-install's: the disk, or the options for UEFI. Names that come out of a backup are quoted, since
    somebody will paste them into a shell.
    """
    volume = restored.result.layer_on(system.root)
    assert isinstance(volume, FileSystem)
    subvolume = system.subvolumes.get("/", "")
    options = f"-o {quote(f'subvol={subvolume}')} " if subvolume else ""
    program = "grub2-install" if _GRUB2 & set(system.ids) else "grub-install"
    commands = [
        *dict.fromkeys(_opening(system.root, system, restored)),
        f"mount {options}{quote(f'UUID={volume.uuid}')} /mnt",
        "for each in dev proc sys run; do mount --rbind /$each /mnt/$each; done",
        "chroot /mnt mount -a",
        f"chroot /mnt {program} {words}",
    ]
    return "; ".join(commands)


def _opening(space: SpaceId, system: System, restored: Restored) -> Iterator[str]:
    """Yield the commands that open what a space stands on, the lowest first."""
    layout = restored.result
    container = layout.provider_of(layout.place(space)[0].name)
    if container is None:
        return
    for below in spaces_of(container):
        yield from _opening(below, system, restored)
    match container:
        case MdArray():
            yield "mdadm --assemble --scan"
        case VolumeGroup():
            yield f"vgchange -ay {quote(container.name)}"
        case Luks():
            device = quote(f"/dev/disk/by-uuid/{container.uuid}")
            yield f"cryptsetup open {device} {quote(_mapping(container, system))}"


def _mapping(container: Luks, system: System) -> str:
    """Return the name under which a system opens a container."""
    for each in system.identities.volumes:
        if each.space_now == container.device:
            for name in each.lasting:
                if name.startswith("/dev/mapper/"):
                    return name.removeprefix("/dev/mapper/")
    return f"luks-{container.uuid}"
