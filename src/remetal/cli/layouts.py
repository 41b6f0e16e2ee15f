"""How layouts, plans and reports look to a person, and as records for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from rich.console import RenderableType
from rich.table import Table

from remetal.adapt.kernels.bootability import Outcome
from remetal.adapt.kernels.predict import Prediction
from remetal.adapt.network.matching import describe_nic, is_same_card
from remetal.cli.output import result_console
from remetal.cli.picture import draw_plan
from remetal.cli.tables import escape, moment, new_table
from remetal.ids import short
from remetal.layout.model import (
    FileSystem,
    GptTable,
    Inventory,
    Layout,
    Luks,
    MbrTable,
    MdArray,
    Raw,
    SpaceId,
    Swap,
    VolumeGroup,
    device_names,
    is_extended,
    spaces_of,
)
from remetal.layout.plan import Plan
from remetal.repository.snapshots import ImageRecord
from remetal.units import format_bytes, format_duration
from remetal.workflows.restore import Prepared, RestoreReport

_STYLE = {Outcome.BOOTS: "green", Outcome.ADAPTED: "yellow", Outcome.CANNOT: "red"}


def layout_table(layout: Layout, images: Sequence[ImageRecord] = ()) -> Table:
    """Return disks and what stands on them, one level deeper each time; with the sizes of captured images."""
    captured = {image.volume: image for image in images}
    table = new_table("space", ">start", ">size", "content", "label", "uuid", *((">used", ">stored") if images else ()))
    for space, depth in _spaces(layout):
        _, start, size = layout.place(space)
        content, label, uuid = describe_space(layout, space)
        row = [f"{'  ' * depth}{escape(space)}", format_bytes(start) if start else "", format_bytes(size)]
        row += [content, escape(label), escape(uuid)]
        if images:
            image = captured.get(space)
            row += [format_bytes(image.used), format_bytes(image.stored)] if image else ["", ""]
        table.add_row(*row)
    return table


def _spaces(layout: Layout) -> Iterator[tuple[SpaceId, int]]:
    """Yield every space and its depth: what a container provides stands below the first of its members."""
    for disk in layout.disks:
        yield from _spaces_from(layout, disk.name, 0)


def _spaces_from(layout: Layout, space: SpaceId, depth: int) -> Iterator[tuple[SpaceId, int]]:
    yield space, depth
    layer = layout.layer_on(space)
    match layer:
        case GptTable() | MbrTable():
            if layout.layer_on(f"{space}:boot") is not None:
                yield f"{space}:boot", depth + 1
            for partition in sorted(layer.partitions, key=lambda each: each.start):
                if is_extended(layer, partition):
                    yield f"{space}:{partition.number}", depth + 1
                else:
                    yield from _spaces_from(layout, f"{space}:{partition.number}", depth + 1)
        case MdArray() | VolumeGroup() | Luks() if spaces_of(layer)[0] == space:
            for name in device_names(layer):
                yield from _spaces_from(layout, name, depth + 1)
        case _:
            pass


def describe_space(layout: Layout, space: SpaceId) -> tuple[str, str, str]:
    """Return content, label and UUID of what is on a space."""
    match layout.layer_on(space):
        case GptTable() as table:
            return "GPT partition table", "", table.disk_guid
        case MbrTable() as table:
            return "MBR partition table", "", table.signature
        case MdArray() as array:
            return f"{array.level} of {array.slots}", array.name, array.uuid
        case VolumeGroup() as group:
            return "LVM volume group", group.name, group.uuid
        case Luks() as luks:
            return f"LUKS{luks.version}", luks.label, luks.uuid
        case FileSystem() as found:
            many = f" on {len(found.parts)} devices" if len(found.parts) > 1 else ""
            return f"{found.type}{many}", found.label, found.uuid
        case Swap() as swap:
            return "swap", swap.label, swap.uuid
        case Raw(type=kind):
            return (f"{escape(kind)}, whole" if kind else "unknown content, whole"), "", ""
        case _:
            return "empty", "", ""


def inventory_lines(inventory: Inventory) -> str:
    """Return a machine's hardware in two lines."""
    box = " ".join(part for part in (inventory.vendor, inventory.product) if part) or "unknown machine"
    nics = ", ".join(f"{nic.name} ({nic.mac}, {nic.driver or 'no driver'})" for nic in inventory.nics) or "no network"
    return escape(
        f"{box}: {inventory.cpu or inventory.architecture}, {inventory.cores} cores, "
        f"{format_bytes(inventory.memory)} memory, {inventory.firmware.upper()}\n{nics}\n"
    )


