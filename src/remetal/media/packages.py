"""What the recovery system is made of: everything that an administrator reaches for at three in the morning."""

from __future__ import annotations

_STORAGE = """
    btrfs-progs cryptsetup-bin dmsetup dosfstools e2fsprogs exfatprogs f2fs-tools fdisk gdisk lvm2 mdadm mtools ntfs-3g
    parted partclone rsync thin-provisioning-tools xfsprogs
"""
_BOOT = """
    efibootmgr grub-efi-amd64-bin grub-efi-amd64-signed grub-pc-bin grub2-common shim-signed
"""
_SYSTEM = """
    busybox-static kbd console-data kmod libarchive-tools procps psmisc python3 udev
"""
_NETWORK = """
    ca-certificates curl iproute2 iputils-ping netbase openssh-client
"""
_RESCUE = """
    acl attr dmidecode file gddrescue hdparm less lsscsi nano nvme-cli pciutils smartmontools usbutils
    xz-utils zstd
"""
_KERNEL = {"debian": "linux-image-amd64", "ubuntu": "linux-image-generic"}

NEVER_INSTALLED = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/lib/firmware/*",
    "/lib/firmware/*",
)
"""Paths that dpkg leaves out of the recovery system."""

LEFT_OUT = (
    "boot/*",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/share/perl",
    "usr/share/perl5",
    "usr/share/zoneinfo",
    "var/cache/*",
    "var/lib/apt/lists/*",
    "var/log/*",
    *(
        f"usr/lib/modules/*/kernel/{folder}"
        for folder in (
            "drivers/bluetooth",
            "drivers/gpu",
            "drivers/iio",
            "drivers/isdn",
            "drivers/media",
            "drivers/net/wireless",
            "drivers/staging",
            "net/bluetooth",
            "net/mac80211",
            "sound",
        )
    ),
)
"""What the image of the recovery system does without. Graphics drivers blank the firmware's own console when their
firmware files are missing, and wireless ones do nothing without theirs; the rest plays no part in a recovery."""


def recovery_packages(distribution: str) -> tuple[str, ...]:
    """Return the names of the packages for `debian` or `ubuntu`, the kernel first."""
    names = f"{_STORAGE} {_BOOT} {_SYSTEM} {_NETWORK} {_RESCUE}".split()
    return (_KERNEL[distribution], *sorted(names))
