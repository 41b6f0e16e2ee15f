"""The programs that make an initramfs, and the one file that tells each which drivers this hardware needs. Pure.

Sources: initramfs-tools(7) (hooks, `manual_add_modules`, `force_load`); dracut.conf(5) (`add_drivers`,
`force_drivers`); mkinitcpio(8) (`MODULES`, mkinitcpio.conf.d since version 36).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remetal.adapt.kernels.initramfs import Generator

_WHY = """\
# Written by remetal when this system was restored: on this hardware, its initramfs needs these drivers.
# Remove this file when the system moves on to hardware that does not.
"""


@dataclass(frozen=True, slots=True)
class DropIn:
    """A file of a generator's configuration, by its path in the system, with its mode."""

    path: str
    text: str
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Program:
    """A generator: where it is in a system, and the words that make every initramfs anew with it."""

    generator: Generator
    paths: tuple[str, ...]
    words: tuple[str, ...]


PROGRAMS = (
    Program("initramfs-tools", ("/usr/sbin/update-initramfs",), ("update-initramfs", "-u", "-k", "all")),
    Program("dracut", ("/usr/bin/dracut", "/usr/sbin/dracut"), ("dracut", "--force", "--regenerate-all")),
    Program("mkinitcpio", ("/usr/bin/mkinitcpio",), ("mkinitcpio", "-P")),
)


def find_program(generator: Generator) -> Program | None:
    """Return a generator's program; None for one that is not known."""
    return next((each for each in PROGRAMS if each.generator == generator), None)


def plan_drop_in(generator: Generator, added: Sequence[str], loaded: Sequence[str]) -> DropIn | None:
    """Return the file that makes a generator put modules into every initramfs; those in `loaded` are loaded by name."""
    more = [each for each in added if each not in loaded]
    match generator:
        case "initramfs-tools":
            lines = [f"manual_add_modules {' '.join(more)}\n"] if more else []
            lines += [f"force_load {each}\n" for each in loaded]
            text = f'#!/bin/sh\n{_WHY}[ "$1" != prereqs ] || exit 0\n. /usr/share/initramfs-tools/hook-functions\n'
            return DropIn("/etc/initramfs-tools/hooks/remetal", text + "".join(lines), 0o755)
        case "dracut":
            lines = [f'add_drivers+=" {" ".join(more)} "\n'] if more else []
            lines += [f'force_drivers+=" {" ".join(loaded)} "\n'] if loaded else []
            return DropIn("/etc/dracut.conf.d/90-remetal.conf", _WHY + "".join(lines))
        case "mkinitcpio":
            return DropIn("/etc/mkinitcpio.conf.d/remetal.conf", f"{_WHY}MODULES+=({' '.join((*more, *loaded))})\n")
        case _:
            return None


SERVICE = "/etc/systemd/system/remetal-initramfs.service"
SERVICE_LINK = "/etc/systemd/system/multi-user.target.wants/remetal-initramfs.service"


def plan_service(program: Program) -> str:
    """Return the unit that makes every initramfs anew once: when the machine has little to do, within a day.

    It removes itself when that is done; if it fails, it stays, and every initramfs as it was.
    """
    script = (
        "sleep 600; tries=0; "
        "while read -r load rest </proc/loadavg; [ $${load%%.*} -ge $$(nproc) ] && [ $$tries -lt 1440 ]; "
        "do tries=$$((tries + 1)); sleep 60; done; "
        f"{' '.join(program.words)} && rm -f {SERVICE_LINK} {SERVICE}"
    )
    return f"""\
# Written by remetal when this system was restored onto other hardware. Drivers that it needs here were put behind its
# initramfs; this has its own generator do the same, once, and is gone then.
[Unit]
Description=Make the initramfs anew for this hardware, once

[Service]
Type=simple
Nice=19
IOSchedulingClass=idle
ExecStart=/bin/sh -c '{script}'

[Install]
WantedBy=multi-user.target
"""
