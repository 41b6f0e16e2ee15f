"""Restoring a machine: snapshot + targets → plan → confirm → layers → images → growth → adaptation.

Planning touches nothing, and everything that can fail without a write is checked by it. Applying carries out the
very plan that was shown; each of its steps may be repeated, so an interrupted restore goes on by running again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import msgspec.structs

from remetal.adapt import Adaptation, adapt_system
from remetal.adapt.kernels.adapt import AS_USUAL, KernelChoices
from remetal.adapt.kernels.bootability import Outcome
from remetal.adapt.kernels.drivers import Drivers, opened_drivers
from remetal.adapt.kernels.predict import Prediction, predict_systems
from remetal.adapt.kernels.survey import Hardware
from remetal.adapt.network import Network
from remetal.errors import RefusedError, RemetalError, UnfinishedError, UsageError
from remetal.events import Note, Report, Step, Warn, silent
from remetal.image.copy import restore_files
from remetal.image.restore import Written, read_image, restore_image, verify_image
from remetal.image.shrink import Shrinking, restore_shrunk
from remetal.layout.apply import Site, apply_step, need_no_twins, need_step_programs, opened_site
from remetal.layout.disks import find_disks
from remetal.layout.inventory import probe_inventory
from remetal.layout.keys import Key
from remetal.layout.layers import luks
from remetal.layout.machine import read_machine, select_target, targets_of_machine
from remetal.layout.matching import HOLDS_REPOSITORY, IS_PROTECTED, match_targets
from remetal.layout.model import GptTable, Layout, Luks, MbrTable, Raw, SpaceId, spaces_of
from remetal.layout.partial import check_choice
from remetal.layout.plan import ImageFacts, Plan, PlanOptions, Target, plan_restore
from remetal.layout.record import decode_layout
from remetal.layout.sameness import are_paths
from remetal.layout.steps import CopyFiles, OpenContainer, ShrinkFileSystem, WriteBootCode, WriteImage, images_in
from remetal.layout.targets import probe_target
from remetal.layout.uses import describe_use, is_same_disk
from remetal.repository.reader import Reader, open_reader
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import Repository, open_repository
from remetal.repository.snapshots import ImageRecord, Snapshot
from remetal.system.blockdev import Span, is_block_device
from remetal.system.loop import need_loops
from remetal.system.mounts import find_mount_of
from remetal.workflows.access import (
    Secret,
    find_local_keys,
    local_problems,
    open_records,
    select_snapshot,
    unlock,
)
from remetal.workflows.bootability import read_inventory, shown_images
from remetal.workflows.leftout import with_left_out
from remetal.workflows.network import network_of, with_nics
from remetal.workflows.passphrases import AskPassphrase, ask_for_key
from remetal.workflows.stores import opened_store

_TOLD = 5
"""Of so many problems with the history everybody is told who restores from it."""


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """What to restore, and where to.

    `mapping` holds `SOURCE=TARGET` for disks, or one `TARGET` where the snapshot has one disk; disks that it does
    not name are matched by their identity. `overwrite` are targets that are named a second time, because what is on
    them, and not in the snapshot, may be lost. `only` limits the restore to these source disks or volumes; empty means
    all. `keep` are volumes that stay as they are on the target, `protect` paths of disks that must not be written to.
    `onto` is the record of another machine (`remetal probe --json`): the plan is made for that one, and only shows.
    `inventory` is the record of the machine that disk files are for, `drivers` a folder of drivers to add to the
    system; with `regenerate` its own programs make every initramfs anew at once.
    """

    repository: str
    snapshot: str = "latest"
    machine: str | None = None
    mapping: tuple[str, ...] = ()
    keep_sizes: bool = False
    only: tuple[str, ...] = ()
    grow: tuple[SpaceId, ...] = ()
    without: tuple[str, ...] = ()
    dissolve: tuple[SpaceId, ...] = ()
    overwrite: tuple[str, ...] = ()
    keep: tuple[SpaceId, ...] = ()
    protect: tuple[str, ...] = ()
    keys: tuple[Key, ...] = ()
    onto: str | None = None
    inventory: Path | None = None
    drivers: Path | None = None
    regenerate: bool = False
    nics: tuple[str, ...] = ()
    """`OLD=NEW`: which network card of the captured machine becomes which one of the target."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan and everything that applying it needs.

    `key` is None where no secret was given, or where the targets are those of a recorded machine: then it only shows.
    """

    repository: Repository
    key: RecipientKey | None
    snapshot: Snapshot
    layout: Layout
    plan: Plan
    targets: Mapping[str, Path]
    keys: tuple[Key, ...] = ()
    """What opens the encrypted containers: one for each."""
    hardware: Hardware | None = None
    """What the restored system is to run on; None if that is not known."""
    systems: tuple[Prediction, ...] | None = None
    """What will become of each installed system on that hardware; None if that was not looked at."""
    kernels: KernelChoices = AS_USUAL
    network: Network | None = None


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
    request: RestoreRequest,
    secret: Secret | None = None,
    report: Report = silent,
    *,
    ask: AskPassphrase | None = None,
) -> Iterator[Prepared]:
    """Compute the plan of a restore for the length of a block; nothing is touched.

    Without a secret the plan can be read but not applied. `ask` is called for encrypted containers that no key in the
    request opens. Raises RefusedError if the restore is impossible or
    unsafe, UsageError if the request names what does not exist, DamagedError if the repository lacks data.
    """
    with opened_drivers(request.drivers) as drivers, opened_store(request.repository, read_only=True) as opened:
        repository = open_repository(opened.store)
        key = unlock(repository, secret) if secret is not None else None
        catalogs = open_records(repository, key)
        snapshots = [each for catalog in catalogs for each in catalog.snapshots()]
        problems = [problem for catalog in catalogs for problem in catalog.problems]
        if not snapshots:
            problems += local_problems(repository, find_local_keys(repository))
        snapshot = select_snapshot(snapshots, request.snapshot, request.machine, catalogs[0].retired, problems)
        for problem in problems[:_TOLD]:
            report(Warn(problem, "Run `remetal check` to see all that is wrong."))
        whole = decode_layout(snapshot.layout)
        disks = {disk.name for disk in whole.disks}
        layout = _limited(whole, request.only)
        mapping = parse_mapping(request.mapping, layout)
        recorded = None if request.onto is None else read_machine(Path(request.onto))
        targets = _find_targets(layout, mapping, request, recorded, opened.folder, report)
        images = {
            image.volume: ImageFacts(size=image.size, used=image.used, digest=image.digest) for image in snapshot.images
        }
        report(Step(f"Planning the restore of {snapshot.machine}, taken {snapshot.time}"))
        plan = plan_restore(
            layout,
            {each.volume: _facts(images, each.volume) for each in layout.captured()},
            targets,
            snapshot=snapshot.id,
            options=PlanOptions(
                keep_sizes=request.keep_sizes,
                grow=request.grow,
                without=request.without,
                dissolve=request.dissolve,
                only=tuple(each for each in request.only if each not in disks),
                keep=request.keep,
            ),
            overwrite=[str(Path(path).resolve()) for path in request.overwrite],
        )
        plan = with_left_out(plan, snapshot)
        hardware = _find_hardware(request, targets, recorded)
        nics = hardware.inventory.nics if hardware is not None else None
        plan = with_nics(plan, whole, nics, request.nics)
        if request.onto is None:
            need_step_programs(plan.steps)
            need_no_twins(plan.steps, [Path(target.path) for target in targets.values()])
        keys: tuple[Key, ...] = ()
        if hardware is None and (request.drivers is not None or request.regenerate):
            raise UsageError(
                "drivers are fitted to a machine, and nobody said for which one the disk files are",
                hint="Add --inventory FILE, made on that machine by `remetal probe --json > FILE`.",
            )
        systems = None
        if key is not None:
            wanted = {each.image for step in plan.steps for each in images_in(step)}
            reader = open_reader(repository, key, snapshot, report=report)
            reader.verify_present([image for image in snapshot.images if image.volume in wanted])
            keys = _find_keys(plan, snapshot, reader, request.keys, ask)
            systems = _predict(reader, snapshot, layout, plan, hardware, drivers, report)
        yield Prepared(
            repository,
            key if request.onto is None else None,
            snapshot,
            layout,
            plan,
            {name: Path(target.path) for name, target in targets.items()},
            keys,
            hardware,
            systems,
            KernelChoices(drivers, request.regenerate),
            network_of(plan, whole, nics),
        )


def apply_restore(
    prepared: Prepared,
    *,
    verify: bool = False,
    adapt: bool = True,
    even_unbootable: bool = False,
    report: Report = silent,
) -> RestoreReport:
    """Carry out a prepared plan: structures, images, growth, adaptation, and on request a second reading.

    Raises RefusedError, with nothing touched, if no kernel of an installed system would boot on the hardware, unless
    `even_unbootable`; UnfinishedError for whatever goes wrong after the first write; the same command then goes on.
    """
    if prepared.key is None:
        raise RefusedError("a restore needs the repository's passphrase or its recovery kit")
    if any(not isinstance(layer, (GptTable, MbrTable, Raw)) for layer in prepared.layout.layers):
        need_loops()
    if adapt and not even_unbootable:
        _need_bootable(prepared.systems or ())
    began = time.monotonic()
    result = RestoreReport(plan=prepared.plan.id, snapshot=prepared.snapshot.id)
    try:
        with opened_site(prepared.plan.result, prepared.targets, prepared.keys) as site:
            _write(prepared, prepared.key, site, result, report)
            if verify:
                _verify(prepared, prepared.key, site, report)
                result.verified = True
            if adapt:
                report(Step("Fitting the restored system to this hardware"))
                result.adaptation = adapt_system(
                    prepared.layout,
                    prepared.plan.result,
                    site.devices,
                    firmware=_own_firmware(prepared),
                    hardware=prepared.hardware,
                    kernels=prepared.kernels,
                    moved=prepared.plan.moved,
                    kept=_find_kept(prepared.plan),
                    network=prepared.network,
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
    """Return the layout of the disks that are chosen, or under chosen volumes.

    Raises RefusedError if a container reaches beyond them, UsageError if there is no such volume.
    """
    if not only:
        return layout
    chosen = only
    check_choice(layout, chosen, ())
    only = tuple({disk for space in chosen for disk in layout.disks_under(space)})
    kept = []
    for layer in layout.layers:
        disks = {disk for space in spaces_of(layer) for disk in layout.disks_under(space)}
        if disks & set(only):
            if disks - set(only):
                raise RefusedError(
                    f"what stands on {spaces_of(layer)[0]} reaches over the disks {', '.join(sorted(disks))}",
                    hint="Restore all of them.",
                )
            kept.append(layer)
    return msgspec.structs.replace(
        layout, disks=tuple(disk for disk in layout.disks if disk.name in only), layers=tuple(kept)
    )


def _find_targets(
    layout: Layout,
    mapping: dict[str, Path],
    request: RestoreRequest,
    machine: Layout | None,
    folder: Path | None,
    report: Report,
) -> dict[str, Target]:
    """Return a target for every source disk: those that the user mapped, the others by what they are.

    `machine` is the record of another machine, if its disks are meant; `folder` is where the repository lies, if it
    is on this one.
    """
    own = machine is None
    recorded = () if machine is None else targets_of_machine(machine)

    def look_at(path: Path, size: int) -> Target:
        if not own:
            return select_target(recorded, str(path))
        return _with_roles(probe_target(path, size_if_missing=size), request, folder)

    targets = {name: look_at(path, layout.disk(name).size) for name, path in mapping.items()}
    for (one, first), (other, second) in combinations(targets.items(), 2):
        if are_paths(first, second) or (own and is_same_disk(Path(first.path), Path(second.path))):
            raise RefusedError(
                f"{one} and {other} would both go to one disk: {first.path} and {second.path} are the same",
                hint="Map each to its own disk.",
            )
    if any(disk.name not in {*mapping, *request.without} for disk in layout.disks):
        taken = {target.path for target in targets.values()}
        places = find_disks() if own else [Path(target.path) for target in recorded]
        candidates = [look_at(path, 0) for path in places if str(path) not in taken]
        for name, match in match_targets(layout, candidates, mapped={*mapping, *request.without}).items():
            report(Note(f"{name} goes to {match.target.path}: {match.reason}"))
            targets[name] = match.target
    return targets


def _with_roles(target: Target, request: RestoreRequest, place: Path | None) -> Target:
    """Mark a target that holds the repository, or that its user protects, so that the plan refuses it."""
    if any(is_same_disk(Path(target.path), Path(path)) for path in request.protect):
        target = msgspec.structs.replace(target, roles=(*target.roles, IS_PROTECTED))
    if place is None:
        return target
    path = Path(target.path).resolve()
    mount = str(find_mount_of(place).target)
    holds = path.is_relative_to(place) or any(
        use.what == "mount" and use.where == mount for use in describe_use(path) if path.exists()
    )
    return msgspec.structs.replace(target, roles=(*target.roles, HOLDS_REPOSITORY)) if holds else target


def _facts(images: Mapping[SpaceId, ImageFacts], volume: SpaceId) -> ImageFacts:
    if volume not in images:
        raise RefusedError(f"the snapshot has no image of volume '{volume}'", hint="Choose another snapshot.")
    return images[volume]


def _find_keys(
    plan: Plan, snapshot: Snapshot, reader: Reader, keys: tuple[Key, ...], ask: AskPassphrase | None
) -> tuple[Key, ...]:
    """Return a key for every encrypted container, tried on its captured header; a person is asked where there is none.

    Raises RefusedError if one would stay closed, for then nothing could be written into it.
    """
    images = {image.volume: image for image in snapshot.images}
    headers = {step.volume: step.image for step in plan.steps if isinstance(step, WriteImage)}
    found = []
    for layer in (step.container for step in plan.steps if isinstance(step, OpenContainer)):
        if isinstance(layer, Luks):
            header = images[headers.get(layer.header, layer.header)]
            captured = msgspec.structs.replace(layer, on=header.volume.removesuffix(":header"))
            escrow = [Key(read_image(reader, images[captured.key]), captured.on, True)] if layer.escrowed else []
            first_bytes = read_image(reader, header)
            key = luks.find_key(captured, first_bytes, (*escrow, *keys))
            if key is None and ask is not None:
                key = ask_for_key(captured, first_bytes, ask)
                keys = keys if key is None else (*keys, key)
            if key is None:
                raise RefusedError(
                    f"no key was given that opens the LUKS container on {captured.on} (UUID {layer.uuid}), so its "
                    "content cannot be written",
                    hint=f"Give the passphrase of one of its key slots with --luks-passphrase-file {captured.on}=FILE, "
                    f"or its key file with --luks-key-file {captured.on}=FILE.",
                )
            found.append(dataclasses.replace(key, space=layer.on))
    return tuple(found)


def _write(prepared: Prepared, key: RecipientKey, site: Site, result: RestoreReport, report: Report) -> None:
    reader = open_reader(prepared.repository, key, prepared.snapshot, report=report)
    images = {image.volume: image for image in prepared.snapshot.images}
    for step in prepared.plan.steps:
        if isinstance(step, (WriteImage, CopyFiles)):
            report(Step(f"Restoring {step.volume}"))
            span = Span(site.devices[step.device], step.start, step.size)
            result.volumes[step.volume] = _bring(step, reader, images[step.image], span, report)
        elif isinstance(step, ShrinkFileSystem):
            report(Step(f"Restoring and shrinking {step.volume.on}"))
            result.volumes[step.volume.on] = _bring_shrunk(step, reader, images, site, report)
        else:
            result.structure_written += apply_step(step, site, report=report)


def _bring(step: WriteImage | CopyFiles, reader: Reader, image: ImageRecord, span: Span, report: Report) -> Written:
    """Bring an image onto its place: as blocks, or as what is in it."""
    match step:
        case WriteImage():
            return restore_image(reader, image, span, part=step.volume, report=report)
        case CopyFiles():
            return restore_files(reader, image, span, kind=step.type, part=step.volume, report=report)


def _bring_shrunk(
    step: ShrinkFileSystem, reader: Reader, images: Mapping[SpaceId, ImageRecord], site: Site, report: Report
) -> Written:
    """Bring the images of a file system's devices onto smaller ones."""
    devices = [
        Shrinking(
            part=each.volume,
            number=each.number,
            image=images[each.image],
            span=site.span(each.volume),
            before=each.before,
            size=each.size,
        )
        for each in step.parts
    ]
    return restore_shrunk(reader, devices, report=report)


