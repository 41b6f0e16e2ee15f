"""Restoring a machine: snapshot + targets → plan → confirm → layers → images → growth → adaptation.

Planning touches nothing, and everything that can fail without a write is checked by it. Applying carries out the
very plan that was shown; each of its steps may be repeated, so an interrupted restore goes on by running again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import msgspec.structs

from remetal.adapt import Adaptation, adapt_system
from remetal.errors import RefusedError, RemetalError, UnfinishedError, UsageError
from remetal.events import Note, Report, Step, silent
from remetal.image.restore import Written, restore_image, verify_image
from remetal.layout.apply import apply_step, need_step_programs
from remetal.layout.disks import find_disks
from remetal.layout.inventory import probe_inventory
from remetal.layout.matching import match_targets
from remetal.layout.model import FileSystem, Layout, SpaceId, Swap, decode_layout
from remetal.layout.plan import ImageFacts, Plan, PlanOptions, Target, WriteImage, plan_restore
from remetal.layout.targets import probe_target
from remetal.layout.uses import describe_use, is_same_disk
from remetal.repository import RecipientKey, Repository, Snapshot, open_reader
from remetal.storage import find_folder
from remetal.system.blockdev import Span, is_block_device
from remetal.system.loop import need_loops
from remetal.system.mounts import find_mount_of
from remetal.workflows.access import (
    Secret,
    open_records,
    opened_repository,
    select_snapshot,
    unlock,
)


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """What to restore, and where to.

    `mapping` holds `SOURCE=TARGET` for disks, or one `TARGET` where the snapshot has one disk; disks that it does
    not name are matched by their identity. `only` limits the restore to these source disks; empty means all.
    """

    repository: str
    snapshot: str = "latest"
    machine: str | None = None
    mapping: tuple[str, ...] = ()
    keep_sizes: bool = False
    only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan and everything that applying it needs. `key` is None where no secret was given: then it only shows."""

    repository: Repository
    key: RecipientKey | None
    snapshot: Snapshot
    layout: Layout
    plan: Plan
    targets: Mapping[str, Path]


@dataclass(slots=True)
class RestoreReport:
    """What a restore did; bytes of the targets, seconds."""

    plan: str
    snapshot: str
    volumes: dict[SpaceId, Written] = field(default_factory=dict)
    structure_written: int = 0
    adaptation: Adaptation | None = None
    verified: bool = False
    seconds: float = 0.0

    @property
    def written(self) -> int:
        """All bytes that were written, structures and adaptation included."""
        adapted = self.adaptation.bytes_written if self.adaptation else 0
        return sum(each.written for each in self.volumes.values()) + self.structure_written + adapted


@contextmanager
def prepared_restore(
    request: RestoreRequest, secret: Secret | None = None, report: Report = silent
) -> Iterator[Prepared]:
    """Compute the plan of a restore for the length of a block; nothing is touched.

    Without a secret the plan can be read but not applied. Raises RefusedError if the restore is impossible or
    unsafe, UsageError if the request names what does not exist, DamagedError if the repository lacks data.
    """
    with opened_repository(request.repository) as repository:
        key = unlock(repository, secret) if secret is not None else None
        snapshots = [each for catalog in open_records(repository, key) for each in catalog.snapshots()]
        snapshot = select_snapshot(snapshots, request.snapshot, request.machine)
        layout = _limited(decode_layout(snapshot.layout), request.only)
        mapping = parse_mapping(request.mapping, layout)
        targets = _find_targets(layout, mapping, request.repository)
        images = {
            image.volume: ImageFacts(size=image.size, used=image.used, digest=image.digest) for image in snapshot.images
        }
        report(Step(f"Planning the restore of {snapshot.machine}, taken {snapshot.time}"))
        plan = plan_restore(
            layout,
            {volume.on: _facts(images, volume.on) for volume in layout.captured()},
            targets,
            snapshot=snapshot.id,
            options=PlanOptions(keep_sizes=request.keep_sizes),
        )
        need_step_programs(plan.steps)
        if key is not None:
            wanted = {volume.on for volume in layout.captured()}
            reader = open_reader(repository, key, snapshot)
            reader.verify_present([image for image in snapshot.images if image.volume in wanted])
        yield Prepared(
            repository,
            key,
            snapshot,
            layout,
            plan,
            {name: Path(target.path) for name, target in targets.items()},
        )


def apply_restore(
    prepared: Prepared, *, verify: bool = False, adapt: bool = True, report: Report = silent
) -> RestoreReport:
    """Carry out a prepared plan: structures, images, growth, adaptation, and on request a second reading.

    Raises UnfinishedError for whatever goes wrong after the first write; the same command then goes on.
    """
    if prepared.key is None:
        raise RefusedError("a restore needs the repository's passphrase or its recovery kit")
    if any(isinstance(volume, FileSystem | Swap) for volume in prepared.layout.volumes()):
        need_loops()
    began = time.monotonic()
    result = RestoreReport(plan=prepared.plan.id, snapshot=prepared.snapshot.id)
    try:
        _write(prepared, prepared.key, result, report)
        if verify:
            _verify(prepared, prepared.key, report)
            result.verified = True
        if adapt:
            report(Step("Fitting the restored system to this hardware"))
            result.adaptation = adapt_system(
                prepared.layout,
                prepared.plan.result,
                prepared.targets,
                firmware=_own_firmware(prepared),
                report=report,
            )
    except UnfinishedError:
        raise
    except RemetalError as error:
        raise UnfinishedError(error.message, hint=_go_on(error.hint)) from error
    except KeyboardInterrupt as error:
        raise UnfinishedError("the restore was interrupted", hint=_go_on("")) from error
    except Exception as error:
        raise UnfinishedError(
            f"an error in remetal itself: {type(error).__name__}: {error}",
            hint=_go_on("If it comes again, report what --debug prints."),
        ) from error
    result.seconds = time.monotonic() - began
    return result


