"""remetal's own layer of the medium: the running program and its Python dependencies, as they are installed here.

Copying what runs here means that the medium restores with the very code that was tested on this host. Where the
medium's Python differs from ours, the same versions are fetched as wheels for that Python instead.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import remetal
from remetal.errors import RemetalError
from remetal.events import Note, Report, Step
from remetal.media.root import BaseRoot, entered_root
from remetal.system.run import ProgramFailedError, run

TREE = Path(__file__).parent / "tree"
"""Our own files of the medium: `initramfs/` and `root/`."""

_PYTHON = Path("usr/lib/remetal/python")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LEFT_OUT = {"__pycache__", "tests", "testing", "_pyinstaller", "f2py", "distutils", "include"}
_LEFT_OUT_ENDINGS = (".pyi", ".pyc", ".h", ".a", ".pxd", ".c", ".pyx", ".lib")
_SERVICES = {"s3", "sts", "sso", "sso-oidc", "signin"}
_COMPRESSION = ("-comp", "zstd", "-Xcompression-level", "12", "-b", "256K")


def build_own_layer(base: BaseRoot, work: Path, answer: bytes | None, report: Report) -> Path:
    """Build own.squashfs in the folder `work` and prove that remetal starts in the recovery system.

    `answer` is an answer file to bake in. Raises RemetalError if remetal does not run there.
    """
    report(Step("Adding remetal itself"))
    folder = work / "own"
    copy_tree(TREE / "root", folder)
    if answer is not None:
        (folder / "etc/remetal").mkdir(parents=True)
        (folder / "etc/remetal/remetal-answer.toml").write_bytes(answer)
        (folder / "etc/remetal/remetal-answer.toml").chmod(0o600)
    for name in ("init", "poweroff", "reboot", "halt"):
        (folder / "usr/sbin").mkdir(parents=True, exist_ok=True)
        (folder / "usr/sbin" / name).symlink_to("../bin/busybox")
    (folder / "etc/mtab").symlink_to("../proc/self/mounts")
    python = folder / _PYTHON
    python.mkdir(parents=True)
    _put_dependencies(base, python, report)
    _thin_out(python)
    shutil.copytree(Path(remetal.__file__).parent, python / "remetal", ignore=_left_out)
    _compile(base, python)
    image = work / "own.squashfs"
    run(["mksquashfs", folder, image, *_COMPRESSION, "-noappend", "-no-progress", "-quiet", "-all-root"])
    _prove(base, image, report)
    return image


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder of our own files; scripts become executable whatever the installation did to their modes."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        place.write_bytes(content)
        place.chmod(0o755 if content.startswith(b"#!") else 0o644)


def find_dependencies(name: str) -> list[Distribution]:
    """Return the installed distributions that `name` needs, and what those need, without itself.

    A requirement with a marker counts where it is installed. Raises RemetalError for a missing one.
    """
    found: dict[str, Distribution] = {}
    queue = list(_requirements(distribution(name)))
    while queue:
        wanted, optional = queue.pop()
        key = re.sub(r"[-_.]+", "-", wanted).lower()
        if key in found:
            continue
        try:
            found[key] = distribution(wanted)
        except PackageNotFoundError:
            if optional:
                continue
            raise RemetalError(
                f"remetal needs the Python package '{wanted}', which is not installed here",
                hint="Install remetal anew, then build the medium again.",
            ) from None
        queue += _requirements(found[key])
    return [found[key] for key in sorted(found)]


def _requirements(package: Distribution) -> Iterator[tuple[str, bool]]:
    """Yield every requirement's name (PEP 508) and whether a marker makes it conditional; extras are skipped."""
    for requirement in package.requires or ():
        words, _, marker = requirement.partition(";")
        match = _NAME.match(words.strip())
        if match is not None and not re.search(r"\bextra\b", marker):
            yield match[0], bool(marker.strip())


def _thin_out(python: Path) -> None:
    """Leave out what botocore knows of services other than S3, and those that give credentials for it."""
    for folder in (python / "botocore/data").glob("*/"):
        if folder.name not in _SERVICES:
            shutil.rmtree(folder)


def _put_dependencies(base: BaseRoot, python: Path, report: Report) -> None:
    needed = find_dependencies("remetal")
    if base.python == sys.version_info[:2]:
        for package in needed:
            _copy_distribution(package, python)
        return
    medium, own = (".".join(map(str, version)) for version in (base.python, sys.version_info[:2]))
    report(Note(f"the recovery system has Python {medium}, this host {own}: fetching the same packages for it"))
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 28, 34)]
    wheels = [f"{package.metadata['Name']}=={package.version}" for package in needed]
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--only-binary=:all:"]
    try:
        run(
            [
                *argv,
                "--target",
                python,
                "--python-version",
                medium,
                *platforms,
                "--platform=manylinux2014_x86_64",
                *wheels,
            ]
        )
    except ProgramFailedError as error:
        raise RemetalError(
            f"remetal's packages could not be had for the recovery system's Python {medium}: {error.message}",
            hint=f"Run this with Python {medium}, or choose a --suite whose Python is {own}.",
        ) from error


def _copy_distribution(package: Distribution, python: Path) -> None:
    """Copy an installed distribution's files, without its scripts, tests and headers."""
    files = package.files
    if not files or _is_editable(package):
        raise RemetalError(
            f"the Python package '{package.metadata['Name']}' is not installed as files that can be copied",
            hint="Install remetal into a virtual environment of its own, then build the medium from there.",
        )
    for file in files:
        inside = not file.is_absolute() and ".." not in file.parts
        if not inside or _LEFT_OUT.intersection(file.parts) or file.name.endswith(_LEFT_OUT_ENDINGS):
            continue
        target = python.joinpath(*file.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(str(file.locate())), target)


def _is_editable(package: Distribution) -> bool:
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def _left_out(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__" or name.endswith(".pyc")]


def _compile(base: BaseRoot, python: Path) -> None:
    """Compile the Python files with the medium's own Python: an emulated or old machine takes long for it."""
    with entered_root([base.path("root.squashfs")]) as root:
        shutil.copytree(python, root / _PYTHON)
        run(
            [
                "chroot",
                root,
                "python3",
                "-m",
                "compileall",
                "-q",
                "--invalidation-mode",
                "unchecked-hash",
                f"/{_PYTHON}",
            ]
        )
        shutil.copytree(root / _PYTHON, python, dirs_exist_ok=True)


def _prove(base: BaseRoot, image: Path, report: Report) -> None:
    """Start remetal in the very file system that the medium will show. Raises RemetalError if it does not."""
    with entered_root([image, base.path("root.squashfs")]) as root:
        try:
            version = run(["chroot", root, "remetal", "--version"]).text.strip()
            run(["chroot", root, "remetal", "recovery", "--help"])
        except ProgramFailedError as error:
            raise RemetalError(
                f"remetal does not start in the recovery system: {error.message}", hint=error.hint
            ) from error
    report(Note(f"{version} starts in the recovery system"))
