"""What is put behind an initramfs, unpacked by a real kernel (User Mode Linux takes one as its initrd)."""

from __future__ import annotations

import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import pytest

from remetal.ondisk.cpio import probe_end
from remetal.ondisk.cpio_write import Entry, encode_behind, write_archive
from tests.unit.test_ondisk_cpio import PACKERS

INIT = b"#!/bin/busybox sh\n/bin/busybox echo added: $(/bin/busybox cat /etc/added)\n/bin/busybox poweroff -f\n"


def boot(initramfs: Path) -> str:
    """Return what the kernel and init say; on a busy host, init dies once in a while before it has said anything."""
    words = ["linux.uml", "mem=96M", f"initrd={initramfs}", "rdinit=/init", "con=null", "con0=null,fd:1"]
    console = ""
    for _ in range(3):
        done = subprocess.run(words, check=False, stdout=subprocess.PIPE, timeout=120)
        console = done.stdout.decode("utf-8", "replace")
        if "added:" in console:
            break
    return console


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("packing", PACKERS)
def test_the_kernel_unpacks_what_is_behind(tmp_path: Path, packing: str, length: int) -> None:
    """Whatever the size of what was there."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    plain = BytesIO()
    folders = [Entry("bin", None), Entry("dev", None)]
    files = [Entry("bin/busybox", Path(busybox)), Entry("init", INIT), Entry("length", bytes(range(length)))]
    write_archive(plain, [*folders, *files])
    there = subprocess.run(PACKERS[packing], input=plain.getvalue(), capture_output=True, check=True).stdout
    first = encode_behind(probe_end(BytesIO(there)), {"etc/added": b"once"})
    second = encode_behind(probe_end(BytesIO(there + first)), {"etc/added": b"twice"})
    image = tmp_path / "initramfs"
    for data, said in ((there + first, "added: once"), (there + first + second, "added: twice")):
        image.write_bytes(data)
        console = boot(image)
        assert said in console, console[-3000:]
        assert "unpacking failed" not in console
