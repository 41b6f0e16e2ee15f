"""Having a restored system's own generator make every initramfs anew, in its own root, at once.

It takes minutes, runs programs of the restored system, and can fail. So what was there is kept beside until it is done.

Sources: update-initramfs(8), initramfs.conf(5); dracut(8); mkinitcpio(8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from remetal.adapt.change import Adaptation, Change
from remetal.adapt.kernels.boot_files import find_boot_folders
from remetal.adapt.kernels.generators import PROGRAMS, Program
from remetal.adapt.kernels.installed import find_kernels
from remetal.adapt.kernels.modules import list_versions
from remetal.adapt.restored import Restored
from remetal.adapt.rooted import create_inside, find_file, find_inside
from remetal.adapt.roots import System, open_root
from remetal.errors import RemetalError
from remetal.events import Report, Step
from remetal.system.mounts import mounted
from remetal.system.run import ProgramFailedError, run
from remetal.units import MIB

_OURS = ("dev", "proc", "sys", "run")
_PATIENCE = 7200
_DEP = "/etc/initramfs-tools/conf.d/zz-remetal"
"""What makes initramfs-tools take every driver, this once: it would look for the root among what we have mounted."""
_HERE: dict[str, tuple[str, ...]] = {
    "dracut": ("--no-hostonly",),  # likewise
}


def regenerate_initramfs(system: System, restored: Restored, report: Report) -> Adaptation:
    """Make every initramfs of a restored system anew with its own generator.

    Raises RemetalError if it has none or that fails; every initramfs is as it was then.
    """
    with opened_to_run(system, restored) as root:
        program = next((each for each in PROGRAMS if any(find_file(root, path) for path in each.paths)), None)
        if program is None:
            raise RemetalError(f"{system.name} has no program that makes an initramfs that remetal knows")
        command = (*program.words, *_HERE.get(program.generator, ()))
        report(Step(f"Making every initramfs anew ({' '.join(command)}); this takes minutes"))
        with _kept(system, restored, root) as files, _all_drivers(root, program):
            try:
                run(["chroot", root, *command], timeout=_PATIENCE)
            except ProgramFailedError as error:
                raise RemetalError(
                    f"{program.words[0]} failed in the restored system: {error.message}",
                    hint="Restore without --regenerate: what an initramfs lacks is put behind it then.",
                ) from error
        return Adaptation(
            tuple(Change(path, f"made anew by {program.words[0]}") for path in files),
        )


@contextmanager
def opened_to_run(system: System, restored: Restored) -> Iterator[Path]:
    """Mount a system so that its programs can be run in it, and yield its root."""
    points = tuple(point for point in system.mounts if point != "/")
    with open_root(system, restored, inner=points, writable=True, programs=True) as root, ExitStack() as stack:
        for name in _OURS:
            target = find_inside(root, name)
            if target is None or not target.is_dir():
                raise RemetalError(f"the restored system has no folder /{name}, so its programs cannot be run in it")
            stack.enter_context(mounted(Path("/") / name, options=("bind",), target=target))
        yield root


@contextmanager
def _kept(system: System, restored: Restored, root: Path) -> Iterator[Sequence[str]]:
    """Keep every initramfs until the block is left, and put it back if that fails. Raises RemetalError.

    One on a FAT that could not be mounted would be written beside it.
    """
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for kernel in find_kernels(find_boot_folders(system, restored, root), list_versions(root)):
            for each in kernel.initramfs:
                if find_file(root, each.shown) is None:
                    raise RemetalError(
                        f"{each.shown} cannot be made anew here: this kernel does not mount FAT",
                        hint="Restore from the recovery medium, or without --regenerate.",
                    )
                copy: BinaryIO = stack.enter_context(TemporaryFile(prefix="remetal-"))
                with each.open() as file:
                    while piece := file.read(MIB):
                        copy.write(piece)
                files[each.shown] = copy
        try:
            yield tuple(files)
        except BaseException:
            for path, copy in files.items():
                copy.seek(0)
                create_inside(root, path, copy.read())
            raise


@contextmanager
def _all_drivers(root: Path, program: Program) -> Iterator[None]:
    if program.generator != "initramfs-tools":
        yield
        return
    create_inside(root, _DEP, b"# remetal makes this initramfs, and removes this file.\nMODULES=most\n")
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            if (place := find_file(root, _DEP)) is not None:
                place.unlink()
