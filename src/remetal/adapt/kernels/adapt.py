"""Making the kernels of a restored system reach their root on the hardware that it stands on now.

What an initramfs lacks is put behind it; one file tells the system's own generator the same, so that the next kernel
has it, too. Where nothing is missing, nothing is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remetal.adapt.change import Adaptation, Change
from remetal.adapt.kernels.appended import find_files
from remetal.adapt.kernels.boot_files import BootFile, find_boot_folders
from remetal.adapt.kernels.bootability import Outcome
from remetal.adapt.kernels.configuration import plan_configuration, plan_naming
from remetal.adapt.kernels.drivers import NONE, Drivers, describe_misfits, install_drivers
from remetal.adapt.kernels.generators import SERVICE, SERVICE_LINK, DropIn, find_program, plan_drop_in, plan_service
from remetal.adapt.kernels.initramfs import Generator
from remetal.adapt.kernels.modules import list_versions
from remetal.adapt.kernels.regenerate import opened_to_run, regenerate_initramfs
from remetal.adapt.kernels.survey import INNER, Examined, Hardware, examine_kernels, find_firmware
from remetal.adapt.restored import Restored
from remetal.adapt.rooted import create_inside, find_file, find_inside, link_inside, read_inside
from remetal.adapt.roots import System, open_root
from remetal.adapt.text import TextPlan, diff_texts
from remetal.errors import RemetalError
from remetal.events import Report, Step, Warn
from remetal.ondisk.cpio import probe_end
from remetal.ondisk.cpio_write import encode_behind
from remetal.units import format_bytes

_SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")


@dataclass(frozen=True, slots=True)
class Addition:
    """What is put behind the initramfs of a kernel, and what is in it.

    That is modules, of which `loaded` are loaded by name, and `texts`, files that name the storage; `files` are all of
    them by their paths in it.
    """

    version: str
    generator: Generator
    file: str
    added: tuple[str, ...]
    loaded: tuple[str, ...]
    texts: tuple[TextPlan, ...]
    why: tuple[str, ...]
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class KernelChoices:
    """What an administrator has chosen: drivers to add, and whether each initramfs is made anew at once."""

    drivers: Drivers = NONE
    regenerate: bool = False


AS_USUAL = KernelChoices()


def adapt_kernels(
    system: System,
    restored: Restored,
    hardware: Hardware | None,
    report: Report,
    choices: KernelChoices = AS_USUAL,
) -> Adaptation:
    """Give each kernel of a restored system what it needs here, where that can be done; say what cannot.

    Where nothing is known of the hardware, each initramfs is only told how the storage is called now. If anything was
    put behind an initramfs, the system makes it anew by itself some time after its first boot. Raises RemetalError if a
    file system fails, has no room for the newest kernel's, or a program of the system fails that was asked for; every
    initramfs is whole then.
    """
    report(Step(f"Looking at the kernels of {system.name}"))
    done = _add_drivers(system, restored, choices.drivers, report)
    with open_root(system, restored, inner=INNER) as root:
        examined = examine_kernels(system, restored, root, hardware)
        additions = list(plan_additions(system, root, examined))
        notes = (*describe_misfits(choices.drivers, list_versions(root)), *describe_kernels(root, examined))
    for note in dict.fromkeys(notes):
        report(Warn(note))
    done += Adaptation(notes=tuple(dict.fromkeys(notes)))
    if additions:
        with open_root(system, restored, inner=INNER, writable=True) as root:
            if not choices.regenerate:
                done += _append(system, restored, root, additions, report)
            for generator in dict.fromkeys(each.generator for each in additions):
                own = [each for each in additions if each.generator == generator]
                done += _leave(root, generator, own, later=not choices.regenerate)
    if choices.regenerate:
        done += regenerate_initramfs(system, restored, report)
        done += _append_rest(system, restored, hardware, report)
    return done


def _add_drivers(system: System, restored: Restored, drivers: Drivers, report: Report) -> Adaptation:
    if not drivers.modules and not drivers.packages:
        return Adaptation()
    report(Step("Adding the drivers that were supplied"))
    opened = (
        opened_to_run(system, restored) if drivers.packages else open_root(system, restored, inner=INNER, writable=True)
    )
    with opened as root:
        return install_drivers(root, drivers, list_versions(root))


def _append_rest(system: System, restored: Restored, hardware: Hardware | None, report: Report) -> Adaptation:
    """Put behind an initramfs what it lacks although its own generator has made it anew."""
    with open_root(system, restored, inner=INNER) as root:
        additions = list(plan_additions(system, root, examine_kernels(system, restored, root, hardware)))
    if not additions:
        return Adaptation()
    with open_root(system, restored, inner=INNER, writable=True) as root:
        return _append(system, restored, root, additions, report)


def plan_additions(system: System, root: Path, examined: Sequence[Examined]) -> Iterator[Addition]:
    """Yield what the initramfs of each kernel needs put behind it. Raises RemetalError if a module cannot be read."""
    for each in examined:
        verdict, modules, initramfs = each.verdict, each.modules, each.initramfs
        if verdict.outcome is Outcome.CANNOT or modules is None or initramfs is None:
            continue
        texts = (*plan_configuration(initramfs, system.identities), *plan_naming(root, initramfs))
        present = initramfs.modules.get(modules.version, frozenset[str]())
        added = tuple(name for name in modules.closure(verdict.missing, soft=True) if name not in present)
        if texts or added or verdict.unloaded:
            files = find_files(root, each.kernel, modules, initramfs, added, verdict.unloaded)
            files |= {plan.path: plan.text.encode("utf-8", "surrogateescape") for plan in texts}
            yield Addition(
                version=verdict.kernel,
                generator=initramfs.generator,
                file=each.kernel.initramfs[-1].shown,
                added=added,
                loaded=verdict.unloaded,
                texts=texts,
                why=verdict.reasons,
                files=files,
            )


def describe_kernels(root: Path, examined: Sequence[Examined]) -> Iterator[str]:
    """Yield what an administrator has to know of kernels beside what is changed: sentences without a full stop."""
    for each in examined:
        verdict = each.verdict
        if verdict.outcome is Outcome.CANNOT:
            yield f"the kernel {verdict.kernel} cannot boot here: {'; '.join(verdict.reasons)}"
        yield from (f"the kernel {verdict.kernel}: {note}" for note in verdict.notes)
        if each.modules is not None and verdict.missing:
            there, lacking = find_firmware(root, each.modules, verdict.missing)
            if lacking and not there:
                names = ", ".join(verdict.missing)
                yield f"the system lacks the firmware that {names} may load: {', '.join(lacking)}"


def _append(
    system: System, restored: Restored, root: Path, additions: Sequence[Addition], report: Report
) -> Adaptation:
    """Put each archive behind its initramfs, the newest kernel's first; an older one may have to do without."""
    done = Adaptation()
    folders = find_boot_folders(system, restored, root)
    for number, each in enumerate(additions):
        file = next(
            BootFile(folder, each.file.removeprefix(folder.point))
            for folder in sorted(folders, key=lambda found: -len(found.point))
            if each.file.startswith(f"{folder.point}/")
        )
        with file.open() as opened:
            archive = encode_behind(probe_end(opened), each.files)
        size = len(archive)
        report(Step(f"Putting {format_bytes(size)} behind {each.file}"))
        try:
            file.append(archive)
        except RemetalError as error:
            if number == 0:
                raise
            report(Warn(error.message, error.hint))
            done += Adaptation(notes=(f"the kernel {each.version} does not boot here: {error.message}",))
            continue
        names = [*each.added, *(f"what loads {name}" for name in each.loaded), *(plan.path for plan in each.texts)]
        why = "; ".join((*each.why, *(f"{plan.path}: {what}" for plan in each.texts for what in plan.changes)))
        diff = "".join(plan.diff for plan in each.texts)
        change = Change(each.file, f"put {', '.join(names)} behind it ({format_bytes(size)}): {why}", diff)
        done += Adaptation((change,), bytes_written=size)
    return done


