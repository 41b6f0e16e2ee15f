"""What remetal recognises and carries as it is, byte by byte: whose own system has to open it again."""

from __future__ import annotations

_WORDS = {
    "BitLocker": "encrypted by Windows; after a restore onto other hardware it asks for its recovery key",
    "DM_integrity": "a dm-integrity device",
    "DM_snapshot_cow": "the store of a device-mapper snapshot",
    "DM_verity_hash": "a dm-verity hash tree",
    "ReFS": "a Windows file system that only Windows reads",
    "VMFS_volume_member": "a VMware datastore",
    "apfs": "an Apple file system",
    "bcache": "one half of a bcache; back up and restore backing and caching device together",
    "bcachefs": "one device of a bcachefs; back up and restore all of its devices together",
    "cs_fvault2": "encrypted by Apple FileVault",
    "ddf_raid_member": "a member of a RAID that the controller's firmware defines; restore all members together",
    "drbd": "a replicated device; its peer will want to synchronise after a restore",
    "isw_raid_member": "a member of an Intel RAID; restore all members together, onto disks of the same size",
    "mpath_member": "one path of a multipath disk",
    "stratis": "a device of a Stratis pool; back up and restore all of its devices together",
    "vdo": "a deduplicating VDO device",
    "zfs_member": "a device of a ZFS pool; back up and restore all of its devices together",
}


def describe(kind: str) -> str:
    """Return `: ` and what an administrator should know about content of this type, as blkid names it; or nothing."""
    return f": {_WORDS[kind]}" if kind in _WORDS else ""
