"""Drivers that an administrator supplies, because no kernel of the snapshot has them: modules, and packages with some.

A module says itself which kernel it is for. A single one goes to that kernel's `updates` folder, which depmod(8)
prefers; a package is installed by the system's own package manager, run in its root.

Sources: modinfo(8), depmod.d(5); Linux Documentation/kbuild/modules.rst (`vermagic`) and
admin-guide/module-signing.rst; dpkg(1), rpm(8).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from remetal.adapt.change import Adaptation, Change
from remetal.adapt.kernels.modules import Modules, module_name
from remetal.adapt.rooted import create_inside, find_inside, read_inside
from remetal.errors import RemetalError, UsageError
from remetal.ondisk.packed import unpack_whole
from remetal.system.run import ProgramFailedError, run
from remetal.units import MIB

_MODULES = (".ko", ".ko.gz", ".ko.xz", ".ko.zst")
_PACKAGES = {".deb": ("dpkg", "--install"), ".rpm": ("rpm", "--upgrade", "--replacepkgs")}
_LARGEST = 256 * MIB
_SIGNED = b"~Module signature appended~\n"
_FOLDER = "updates/remetal"
_PLACE = "/var/cache/remetal-drivers"
"""Where packages lie in the system while they are installed."""
_PATIENCE = 1800
"""Seconds that a package manager may take: it may build modules, or make every initramfs anew."""


@dataclass(frozen=True, slots=True)
class Driver:
    """A module from outside: the file that it is in, the kernel that it is for, and what it says of itself.

    `package` is where it came from, if it was not a file of its own.
    """

    name: str
    path: Path
    kernel: str
    aliases: tuple[str, ...]
    needs: tuple[str, ...]
    signed: bool
    package: Path | None = None


@dataclass(frozen=True, slots=True)
class Drivers:
    """What an administrator supplies: modules, those in packages included, and the packages."""

    modules: tuple[Driver, ...] = ()
    packages: tuple[Path, ...] = ()

    def add_to(self, modules: Modules) -> Modules:
        """Return a kernel's modules with those that are for it; one that has the name of another takes its place."""
        own = [each for each in self.modules if each.kernel == modules.version]
        if not own:
            return modules
        return dataclasses.replace(
            modules,
            files=dict(modules.files) | {each.name: f"{_FOLDER}/{each.name}.ko" for each in own},
            needs=dict(modules.needs) | {each.name: each.needs for each in own},
            aliases=modules.aliases.with_first([(alias, each.name) for each in own for alias in each.aliases]),
        )


NONE = Drivers()


@contextmanager
def opened_drivers(folder: Path | None) -> Iterator[Drivers]:
    """Look at the drivers in a folder and below it, for the length of a block: packages are unpacked for that.

    Raises UsageError if there is no such folder, nothing of the kind in it, or a file that is not what its name says.
    """
    if folder is None:
        yield NONE
        return
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} with drivers")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    packages = tuple(path for path in files if path.suffix in _PACKAGES)
    loose = [path for path in files if path.name.endswith(_MODULES)]
    if not packages and not loose:
        raise UsageError(
            f"{folder} holds no drivers", hint=f"They are files that end in {', '.join((*_MODULES, *_PACKAGES))}."
        )
    with TemporaryDirectory(prefix="remetal-drivers-") as work:
        found = [_read_driver(path) for path in loose]
        for number, package in enumerate(packages):
            inner = Path(work) / str(number)
            inner.mkdir()
            _unpack(package, inner)
            found += [
                dataclasses.replace(_read_driver(path), package=package)
                for path in sorted(inner.rglob("*"))
                if path.name.endswith(_MODULES) and path.is_file() and not path.is_symlink()
            ]
        yield Drivers(tuple(found), packages)


