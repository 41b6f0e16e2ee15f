"""`remetal backup`: capture disks into a snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Group, Parameter

from remetal.applications.settings import HOOKS, find_hooks
from remetal.cli.luks_options import LuksKeyFiles, LuksPassphrases, find_asker, read_luks_keys
from remetal.cli.options import Output, Repo
from remetal.cli.output import print_result, reporting
from remetal.cli.tables import escape, new_table
from remetal.errors import UsageError
from remetal.ids import short
from remetal.image.snapshots import Policy, Way
from remetal.storage import parse_rate
from remetal.system.priority import IoClass
from remetal.units import format_bytes, format_duration, format_rate
from remetal.workflows.backup import FREEZE_LIMIT, BackupRequest, Limits, back_up

_WAYS: Mapping[Way, str] = {
    "snapshot": "from an LVM snapshot",
    "tracked": "while in use, then held still for what was written",
    "held": "while in use, then held still and read again",
    "read-only": "while read-only",
    "at rest": "at rest",
}


@Parameter(name="*", group=Group("Limits", sort_key=50))
@dataclass(frozen=True)
class Gentle:
    """How much of the machine a backup leaves to others."""

    limit_read: Annotated[
        str | None,
        Parameter(
            name="--limit-read", metavar="RATE", help="Read no more than this a second from all disks, such as 50M."
        ),
    ] = None
    limit_rate: Annotated[
        str | None,
        Parameter(
            name="--limit-rate",
            metavar="RATE",
            help="Exchange no more than this a second with the repository, such as 10M. Default: REMETAL_LIMIT_RATE.",
        ),
    ] = None
    nice: Annotated[
        int | None,
        Parameter(name="--nice", metavar="N", help="Take processor time behind others: 0 (normal) to 19 (last)."),
    ] = None
    ionice: Annotated[
        IoClass | None,
        Parameter(
            name="--ionice",
            help="Take disk time behind others: low, or idle, where the disk's scheduler heeds it (bfq does).",
        ),
    ] = None

    def limits(self) -> Limits:
        """Return what is meant. Raises UsageError."""
        if self.nice is not None and not 0 <= self.nice <= 19:
            raise UsageError(f"--nice is {self.nice}", hint="Give 0 (normal) to 19 (behind all others).")
        return Limits(
            read=None if self.limit_read is None else parse_rate(self.limit_read, "--limit-read"),
            store=None if self.limit_rate is None else parse_rate(self.limit_rate, "--limit-rate"),
            nice=self.nice,
            disk=self.ionice,
        )


def backup(
    *,
    repo: Repo,
    disk: Annotated[
        tuple[Path, ...],
        Parameter(
            name=["--disk", "-d"],
            help="Capture this disk or disk file; may be repeated. Default: every disk the running system uses.",
            metavar="PATH",
            negative="",
        ),
    ] = (),
    machine: Annotated[
        str | None,
        Parameter(name="--machine", help="The machine's name. Default: this host's name.", metavar="NAME"),
    ] = None,
    tag: Annotated[
        tuple[str, ...],
        Parameter(name=["--tag", "-t"], help="A word kept with the snapshot; may be repeated.", negative=""),
    ] = (),
    luks_passphrase_file: LuksPassphrases = (),
    luks_key_file: LuksKeyFiles = (),
    escrow_luks_keys: Annotated[
        bool,
        Parameter(
            name="--escrow-luks-keys",
            negative="",
            help="Store the volume keys of LUKS containers, too, sealed to the repository's recipients: a restore then "
            "opens them without a passphrase.",
        ),
    ] = False,
    leave_out: Annotated[
        tuple[Path, ...],
        Parameter(
            name="--leave-out",
            help="Leave out the content of this file, or of all files in this folder, as it is mounted now; may be "
            "repeated.",
            metavar="PATH",
            negative="",
        ),
    ] = (),
    keep_all: Annotated[
        bool,
        Parameter(name="--keep-all", negative="", help="Leave nothing out but what --leave-out names."),
    ] = False,
    freeze_limit: Annotated[
        float,
        Parameter(
            name="--freeze-limit",
            metavar="SECONDS",
            help="Hold mounted file systems still for no longer than this; the backup fails rather than they wait.",
        ),
    ] = FREEZE_LIMIT,
    lvm_snapshots: Annotated[
        Policy,
        Parameter(
            name="--lvm-snapshots",
            help="Read mounted logical volumes from LVM snapshots: thin ones, all that their group has room for, or "
            "none.",
        ),
    ] = "thin",
    gentle: Gentle = Gentle(),
    hooks: Annotated[
        Path | None,
        Parameter(
            name="--hooks",
            metavar="FILE",
            help=f"Make applications ready for the moment as this file says. Default: {HOOKS}, if it is there.",
        ),
    ] = None,
    no_hooks: Annotated[
        bool, Parameter(name="--no-hooks", negative="", help="Make none ready, whatever that file says.")
    ] = False,
    output: Output = Output(),
) -> None:
    """Capture whole disks into a new snapshot: partitions, boot code, and the used blocks of every file system.

    Only blocks that the repository does not hold yet are stored. No passphrase is needed, and none would help: the
    machine can add to its backups but cannot read them.

    An ext4, XFS or btrfs may be in use, on whatever it stands: it is read while it is, and then held still (frozen)
    for a moment, together with all others, in which what was written meanwhile is read again. A small vfat is made
    read-only for that moment. The repository must not lie on any of them. Other kinds must be unmounted or mounted
    read-only.

    Of the running system, swap files (but for their headers), /tmp, /var/tmp and the caches of package managers are
    left out, and of an NTFS at rest the page files and the hibernation file: they come back with their sizes, without
    their content.
    Applications can be made ready for that moment, and programs be told of it (`--hooks`): see
    docs/how-to/applications.md.

    RAID arrays and LVM volume groups are opened for reading, and so are LUKS containers for which there is a key, or
    which are open already. On a terminal the passphrases of others are asked for. A LUKS container that nobody can
    open is captured as it is, encrypted and whole.

    Example: `remetal backup --repo /mnt/usb/backup --disk /dev/sda`
    """
    if hooks is not None and no_hooks:
        raise UsageError("--hooks and --no-hooks exclude one another")
    if not 0 < freeze_limit < inf:
        raise UsageError(f"--freeze-limit is {freeze_limit:g}", hint="Give a number of seconds above 0, such as 10.")
    with reporting(output) as report:
        request = BackupRequest(
            repository=repo,
            disks=disk,
            machine=machine,
            tags=tag,
            keys=read_luks_keys(luks_passphrase_file, luks_key_file),
            escrow=escrow_luks_keys,
            leave_out=leave_out,
            keep_all=keep_all,
            freeze_limit=freeze_limit,
            limits=gentle.limits(),
            hooks=None if no_hooks else hooks or find_hooks(),
            lvm_snapshots=lvm_snapshots,
        )
        result = back_up(request, report, ask=find_asker("capture it as it is, encrypted and whole"))
    snapshot = result.snapshot
    record = {
        "snapshot": snapshot.id,
        "machine": snapshot.machine,
        "machine_id": snapshot.machine_id,
        "sequence": snapshot.sequence,
        "time": snapshot.time,
        "used": result.used,
        "stored": result.stored,
        "seconds": round(result.seconds, 3),
        "left_out": msgspec.to_builtins(snapshot.left_out),
        "pause": None if result.pause is None else round(result.pause, 3),
        "volumes": [asdict(each) for each in result.volumes],
    }
    paused = "" if result.pause is None else f" File systems were held still for {result.pause:.1f} s."
    table = new_table("volume", "holds", ">in use", "read")
    for each in result.volumes:
        table.add_row(escape(each.volume), escape(each.kind), format_bytes(each.used), _WAYS[each.way])
    print_result(
        output,
        record,
        *([table] if result.pause is not None else []),
        f"Snapshot {short(snapshot.id)} of {escape(snapshot.machine)}: {format_bytes(result.used)} captured in "
        f"{format_duration(result.seconds)} ({format_rate(result.used, result.seconds)}), "
        f"{format_bytes(result.stored)} newly stored.{paused}",
        lost=f"The backup is complete: snapshot {snapshot.id}.",
    )
