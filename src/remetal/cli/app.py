"""The program `remetal`: its table of commands, and the one place that turns errors into exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from types import FrameType
from typing import TYPE_CHECKING

from remetal import __version__
from remetal.cli.output import print_error
from remetal.errors import EXIT_CODES, RemetalError, UsageError
from remetal.system.mounts import enter_private_mounts

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

COMMANDS = {
    "init": ("remetal.cli.init:init", "Make a repository and its first recipient; print the recovery kit."),
    "probe": ("remetal.cli.probe:probe", "Show a machine's disks, layers and hardware."),
    "backup": ("remetal.cli.backup:backup", "Capture whole disks into a new snapshot."),
    "snapshots": ("remetal.cli.snapshots:snapshots", "List the snapshots in a repository."),
    "show": ("remetal.cli.show:show", "Show everything about one snapshot."),
    "bootability": (
        "remetal.cli.bootability:bootability",
        "Say whether a snapshot would boot on some hardware.",
    ),
    "plan": ("remetal.cli.restore:plan", "Show what a restore would do, and the plan's id."),
    "restore": ("remetal.cli.restore:restore", "Bring a machine back onto disks."),
    "check": ("remetal.cli.check:check", "Check that everything is as it was written."),
    "repair": ("remetal.cli.repair:repair", "Mend what is damaged, and take that back."),
    "forget": ("remetal.cli.forget:forget", "Forget snapshots, by name or by a policy."),
    "prune": ("remetal.cli.prune:prune", "Delete what no snapshot needs any more."),
    "copy": ("remetal.cli.copy:copy", "Copy a repository to another place."),
    "export": ("remetal.cli.export:export", "Write one disk of a snapshot to a disk file."),
    "recovery": ("remetal.cli.recovery:recovery", "Recover this machine (on the recovery medium)."),
    "key": ("remetal.cli.key:app", "Passphrases, recipients and the recovery kit."),
    "media": ("remetal.cli.media:app", "Build the recovery medium."),
}
"""Command → what carries it out, imported only when it is called, and its line in the overview."""

_HELP = """Bring a dead computer back: the whole system, onto blank and different metal.

A machine is captured as a deduplicated, encrypted snapshot in a repository (`init`, `backup`). When it dies, a
recovery medium (`media build`) boots on new hardware, shows what a restore would do (`plan`), and does it
(`restore`).

The repository is named by `--repo` or the environment variable REMETAL_REPO.
"""


def _epilogue() -> str:
    codes = "\n".join(f"- {code}: {meaning}" for code, meaning in sorted(EXIT_CODES.items()))
    return f"Exit codes:\n\n{codes}"


def build_app(*, overview: bool) -> App:
    """Return the command line with all its commands.

    For the overview each has its one line; otherwise the one that is called is described by its own docstring.
    """
    from cyclopts import App

    from remetal.cli.options import DEFAULTS

    app = App(
        name="remetal",
        help=_HELP,
        help_epilogue=_epilogue(),
        help_format="markdown",
        version=f"remetal {__version__}",
        help_flags=["--help", "-h"],
        default_parameter=DEFAULTS,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for name, (target, summary) in COMMANDS.items():
        app.command(target, name=name, **({"help": summary} if overview else {}))
    return app


def run_command(argv: Sequence[str]) -> int:
    """Carry out one command line and return its exit code; errors are printed, never raised."""
    if list(argv) == ["--version"]:  # asked by every inventory script: it loads nothing
        print(f"remetal {__version__}")  # noqa: T201
        return 0
    from cyclopts import CycloptsError

    as_json = "--json" in argv
    debug = "--debug" in argv
    try:
        app = build_app(overview=not any(word in COMMANDS for word in argv))
        result = app(list(argv), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        usage = _explain(error, next((word for word in argv if word in COMMANDS), ""))
        print_error(usage, as_json=as_json)
        return usage.exit_code
    except RemetalError as error:
        if debug:
            raise
        print_error(error, as_json=as_json)
        return error.exit_code
    except KeyboardInterrupt:
        print_error(RemetalError("interrupted; nothing that was acknowledged is lost"), as_json=as_json)
        return RemetalError.exit_code
    except BrokenPipeError:  # whoever read our output has what they wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return RemetalError.exit_code
    except Exception as error:
        if debug:
            raise
        fault = RemetalError(
            f"an error in remetal itself: {type(error).__name__}: {error}",
            hint="Run the command again with --debug, and report what it prints.",
        )
        print_error(fault, as_json=as_json)
        return fault.exit_code
    return result if isinstance(result, int) else 0


def _explain(error: CycloptsError, command: str) -> UsageError:
    from cyclopts.exceptions import UnknownCommandError, UnusedCliTokensError

    help_hint = f"See `remetal {command}{' ' if command else ''}--help`."
    match error:
        case UnknownCommandError(unused_tokens=[word, *_]):
            return UsageError(f"there is no command '{word}'", hint=help_hint)
        case UnusedCliTokensError(unused_tokens=[*words]):
            return UsageError(f"there is too much on the command line: {' '.join(words)}", hint=help_hint)
    return UsageError(str(error).strip().rstrip("."), hint=help_hint)


def main() -> None:
    """Run the program and exit with its code. A polite kill, or a lost connection, ends it like Ctrl-C does."""
    _open_standard_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    enter_private_mounts()
    code = run_command(sys.argv[1:])
    _drop_unwritable()
    sys.exit(code)


def _drop_unwritable() -> None:
    """Let go of output that nobody takes, which would change the exit code when the interpreter ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_standard_streams() -> None:
    """Make sure that the descriptors 0 to 2 are taken: what is meant for a closed one must not reach a disk."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
