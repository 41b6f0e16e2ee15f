"""UEFI firmware files as Debian and Ubuntu install them (package ovmf)."""

from __future__ import annotations

import shutil
from pathlib import Path

from remetal.system.run import ProgramMissingError
from remetal.vm.machine import Firmware

FOLDERS = (Path("/usr/share/OVMF"), Path("/usr/share/edk2/x64"), Path("/usr/share/edk2/ovmf"))
"""Where distributions keep them: Debian and Ubuntu, Arch, Fedora."""

_PLAIN = (
    ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
    ("OVMF_CODE.4m.fd", "OVMF_VARS.4m.fd"),
    ("OVMF_CODE.fd", "OVMF_VARS.fd"),
)
_SECURE = (("OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.ms.fd"), ("OVMF_CODE.secboot.fd", "OVMF_VARS.secboot.fd"))


def find_firmware(*, secure_boot: bool = False) -> Firmware | None:
    """Return the host's UEFI firmware with its template of variables, or None if it has none.

    With `secure_boot`, the template has the usual vendor keys enrolled and the firmware enforces them.
    """
    for code, variables in _SECURE if secure_boot else _PLAIN:
        for folder in FOLDERS:
            if (folder / code).is_file() and (folder / variables).is_file():
                return Firmware(folder / code, folder / variables)
    return None


def open_firmware(folder: Path, *, secure_boot: bool = False) -> Firmware:
    """Return a firmware whose variables live in `folder`: kept from an earlier boot, or fresh from the template.

    Raises ProgramMissingError if the host has no such firmware.
    """
    found = find_firmware(secure_boot=secure_boot)
    if found is None:
        kind = "UEFI firmware with Secure Boot" if secure_boot else "UEFI firmware"
        raise ProgramMissingError(
            f"this host has no {kind} for virtual machines", hint="On Debian or Ubuntu: apt-get install ovmf"
        )
    variables = folder / ("variables.secure.fd" if secure_boot else "variables.fd")
    if not variables.exists():
        shutil.copyfile(found.variables, variables)
    return Firmware(found.code, variables)
