"""Which of QEMU's accelerators really works here.

On nested hosts /dev/kvm may open although no guest gets far on it, or hangs a moment after its start. So KVM
counts only when guests have shown it: UEFI firmware that reaches its boot menu (real, protected and 64-bit mode,
paging, devices) and, where the host has a readable kernel, that kernel reaching its search for a root.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from remetal.system.run import find_program, start
from remetal.vm.firmware import find_firmware

EMULATION = ("-accel", "tcg,thread=multi", "-cpu", "max")
KVM = ("-accel", "kvm", "-cpu", "host")

_PATIENCE = 10.0
"""Seconds; real hardware needs one or two."""
_SIGN = re.compile(rb"BdsDxe: |Kernel panic - not syncing: VFS|Unable to mount root fs|Run /init as init")


@functools.cache
def probe_accelerator() -> tuple[str, ...]:
    """Return QEMU's options for the fastest accelerator that works here: `KVM` or `EMULATION`.

    Takes up to some seconds the first time; the verdict holds for the life of the process.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) or find_program("qemu-system-x86_64") is None:
        return EMULATION
    guests = list(_proving_guests())
    return KVM if guests and all(_proves(guest) for guest in guests) else EMULATION


def _proving_guests() -> Iterator[tuple[str, ...]]:
    firmware = find_firmware()
    if firmware is not None:
        yield ("-drive", f"if=pflash,format=raw,readonly=on,file={firmware.code}")
    kernels = [path for path in Path("/boot").glob("vmlinuz-*") if os.access(path, os.R_OK)]
    if kernels:
        newest = max(kernels, key=lambda path: path.stat().st_mtime)
        yield ("-kernel", str(newest), "-append", "console=ttyS0 panic=-1")


def _proves(guest: tuple[str, ...]) -> bool:
    with TemporaryDirectory(prefix="remetal-kvm-") as place:
        serial, said = Path(place) / "serial", Path(place) / "said"
        serial.touch()
        argv = ["qemu-system-x86_64", *KVM, "-nodefaults", "-display", "none", "-m", "512M", "-no-reboot"]
        deadline = time.monotonic() + _PATIENCE
        with start([*argv, "-serial", f"file:{serial}", *guest], log=said) as process:
            while time.monotonic() < deadline:
                ended = process.poll() is not None
                if _SIGN.search(serial.read_bytes()):
                    return True
                if ended or b"KVM internal error" in said.read_bytes():
                    return False
                time.sleep(0.1)
    return False