def parse_mapping(words: tuple[str, ...], layout: Layout) -> dict[str, Path]:
    """Return source disk name → target path from `SOURCE=TARGET` words, or the one word `TARGET`.

    Raises UsageError for unknown or doubled disks.
    """
    names = [disk.name for disk in layout.disks]
    mapping: dict[str, Path] = {}
    for word in words:
        source, equals, target = word.partition("=")
        if not equals:
            if len(names) != 1:
                raise UsageError(
                    f"--map {word} does not say for which disk; the snapshot has {', '.join(names)}",
                    hint=f"Write --map {names[0]}={word}.",
                )
            source, target = names[0], word
        if source not in names:
            raise UsageError(f"the snapshot has no disk '{source}'", hint=f"Its disks: {', '.join(names)}.")
        if source in mapping or not target:
            raise UsageError(f"--map must name disk '{source}' once, and a target for it")
        mapping[source] = Path(target)
    return mapping


def _limited(layout: Layout, only: tuple[str, ...]) -> Layout:
    if not only:
        return layout
    names = [disk.name for disk in layout.disks]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UsageError(f"the snapshot has no disk '{unknown[0]}'", hint=f"Its disks: {', '.join(names)}.")
    return msgspec.structs.replace(
        layout,
        disks=tuple(disk for disk in layout.disks if disk.name in only),
        layers=tuple(layer for layer in layout.layers if layer.on.partition(":")[0] in only),
    )


def _find_targets(layout: Layout, mapping: dict[str, Path], repository: str) -> dict[str, Target]:
    """Return a target for every source disk: those that the user mapped, the others by identity."""
    targets = {
        name: _with_roles(probe_target(path, size_if_missing=layout.disk(name).size), repository)
        for name, path in mapping.items()
    }
    for (one, first), (other, second) in combinations(mapping.items(), 2):
        if is_same_disk(first, second):
            raise RefusedError(
                f"{one} and {other} would both go to one disk: {first} and {second} are the same",
                hint="Map each to its own disk.",
            )
    rest = [disk for disk in layout.disks if disk.name not in mapping]
    if rest:
        taken = {target.path for target in targets.values()}
        candidates = [
            _with_roles(probe_target(path, size_if_missing=0), repository)
            for path in find_disks()
            if str(path) not in taken
        ]
        targets |= match_targets(rest, candidates)
    return targets


def _with_roles(target: Target, repository: str) -> Target:
    """Mark a target that holds the repository, so that the plan refuses it."""
    place = find_folder(repository)
    if place is None:
        return target
    path = Path(target.path).resolve()
    mount = str(find_mount_of(place).target)
    holds = path.is_relative_to(place) or any(
        use.what == "mount" and use.where == mount for use in describe_use(path) if path.exists()
    )
    return msgspec.structs.replace(target, roles=(*target.roles, "holds the repository")) if holds else target


def _facts(images: Mapping[SpaceId, ImageFacts], volume: SpaceId) -> ImageFacts:
    if volume not in images:
        raise RefusedError(f"the snapshot has no image of volume '{volume}'", hint="Choose another snapshot.")
    return images[volume]


def _write(prepared: Prepared, key: RecipientKey, result: RestoreReport, report: Report) -> None:
    reader = open_reader(prepared.repository, key, prepared.snapshot)
    images = {image.volume: image for image in prepared.snapshot.images}
    for step in prepared.plan.steps:
        if isinstance(step, WriteImage):
            report(Step(f"Restoring {step.volume}"))
            span = Span(prepared.targets[step.disk], step.start, step.size)
            result.volumes[step.volume] = restore_image(
                reader, images[step.volume], span, part=step.volume, report=report
            )
        else:
            result.structure_written += apply_step(step, prepared.targets, report=report)


def _verify(prepared: Prepared, key: RecipientKey, report: Report) -> None:
    reader = open_reader(prepared.repository, key, prepared.snapshot)
    images = {image.volume: image for image in prepared.snapshot.images}
    for step in prepared.plan.steps:
        if isinstance(step, WriteImage) and step.volume not in prepared.plan.grown:
            report(Step(f"Reading {step.volume} back"))
            span = Span(prepared.targets[step.disk], step.start, step.size)
            differing = verify_image(reader, images[step.volume], span, part=step.volume, report=report).written
            if differing:
                raise UnfinishedError(
                    f"{differing} bytes of {step.volume} read back differently than they were written",
                    hint=f"The disk {span.path} may be failing: look at `dmesg` and `smartctl -a {span.path}`.",
                )
    report(Note("every restored volume reads back as it was captured"))


def _own_firmware(prepared: Prepared) -> str | None:
    """Return this machine's firmware if the targets are its own disks, None for disk files."""
    if all(is_block_device(path) for path in prepared.targets.values()):
        return probe_inventory().firmware
    return None


def _go_on(hint: str) -> str:
    return f"{hint} Run the same command again: it goes on where it stopped.".strip()
