"""How snapshots and keys look to a person, and as records for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import markup
from rich.console import RenderableType
from rich.table import Table

from remetal.cli.output import clean
from remetal.ids import short
from remetal.units import format_bytes, format_duration

if TYPE_CHECKING:
    from remetal.repository.prune import PruneResult
    from remetal.repository.repository import KeyInfo
    from remetal.repository.snapshots import Snapshot
    from remetal.workflows.retention import Decided


def escape(text: str) -> str:
    """Return text from a disk or a repository so that a terminal shows it and obeys nothing in it."""
    return markup.escape(clean(text))


def new_table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; columns that start with `>` hold numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return table


def snapshot_record(snapshot: Snapshot) -> dict[str, object]:
    """Return a snapshot as programs read it; sizes in bytes."""
    return {
        "id": snapshot.id,
        "machine": snapshot.machine,
        "machine_id": snapshot.machine_id,
        "sequence": snapshot.sequence,
        "time": snapshot.time,
        "hostname": snapshot.hostname,
        "tags": list(snapshot.tags),
        "used": sum(image.used for image in snapshot.images),
        "stored": sum(image.stored for image in snapshot.images),
        "images": [
            {"volume": image.volume, "size": image.size, "used": image.used, "stored": image.stored}
            for image in snapshot.images
        ],
        "left_out": [{"volume": each.volume, "path": each.path, "bytes": each.bytes} for each in snapshot.left_out],
        "version": snapshot.version,
    }


def snapshot_table(snapshots: Sequence[Snapshot]) -> RenderableType:
    """Return the list of snapshots, or a sentence where there is none."""
    if not snapshots:
        return "No snapshot yet."
    table = new_table("snapshot", "machine", "time (UTC)", ">used", ">stored", "volumes", "tags")
    for each in snapshots:
        table.add_row(
            short(each.id),
            escape(each.machine),
            moment(each.time),
            format_bytes(sum(image.used for image in each.images)),
            format_bytes(sum(image.stored for image in each.images)),
            escape(" ".join(image.volume for image in each.images)),
            escape(" ".join(each.tags)),
        )
    return table


def decided_table(decided: Sequence[Decided]) -> RenderableType:
    """Return what becomes of each snapshot, and why."""
    if not decided:
        return "No snapshot."
    table = new_table("snapshot", "machine", "time (UTC)", "tags", "kept because of")
    for each in decided:
        snapshot = each.snapshot
        because = escape(", ".join(each.reasons)) if each.reasons else "[red]forgotten[/red]"
        table.add_row(
            short(snapshot.id),
            escape(snapshot.machine),
            moment(snapshot.time),
            escape(" ".join(snapshot.tags)),
            because,
        )
    return table


def pruned_table(results: Sequence[PruneResult], *, dry_run: bool) -> RenderableType:
    """Return what a prune did to each machine, or would do."""
    if not results:
        return "No machine was pruned."
    table = new_table("machine", ">kept", ">to go" if dry_run else ">condemned", ">written anew", ">deleted", "next")
    for each in results:
        wait = f"deletes in {format_duration(each.grace_left)} or later" if each.grace_left else ""
        if each.retained_objects:
            wait = f"{each.retained_objects} objects are retained by the store; {wait}".rstrip("; ")
        table.add_row(
            escape(each.machine),
            format_bytes(each.kept_bytes),
            format_bytes(each.condemned_bytes),
            format_bytes(each.rewritten_bytes),
            format_bytes(each.deleted_bytes),
            wait,
        )
    return table


def snapshot_lines(snapshot: Snapshot) -> str:
    """Return the head of one snapshot's description."""
    tags = f", tags {' '.join(snapshot.tags)}" if snapshot.tags else ""
    return escape(
        f"Snapshot {snapshot.id}\nof {snapshot.machine} (machine {snapshot.machine_id}), number {snapshot.sequence}, "
        f"taken {moment(snapshot.time)} UTC on {snapshot.hostname} by remetal {snapshot.version}{tags}\n"
    )


def moment(time: str) -> str:
    """Return an ISO time without fractions and zone, as the tables show it."""
    return time[:19].replace("T", " ")


def key_table(keys: Sequence[KeyInfo]) -> Table:
    """Return recipients, passphrases and machines, one per line."""
    table = new_table("kind", "id", "made (UTC)", "about")
    for key in keys:
        about = f"opens recipient {short(key.of)}" if key.of else key.name
        if key.successor:
            about += f", followed by {short(key.successor)}"
        table.add_row(key.kind, short(key.id), moment(key.created), escape(about))
    return table