def install_drivers(root: Path, drivers: Drivers, versions: Sequence[str]) -> Adaptation:
    """Put drivers into the system mounted at `root`, whose programs can be run there if there are packages.

    `versions` are those of its kernels. Raises RemetalError if one cannot be written, or a package not be installed.
    """
    done = Adaptation()
    by_kernel: Mapping[str, list[Driver]] = defaultdict(list)
    for each in drivers.modules:
        if each.package is None:
            by_kernel[each.kernel].append(each)
    for version, found in by_kernel.items():
        if version not in versions:
            continue
        for each in found:
            path = f"/lib/modules/{version}/{_FOLDER}/{each.name}.ko"
            data = unpack_whole(each.path.read_bytes(), limit=_LARGEST)
            if read_inside(root, path, limit=_LARGEST) == data:
                continue
            create_inside(root, path, data)
            what = f"added from {each.path}" + ("" if each.signed else "; it is not signed: no use under Secure Boot")
            done += Adaptation((Change(path, what),), bytes_written=len(data))
        _index(root, version)
    for end, words in _PACKAGES.items():
        own = [package for package in drivers.packages if package.suffix == end]
        if own:
            done += _install_packages(root, own, words)
    return done


def describe_misfits(drivers: Drivers, versions: Sequence[str]) -> tuple[str, ...]:
    """Return which drivers are for no kernel that is there, each a sentence without a full stop."""
    there = ", ".join(versions) or "none"
    return tuple(
        dict.fromkeys(
            f"the driver {each.name} ({(each.package or each.path).name}) is for the kernel {each.kernel}, "
            f"which the system does not have; it has: {there}"
            for each in drivers.modules
            if each.kernel not in versions
        )
    )


def _read_driver(path: Path) -> Driver:
    try:
        text = run(["modinfo", "--null", path.resolve()]).text
    except ProgramFailedError as error:
        raise UsageError(f"{path} is no kernel module: {error.message}") from error
    facts: dict[str, list[str]] = defaultdict(list)
    for line in text.split("\0"):
        key, equals, value = line.partition("=")
        if equals:
            facts[key].append(value)
    magic = facts["vermagic"][0].split() if facts["vermagic"] else []
    if not magic:
        raise UsageError(f"{path} does not say which kernel it is for (vermagic)")
    with path.open("rb") as file:
        data = unpack_whole(file.read(_LARGEST), limit=_LARGEST)
    name = facts["name"][0] if facts["name"] else path.name.split(".ko")[0]
    depends = facts["depends"][0].split(",") if facts["depends"] else []
    return Driver(
        name=module_name(name),
        path=path,
        kernel=magic[0],
        aliases=tuple(facts["alias"]),
        needs=tuple(module_name(each) for each in depends if each),
        signed=data.endswith(_SIGNED),
    )


def _unpack(package: Path, folder: Path) -> None:
    try:
        if package.suffix == ".rpm":
            run(["bsdtar", "--extract", "--file", package, "--directory", folder])
        else:
            run(["dpkg-deb", "--extract", package, folder])
    except ProgramFailedError as error:
        raise UsageError(f"{package} cannot be unpacked: {error.message}") from error


def _index(root: Path, version: str) -> None:
    """Have depmod of our own make the lists of a kernel's modules anew: it sees a tree with nothing but them."""
    folder = find_inside(root, f"/lib/modules/{version}")
    if folder is None:
        raise RemetalError(f"/lib/modules/{version} vanished from the restored system while it was being adapted")
    with TemporaryDirectory(prefix="remetal-depmod-") as place:
        (Path(place) / "lib/modules").mkdir(parents=True)
        (Path(place) / "lib/modules" / version).symlink_to(folder)
        run(["depmod", "-b", place, version])


def _install_packages(root: Path, packages: Sequence[Path], words: Sequence[str]) -> Adaptation:
    place = find_inside(root, "/var/cache")
    if place is None:
        raise RemetalError("the restored system has no folder /var/cache to install packages from")
    folder = place / Path(_PLACE).name
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        for package in packages:
            shutil.copyfile(package, folder / package.name)
        names = [f"{_PLACE}/{package.name}" for package in packages]
        try:
            run(["chroot", root, *words, *names], timeout=_PATIENCE, env={"DEBIAN_FRONTEND": "noninteractive"})
        except ProgramFailedError as error:
            raise RemetalError(
                f"{', '.join(package.name for package in packages)} could not be installed in the restored system: "
                f"{error.message}",
                hint="Install it from a shell in the restored system, or give its modules alone with --drivers.",
            ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Adaptation(tuple(Change(package.name, "installed in the restored system") for package in packages))
