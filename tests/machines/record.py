"""Record what probing reads of this machine's sysfs and procfs, as a tree that tests can rebuild anywhere.

    python -m tests.machines.record > tests/machines/raw/NAME.json

A tree maps paths to text; a folder is null, a link is ["->", target], and bytes that are no text are ["hex", digits].
Serial numbers and MAC addresses are in it: change them before you publish it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

Node = str | list[str] | None

_BLOCK = ("size", "hidden", "removable", "serial", "wwid", "dm/name", "dm/uuid", "md/level", "md/metadata_version")
_QUEUE = ("queue/logical_block_size", "queue/physical_block_size")
_DEVICE = ("model", "name", "serial", "vendor", "vpd_pg80", "wwid")
_DMI = ("sys_vendor", "product_name", "product_serial")


def record(root: Path = Path("/")) -> dict[str, Node]:
    """Return the tree of the machine whose sysfs and procfs are mounted under `root`."""
    found: dict[str, Node] = {}
    for place in _places(root):
        name = str(place.relative_to(root))
        if place.is_symlink():
            found[name] = ["->", str(place.readlink())]
        elif place.is_dir():
            found[name] = None
        elif place.is_file():
            found[name] = _content(place)
    return dict(sorted(found.items()))


def _places(root: Path) -> Iterator[Path]:
    yield from (root / name for name in ("proc/cpuinfo", "proc/meminfo", "proc/sys/kernel/osrelease"))
    sys_root = root / "sys"
    if (sys_root / "firmware/efi").is_dir():
        yield sys_root / "firmware/efi"
    for block in sorted((sys_root / "block").iterdir()):
        yield block
        folder = block.resolve()
        yield from (folder / name for name in (*_BLOCK, *_QUEUE))
        yield from sorted(folder.glob("slaves/*"))
        yield from sorted(folder.glob("holders/*"))
        if (folder / "device").exists():
            yield folder / "device"
            yield from ((folder / "device").resolve() / name for name in _DEVICE)
        yield from (
            parent / name
            for parent in folder.parents
            for name in ("idVendor", "serial")
            if (parent / "idVendor").exists()
        )
    if (sys_root / "class/dmi/id").exists():
        yield sys_root / "class/dmi/id"
        yield from ((sys_root / "class/dmi/id").resolve() / name for name in _DMI)
    for net in sorted((sys_root / "class/net").iterdir()):
        folder = net.resolve()
        yield from (net, folder / "address", folder / "device", (folder / "device").resolve() / "driver")
    for place, _, files in os.walk(sys_root / "devices"):
        if "modalias" in files:
            yield Path(place) / "modalias"


def _content(place: Path) -> Node:
    try:
        data = place.read_bytes()
    except OSError:
        return ""
    if place.name == "cpuinfo":
        kept = ("processor", "model name", "Model", "cpu model")
        data = b"".join(
            line for line in data.splitlines(keepends=True) if line.startswith(tuple(map(str.encode, kept)))
        )
    if place.name == "meminfo":
        data = data.splitlines(keepends=True)[0]
    text = data.decode(errors="replace")
    return (
        text if text.isprintable() or set(text) <= {*filter(str.isprintable, text), "\n", "\t"} else ["hex", data.hex()]
    )


def rebuild(tree: dict[str, Node], root: Path) -> None:
    """Make the files, folders and links of a recorded tree under `root`."""
    for name, value in tree.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if value is None:
            place.mkdir(exist_ok=True)
        elif isinstance(value, list):
            place.symlink_to(value[1]) if value[0] == "->" else place.write_bytes(bytes.fromhex(value[1]))
        else:
            place.write_text(value)


if __name__ == "__main__":
    json.dump(record(), sys.stdout, indent=0)
    print()
