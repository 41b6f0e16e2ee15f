"""What is put behind an initramfs for modules that it lacks: found without running the system.

The kernel unpacks archives one behind the other, and a later file replaces an earlier one. So the lists of modules in
it are made anew, of what the initramfs has and what is added, by depmod(8) of our own.

Sources: Linux Documentation/driver-api/early-userspace/buffer-format.rst; depmod(8), initramfs-tools(7), mkinitcpio(8),
modules-load.d(5), dracut.cmdline(7).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from remetal.adapt.kernels.initramfs import Initramfs, read_modules_of
from remetal.adapt.kernels.installed import Kernel
from remetal.adapt.kernels.modules import Modules
from remetal.adapt.kernels.survey import LARGEST_MODULE, find_firmware, read_module
from remetal.adapt.rooted import read_inside
from remetal.errors import RemetalError
from remetal.system.run import run

_BUILT_IN = ("modules.builtin", "modules.builtin.modinfo", "modules.order")


def find_files(
    root: Path, kernel: Kernel, modules: Modules, initramfs: Initramfs, added: Iterable[str], loaded: Iterable[str]
) -> dict[str, bytes]:
    """Return the files that have to be in a kernel's initramfs for modules of the system at `root` to be in it.

    The firmware files that `added` name come with them. `loaded` are those that have to be loaded by name. Raises
    RemetalError if one of them cannot be read.
    """
    folder = f"{initramfs.library or 'usr/lib/modules'}/{modules.version}"
    names = tuple(added)
    files = {f"{folder}/{_unpacked_name(modules.files[name])}": _need_module(root, modules, name) for name in names}
    lists = _make_lists(root, kernel, modules, folder, files) if names else {}
    firmware, _ = find_firmware(root, modules, names)
    library = folder.rpartition("/modules/")[0]
    for name, place in firmware.items():
        if name not in initramfs.firmware:
            files[f"{library}/firmware/{name}"] = place.read_bytes()
    return files | lists | _load_lists(initramfs, loaded)


def _need_module(root: Path, modules: Modules, name: str) -> bytes:
    data = read_module(root, modules, name)
    if data is None:
        raise RemetalError(f"the module {name} of the kernel {modules.version} is named in its lists, but not there")
    return data


def _make_lists(root: Path, kernel: Kernel, modules: Modules, folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the lists for what the initramfs has below `folder`, and for these files."""
    with TemporaryDirectory(prefix="remetal-depmod-") as place:
        tree = Path(place) / "lib/modules" / modules.version
        for path, data in (*_modules_in(kernel, folder), *files.items()):
            target = tree / path.removeprefix(f"{folder}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        for name in _BUILT_IN:
            found = read_inside(root, f"/lib/modules/{modules.version}/{name}", limit=LARGEST_MODULE)
            if found is not None:
                (tree / name).write_bytes(found)
        run(["depmod", "-b", place, modules.version])
        return {f"{folder}/{each.name}": each.read_bytes() for each in sorted(tree.glob("modules.*"))}


def _modules_in(kernel: Kernel, folder: str) -> Iterator[tuple[str, bytes]]:
    for each in kernel.initramfs:
        with each.open() as file:
            yield from read_modules_of(file, folder)


def _load_lists(initramfs: Initramfs, loaded: Iterable[str]) -> dict[str, bytes]:
    """Return the generator's own list of modules to load, with these behind what it has."""
    names = list(loaded)
    if not names:
        return {}
    lines = "".join(f"{name}\n" for name in names)
    match initramfs.generator:
        case "initramfs-tools":
            return {"conf/modules": f"{initramfs.texts.get('conf/modules', '')}\n{lines}".lstrip().encode()}
        case "mkinitcpio":
            config = initramfs.texts.get("config", "")
            return {
                "config": f'{config}\nMODULES="${{MODULES}} {" ".join(names)}"\n'.encode(),
                "etc/modules-load.d/remetal.conf": lines.encode(),
            }
        case _:
            words = " ".join(f"rd.driver.pre={name}" for name in names)
            return {
                "etc/cmdline.d/90-remetal.conf": f"{words}\n".encode(),
                "etc/modules-load.d/remetal.conf": lines.encode(),
            }


def _unpacked_name(path: str) -> str:
    """Return the name of a module's file once it is unpacked, as every kernel can load it."""
    for end in (".gz", ".xz", ".zst"):
        path = path.removesuffix(end)
    return path