def _leave(root: Path, generator: Generator, additions: Sequence[Addition], *, later: bool) -> Adaptation:
    """Leave the file for the generator, and the service that runs it once, `later`."""
    added = tuple(dict.fromkeys(name for each in additions for name in each.added))
    loaded = tuple(dict.fromkeys(name for each in additions for name in each.loaded))
    drop_in, program = plan_drop_in(generator, added, loaded), find_program(generator)
    if drop_in is None or program is None or not any(find_file(root, path) for path in program.paths):
        names = ", ".join((*added, *loaded))
        note = f"what made the initramfs in {additions[0].file} is not known: the next that is made will lack {names}"
        return Adaptation(notes=(note,) if names else ())
    done = Adaptation()
    if added or loaded:
        done += _write(root, drop_in, f"has {generator} put {', '.join((*added, *loaded))} into every initramfs")
    if not later:
        return done
    command = " ".join(program.words)
    if not any(find_inside(root, path) for path in _SYSTEMD):
        return done + Adaptation(notes=(f"make the initramfs anew once the system runs: {command}",))
    done += _write(root, DropIn(SERVICE, plan_service(program)), f"runs `{command}` once, when there is little to do")
    link_inside(root, SERVICE_LINK, SERVICE)
    return done + Adaptation((Change(SERVICE_LINK, f"starts {SERVICE}"),))


def _write(root: Path, file: DropIn, what: str) -> Adaptation:
    old = (read_inside(root, file.path) or b"").decode("utf-8", "surrogateescape")
    create_inside(root, file.path, file.text.encode(), file.mode)
    return Adaptation((Change(file.path, what, diff_texts(file.path, old, file.text)),), bytes_written=len(file.text))