def _verify(prepared: Prepared, key: RecipientKey, site: Site, report: Report) -> None:
    reader = open_reader(prepared.repository, key, prepared.snapshot, report=report)
    images = {image.volume: image for image in prepared.snapshot.images}
    grown = {space for each in prepared.plan.grown for space in _spaces_of_volume(prepared.plan.result, each)}
    for step in prepared.plan.steps:
        if isinstance(step, WriteImage) and step.volume not in grown:
            report(Step(f"Reading {step.volume} back"))
            span = Span(site.devices[step.device], step.start, step.size)
            differing = verify_image(reader, images[step.image], span, part=step.volume, report=report).written
            if differing:
                raise UnfinishedError(
                    f"{differing} bytes of {step.volume} read back differently than they were written",
                    hint=f"The disk {span.path} may be failing: look at `dmesg` and `smartctl -a {span.path}`.",
                )
    report(Note("every restored volume reads back as it was captured"))


def _spaces_of_volume(layout: Layout, space: SpaceId) -> tuple[SpaceId, ...]:
    layer = layout.layer_on(space)
    return spaces_of(layer) if layer is not None else (space,)


def _find_kept(plan: Plan) -> frozenset[SpaceId]:
    """Return what a plan leaves as it stands on the targets: volumes, and disks whose boot code it does not write."""
    written = {step.device for step in plan.steps if isinstance(step, WriteBootCode)}
    tables = {layer.on for layer in plan.result.layers if isinstance(layer, (GptTable, MbrTable))}
    return frozenset({fate.volume for fate in plan.fates if fate.action == "kept"} | (tables - written))


