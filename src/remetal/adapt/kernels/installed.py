"""The kernels of an installed system: their images, and the initramfs that each is started with.

What belongs together is told by the boot loader's entries where there are any (Boot Loader Specification), else by the
names that distributions give: `vmlinuz-VERSION` with `initrd.img-VERSION` (Debian), `initramfs-VERSION.img` (dracut),
`initrd-VERSION` (openSUSE); `vmlinuz-linux` with `initramfs-linux.img` (mkinitcpio).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from remetal.adapt.kernels.boot_files import BootFile, BootFolder
from remetal.ondisk.linux_image import HEAD, parse_version
from remetal.units import KIB

_IMAGES = ("vmlinuz-", "vmlinux-", "kernel-", "bzImage-")
_ENTRIES = "/loader/entries"
_ENTRY_MAX = 64 * KIB


@dataclass(frozen=True, slots=True)
class Kernel:
    """An installed kernel: its version, its image, and its initramfs.

    `initramfs` holds several files where microcode is in one of its own; none if there is no initramfs.
    """

    version: str
    image: BootFile
    initramfs: tuple[BootFile, ...] = ()


def find_kernels(folders: Sequence[BootFolder], versions: Collection[str]) -> tuple[Kernel, ...]:
    """Return the kernels in these folders of an installed system, the newest versions first.

    `versions` are those of which it has modules; an image that does not say its version goes by its name.
    """
    found: dict[tuple[str, str], Kernel] = {}
    for folder in folders:
        for kernel in (*_by_entries(folder, versions), *_by_names(folder, versions)):
            found.setdefault((kernel.image.folder.point, kernel.image.path.lower()), kernel)
    return tuple(sorted(found.values(), key=lambda each: version_key(each.version), reverse=True))


def version_key(version: str) -> tuple[tuple[int, int | str], ...]:
    """Return what sorts versions as people do: 6.9 before 6.10."""
    parts: list[tuple[int, int | str]] = []
    word = ""
    for letter in f"{version}.":
        if letter.isalnum() and (not word or word[-1].isdigit() == letter.isdigit()):
            word += letter
            continue
        if word:
            parts.append((1, int(word)) if word.isdigit() else (0, word))
        word = letter if letter.isalnum() else ""
    return tuple(parts)


def parse_entry(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the paths of the image and of all its initramfs from an entry of the Boot Loader Specification."""
    linux, initrds = "", []
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        if key == "linux":
            linux = value.strip()
        elif key == "initrd":
            initrds += [each for each in value.split() if not each.startswith("$")]
    return linux, tuple(initrds)


def _by_entries(folder: BootFolder, versions: Collection[str]) -> Iterator[Kernel]:
    for name in folder.names(_ENTRIES):
        if name.endswith(".conf"):
            linux, initrds = parse_entry(_read_text(BootFile(folder, f"{_ENTRIES}/{name}")))
            image = _find(folder, linux)
            version = _version_of(image, versions) if image else None
            if image and version:
                yield Kernel(version, image, tuple(file for each in initrds if (file := _find(folder, each))))


def _by_names(folder: BootFolder, versions: Collection[str]) -> Iterator[Kernel]:
    names = folder.names("/")
    for name in names:
        start = next((each for each in _IMAGES if name.startswith(each)), None)
        image = _find(folder, f"/{name}") if start else None
        version = _version_of(image, versions) if image else None
        if start and image and version:
            label = name.removeprefix(start)
            usual = (f"initrd.img-{label}", f"initramfs-{label}.img", f"initrd-{label}", f"initrd-{label}.img")
            own = next((each for each in usual if each in names), None)
            yield Kernel(version, image, (BootFile(folder, f"/{own}"),) if own else ())


def _find(folder: BootFolder, path: str) -> BootFile | None:
    """Return the file that a boot loader's entry names: below its own folder, or by its path in the system."""
    for place in dict.fromkeys((f"/{path.lstrip('/')}", path.removeprefix(folder.point))) if path else ():
        file = folder.open(place)
        if file is not None:
            file.close()
            return BootFile(folder, place)
    return None


def _read_text(file: BootFile) -> str:
    with file.open() as opened:
        return opened.read(_ENTRY_MAX).decode("utf-8", "replace")


def _version_of(image: BootFile, versions: Collection[str]) -> str | None:
    """Return the version of a kernel's image; by its name where it does not say, as on other processors than x86."""
    with image.open() as file:
        version = parse_version(file.read(HEAD))
    label = image.path.rpartition("/")[2].partition("-")[2]
    return version or (label if label in versions else None)
