"""`remetal backup`: capture disks into a snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from remetal.cli.luks_options import LuksKeyFiles, LuksPassphrases, find_asker, read_luks_keys
from remetal.cli.options import Output, Repo
from remetal.cli.output import print_result, reporting
from remetal.cli.tables import escape
from remetal.ids import short
from remetal.units import format_bytes, format_duration, format_rate
from remetal.workflows.backup import BackupRequest, back_up


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
    output: Output = Output(),
) -> None:
    """Capture whole disks into a new snapshot: partitions, boot code, and the used blocks of every file system.

    Only blocks that the repository does not hold yet are stored. No passphrase is needed, and none would help: the
    machine can add to its backups but cannot read them. Volumes must be unmounted or mounted read-only.

    RAID arrays and LVM volume groups are opened for reading, and so are LUKS containers for which there is a key, or
    which are open already. On a terminal the passphrases of others are asked for. A LUKS container that nobody can
    open is captured as it is, encrypted and whole.

    Example: `remetal backup --repo /mnt/usb/backup --disk /dev/sda`
    """
    with reporting(output) as report:
        request = BackupRequest(
            repository=repo,
            disks=disk,
            machine=machine,
            tags=tag,
            keys=read_luks_keys(luks_passphrase_file, luks_key_file),
            escrow=escrow_luks_keys,
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
    }
    print_result(
        output,
        record,
        f"Snapshot {short(snapshot.id)} of {escape(snapshot.machine)}: {format_bytes(result.used)} captured in "
        f"{format_duration(result.seconds)} ({format_rate(result.used, result.seconds)}), "
        f"{format_bytes(result.stored)} newly stored.",
        lost=f"The backup is complete: snapshot {snapshot.id}.",
    )