def _find_hardware(request: RestoreRequest, targets: Mapping[str, Target], recorded: Layout | None) -> Hardware | None:
    """Return what the restored system is to run on: the recorded machine, or this one if the targets are its disks."""
    names = {name: target.name for name, target in targets.items()}
    if request.inventory is not None:
        return Hardware(read_inventory(request.inventory))
    if recorded is not None:
        return None if recorded.inventory is None else Hardware(recorded.inventory, names)
    if all(not target.is_file for target in targets.values()):
        return Hardware(probe_inventory(), names)
    return None


def _predict(
    reader: Reader,
    snapshot: Snapshot,
    layout: Layout,
    plan: Plan,
    hardware: Hardware | None,
    drivers: Drivers,
    report: Report,
) -> tuple[Prediction, ...] | None:
    """Return what will become of the systems that a plan restores; None if nobody can tell."""
    if hardware is None:
        return None
    kept = _find_kept(plan)
    try:
        need_loops()
        with shown_images(reader, snapshot, layout, plan.result, moved=plan.moved, kept=kept) as shown:
            return predict_systems(shown, hardware, report, drivers)
    except RefusedError as error:
        report(Note(f"whether it will boot was not looked at: {error.message}"))
        return None


def _need_bootable(systems: Sequence[Prediction]) -> None:
    """Raise RefusedError if there are systems, and none of them would boot."""
    if not systems or any(each.outcome in {Outcome.BOOTS, Outcome.ADAPTED} for each in systems):
        return
    first = systems[0]
    why = first.problem or next((reason for kernel in first.kernels for reason in kernel.reasons), "")
    raise RefusedError(
        f"no kernel of {first.name} on {first.root} would boot there: {why}",
        hint="Give the drivers that it lacks with --drivers, or choose other hardware or an older snapshot. To restore "
        "what is there all the same, add --even-unbootable.",
    )


def _own_firmware(prepared: Prepared) -> str | None:
    """Return this machine's firmware if the targets are its own disks, None for disk files."""
    if all(is_block_device(path) for path in prepared.targets.values()):
        return probe_inventory().firmware
    return None


def _go_on(hint: str) -> str:
    return f"{hint} Run the same command again: it goes on where it stopped.".strip()
