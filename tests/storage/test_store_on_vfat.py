"""A repository on a USB stick as it comes from the shop: vfat knows no hard links."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.uml import python_argv, run_in_uml
from remetal.units import MIB

_WORK = """
import os, subprocess
from pathlib import Path

os.makedirs("/run/stick")
subprocess.run(["mkfs.vfat", "/dev/ubda"], check=True, stdout=subprocess.DEVNULL)
subprocess.run(["mount", "/dev/ubda", "/run/stick"], check=True)
from remetal.storage import AlreadyExistsError, LocalStore

store = LocalStore(Path("/run/stick/repository"))
name = "packs/ab/" + "ab" * 32
store.put(name, [b"first"])
try:
    os.link(store.root / name, store.root / "link")
except OSError:
    print("no-links")
try:
    store.put(name, [b"second"])
except AlreadyExistsError:
    print("refused")
with store._temporary() as (path, fd):
    os.write(fd, b"third")
    print("published over it" if store._publish(path, store.root / name) else "kept")
assert store.get(name) == b"first"
assert [entry.name for entry in store.entries("")] == [name]
store.delete(name)
store.put(name, [b"again"])
subprocess.run(["umount", "/run/stick"], check=True)
subprocess.run(["mount", "/dev/ubda", "/run/stick"], check=True)
print(store.get(name).decode())
subprocess.run(["umount", "/run/stick"], check=True)
"""


@pytest.mark.storage
def test_objects_are_created_once_on_vfat(tmp_path: Path) -> None:
    disk = tmp_path / "stick.img"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    outcome = run_in_uml(python_argv(_WORK), disks=[disk], timeout=120)
    assert outcome.stdout.split() == ["no-links", "refused", "kept", "again"]