def predictions_record(systems: Sequence[Prediction]) -> list[dict[str, object]]:
    """Return what becomes of systems as programs read it."""
    return [
        {
            "root": each.root,
            "name": each.name,
            "outcome": None if each.outcome is None else each.outcome.value,
            "problem": each.problem,
            "notes": list(each.notes),
            "kernels": [msgspec.to_builtins(kernel) for kernel in each.kernels],
        }
        for each in systems
    ]


def predictions_view(systems: Sequence[Prediction]) -> list[RenderableType]:
    """Return what becomes of systems as a person reads it: a table of kernels, and the reasons below."""
    table = new_table("system", "kernel", "what becomes of it")
    said: list[str] = []
    for system in systems:
        place = f"{escape(system.name)} on {escape(system.root)}"
        if system.problem:
            table.add_row(place, "", f"[red]nothing can be told: {escape(system.problem)}[/red]")
        said += [escape(note) for note in system.notes]
        for kernel in system.kernels:
            style = _STYLE[kernel.outcome]
            table.add_row(place, escape(kernel.kernel), f"[{style}]{kernel.outcome.value}[/{style}]")
            said += [f"{escape(kernel.kernel)}: {escape(line)}" for line in (*kernel.reasons, *kernel.notes)]
            place = ""
    return [table, *(["", *said] if said else [])]


def plan_record(prepared: Prepared) -> dict[str, object]:
    """Return a plan as programs read it."""
    record: dict[str, object] = msgspec.to_builtins(prepared.plan)
    return record | {"systems": None if prepared.systems is None else predictions_record(prepared.systems)}


def plan_view(prepared: Prepared) -> list[RenderableType]:
    """Return a plan as a person reads it: targets, every volume's fate, notes, the id."""
    plan = prepared.plan
    targets = new_table("disk", "target", ">size", "on it now")
    for name, target in sorted(plan.targets.items()):
        hardware = " ".join(word for word in (target.model, target.serial) if word)
        place = f"{target.path} ({hardware})" if hardware else target.path
        now = "new file" if not target.exists else target.content or "blank"
        targets.add_row(escape(name), escape(place), format_bytes(target.size), escape(now))
    volumes = new_table("volume", "target", ">start", ">size", "content", "what happens")
    for fate in plan.fates:
        _, start, size = plan.result.place(fate.volume)
        content, label, _ = describe_space(plan.result, fate.volume)
        volumes.add_row(
            escape(fate.volume),
            escape(", ".join(plan.targets[name].path for name in sorted(plan.result.disks_under(fate.volume)))),
            format_bytes(start) if start else "",
            format_bytes(size),
            f"{content} {escape(label)}".strip(),
            escape(fate.text),
        )
    snapshot = prepared.snapshot
    head = escape(f"Restore of {snapshot.machine}, snapshot {short(snapshot.id)}, taken {moment(snapshot.time)} UTC\n")
    notes = [f"[yellow]{escape(text)}[/yellow]" for text in plan.warnings] + [escape(text) for text in plan.notes]
    about = f"about {format_duration(plan.seconds)}"
    tail = f"At most {format_bytes(plan.bytes_to_write)} to write, {about}. Plan [bold]{short(plan.id)}[/bold]\n"
    picture = [escape(line) for line in draw_plan(prepared.layout, plan, result_console().width)]
    systems = [*predictions_view(prepared.systems), ""] if prepared.systems else []
    return [head, targets, "", *picture, "", volumes, "", *systems, *_nics_view(plan), *notes, tail]


def _nics_view(plan: Plan) -> list[RenderableType]:
    """Return what becomes of the network cards; nothing where all of them are the same as before."""
    if all(each.now is not None and is_same_card(each.before, each.now) for each in plan.nics):
        return []
    table = new_table("network card", "becomes", "because")
    for each in plan.nics:
        now = describe_nic(each.now) if each.now is not None else "none"
        table.add_row(escape(describe_nic(each.before)), escape(now), escape(each.reason))
    return [table, ""]


def restore_lines(report: RestoreReport) -> str:
    """Return what a restore did, and every change that was made to fit the system to its hardware."""
    compared = sum(each.compared for each in report.volumes.values())
    took = format_duration(report.seconds)
    rest = f"{format_bytes(report.written)} written, the rest stood there already."
    lines = [f"Restored {format_bytes(compared)} in {took}: {rest}"]
    if report.adaptation is not None:
        lines += [f"changed {change.path}: {change.what}" for change in report.adaptation.changes]
        lines += list(report.adaptation.notes)
    if report.verified:
        lines.append("Every volume was read back and is as it was captured.")
    return escape("\n".join(lines))
