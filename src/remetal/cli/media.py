"""`remetal media`: building the recovery medium."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from remetal.cli.options import DEFAULTS, Output
from remetal.cli.output import print_result, reporting
from remetal.cli.tables import escape
from remetal.media.build import MediumRequest, build_medium
from remetal.units import format_bytes, format_duration

app = App(name="media", default_parameter=DEFAULTS, help="Build the medium that a dead machine recovers from.")


@app.command
def build(
    *,
    target: Annotated[Path, Parameter(name=["--output", "-o"], help="The ISO file to write.", metavar="ISO")],
    answer: Annotated[
        Path | None,
        Parameter(
            name="--answer",
            help="Bake in this answer file: whatever machine boots the medium then recovers unattended.",
            metavar="FILE",
        ),
    ] = None,
    append: Annotated[
        str,
        Parameter(name="--append", help="Add these arguments to the kernel's command line.", metavar="ARGUMENTS"),
    ] = "",
    suite: Annotated[
        str | None,
        Parameter(name="--suite", help="The Debian or Ubuntu suite, if not this host's own.", metavar="NAME"),
    ] = None,
    package: Annotated[
        tuple[str, ...],
        Parameter(name="--package", negative="", help="Add a Debian package; may be repeated.", metavar="NAME"),
    ] = (),
    fresh: Annotated[
        bool,
        Parameter(name="--fresh", negative="", help="Build from today's packages instead of the cached system."),
    ] = False,
    output: Output = Output(),
) -> None:
    """Build a recovery medium: one ISO that boots from CD and USB stick, by BIOS and UEFI, Secure Boot included.

    The medium holds a Debian system that runs in memory (1 GiB is enough), with its tools and with remetal as it
    runs here. Packages come from where this host's apt gets them. Write it to a USB stick with
    `dd if=recovery.iso of=/dev/STICK bs=4M conv=fsync`. The installed system is kept in $REMETAL_CACHE
    (/var/cache/remetal) for the next build. Needs root.

    Example: `remetal media build --output recovery.iso`
    """
    request = MediumRequest(target, answer, append, suite, package, fresh)
    with reporting(output) as report:
        medium = build_medium(request, report)
    print_result(
        output,
        msgspec.to_builtins(medium, enc_hook=str),
        f"Wrote {escape(str(medium.path))} ({format_bytes(medium.size)}, {medium.suite}, kernel {medium.kernel}) "
        f"in {format_duration(medium.seconds)}",
    )
