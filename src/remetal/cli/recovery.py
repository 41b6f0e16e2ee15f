"""`remetal recovery`: what runs on the consoles of the recovery medium."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

from cyclopts import Parameter

from remetal.cli.options import Output
from remetal.cli.output import reporting
from remetal.errors import RefusedError, RemetalError
from remetal.events import Note, Report, Step
from remetal.ids import short
from remetal.media.answer import CommandLine, End, parse_command_line
from remetal.system.run import run
from remetal.units import format_bytes, format_duration
from remetal.workflows.recover import Found, Recovery, check_first_time, find_answer, leave_log, recover

if TYPE_CHECKING:
    from remetal.workflows.restore import Prepared

STATE = Path("/run/remetal")
MEDIUM = Path("/usr/lib/remetal/start")
"""Exists on a recovery medium and nowhere else."""

_WIDTH = 76


def recovery(
    *,
    look: Annotated[
        bool, Parameter(name="--look", negative="", help="Say what would be done unattended, and do nothing.")
    ] = False,
    output: Output = Output(),
) -> int:
    """Recover this machine: the program on the consoles of the recovery medium.

    It does what the kernel's command line (`remetal.repo=…`) or an answer file on an attached volume says. If
    nobody says anything, it asks. It runs on the recovery medium only.
    """
    if not MEDIUM.exists():
        raise RefusedError(
            "this is not a recovery medium",
            hint="Make one with `remetal media build`, or restore from here with `remetal restore`.",
        )
    STATE.mkdir(parents=True, exist_ok=True)
    if look:
        found = find_answer(_command_line(), lambda event: None)
        print(f"unattended, by {found.origin}" if found else "nobody said anything: a dialogue")  # noqa: T201
        return 0
    attended = STATE / "attended"
    if not attended.exists():
        with logged(STATE / "recovery.log", everywhere=True) as log:
            code = run_unattended(log, output)
        attended.touch()
        if code is not None:
            return code
        if _command_line().mode == "shell":
            return 0
    from remetal.cli.dialogue import hold_dialogue

    return hold_dialogue(STATE / "recovery.log", output)


def run_unattended(log: Path, output: Output) -> int | None:
    """Do what this machine was told to do, show and log it, and return its exit code; None without a word."""
    recovery = Recovery(None)
    with reporting(output) as report:
        try:
            found = find_answer(_command_line(), report)
            if found is None:
                return None
            recovery.found = found
            report(Step(f"Recovering unattended, by {found.origin}"))
            recover(recovery, _agreeing(recovery, found, report), report)
        except (RemetalError, KeyboardInterrupt) as error:
            return fail(recovery, as_failure(error), log, report)
        except Exception as error:  # noqa: BLE001 - nobody sits here: whatever it is has to reach the log
            failure = RemetalError(f"an error in remetal itself: {type(error).__name__}: {error}")
            return fail(recovery, failure, log, report)
        return finish(recovery, found.answer.end, log, report)


def as_failure(error: RemetalError | KeyboardInterrupt) -> RemetalError:
    """Return the error to show: a Ctrl-C that reaches us came before the first write, later ones are told by it."""
    return error if isinstance(error, RemetalError) else RefusedError("stopped by Ctrl-C; nothing was touched")


def finish(recovery: Recovery, end: End, log: Path, report: Report) -> int:
    """Leave the log, say that it is done, and do what the answer wants at the end."""
    done = recovery.report
    assert done is not None
    report(Note(f"wrote {format_bytes(done.written)} in {format_duration(recovery.seconds)}"))
    leave_log(recovery, log.read_bytes(), report)
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    since = f"{uptime:.0f} s after the kernel started"
    say(f"remetal: recovery finished in {recovery.seconds:.0f} s ({since}), next: {end}")
    if end != "shell":
        end_machine(end)
    return 0


def fail(recovery: Recovery, error: RemetalError, log: Path, report: Report) -> int:
    """Show what went wrong in a frame and leave the log. A shell follows, never a reboot."""
    say("", *frame("Recovery failed", error, recovery), "")
    leave_log(recovery, log.read_bytes(), report)
    say(f"remetal: recovery failed with exit code {error.exit_code}")
    return error.exit_code


def frame(title: str, error: RemetalError, recovery: Recovery) -> list[str]:
    """Return the lines of a frame that tells an error, its hint, and what it means for the disks."""
    from textwrap import wrap

    lines = [*wrap(f"{error.message}.", _WIDTH - 4, break_on_hyphens=False), ""]
    if error.hint:
        lines += [*wrap(error.hint, _WIDTH - 4, break_on_hyphens=False), ""]
    lines.append(f"exit code {error.exit_code}: {error.meaning}")
    if recovery.found is not None:
        lines.append(f"told by: {recovery.found.origin}"[: _WIDTH - 4])
    lines.append(f"log: {STATE / 'recovery.log'}")
    rule = "-" * (_WIDTH - len(title) - 5)
    return [f"+- {title} {rule}+", *(f"| {line:<{_WIDTH - 4}} |" for line in lines), f"+{'-' * (_WIDTH - 2)}+"]


def end_machine(end: End) -> None:
    """Let init unmount everything and reboot or power off."""
    (STATE / "ending").touch()
    run([end])


def say(*lines: str) -> None:
    """Print lines where everybody sees them, at once."""
    for line in lines:
        print(line, flush=True)  # noqa: T201


def _agreeing(recovery: Recovery, found: Found, report: Report) -> Callable[[Prepared], None]:
    def agree(prepared: Prepared) -> None:
        from remetal.cli.layouts import plan_view
        from remetal.cli.output import result_console

        for each in plan_view(prepared):
            result_console().print(each)
        check_first_time(recovery)
        pause = found.answer.pause
        if pause:
            report(Step(f"Carrying out plan {short(prepared.plan.id)} in {pause} s; Ctrl-C stops it"))
            time.sleep(pause)

    return agree


def _command_line() -> CommandLine:
    return parse_command_line(Path("/proc/cmdline").read_text())


@contextmanager
def logged(log: Path, *, everywhere: bool = False) -> Iterator[Path]:
    """Let everything printed in this block appear in `log` too, which is yielded, and on every console if wanted."""
    with log.open("a", encoding="utf-8", errors="replace") as file:
        tee = _Tee([sys.stdout, file, *(_other_consoles() if everywhere else ())])
        with redirect_stdout(tee), redirect_stderr(tee):
            yield log


def _other_consoles() -> list[TextIO]:
    """Open the kernel's other consoles; one that nobody reads must not hold us up, so none blocks."""
    names = Path("/sys/class/tty/console/active").read_text().split()
    own = os.ttyname(0) if sys.stdin.isatty() else ""
    consoles: list[TextIO] = []
    for name in names:
        path = f"/dev/{'tty1' if name == 'tty0' else name}"
        if path != own and not (name == names[-1] and own == "/dev/console"):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
            except OSError:
                continue
            consoles.append(io.TextIOWrapper(os.fdopen(fd, "wb", buffering=0), errors="replace", write_through=True))
    return consoles


class _Tee(io.TextIOBase):
    """A text stream that writes to several; one that fails is left out from then on, the first always counts."""

    def __init__(self, streams: list[TextIO]) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in list(self._streams):
            try:
                stream.write(text)
                stream.flush()
            except OSError:
                if stream is self._streams[0]:
                    raise
                self._streams.remove(stream)
        return len(text)

    def flush(self) -> None:
        """Everything is written at once."""

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False
