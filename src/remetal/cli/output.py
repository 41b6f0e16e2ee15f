"""Rendering: events as progress bars or plain lines, results as text or JSON, errors as sentences.

Results go to standard output; everything that happens on the way goes to standard error.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from remetal.errors import RemetalError
from remetal.events import Event, Note, Progress, Report, Step, Warn, silent
from remetal.units import format_bytes, format_duration, format_rate

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from remetal.cli.options import Output


def print_error(error: RemetalError, *, as_json: bool) -> None:
    """Print what happened and what to do next; as JSON also on standard output, for the calling program."""
    sys.stdout.flush()
    print(f"remetal: {error.message}.", file=sys.stderr)  # noqa: T201
    if error.hint:
        print(f"         {error.hint}", file=sys.stderr)  # noqa: T201
    if as_json:
        record = {"error": {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}}
        print_json(record)


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    sys.stdout.write(text.decode() + "\n")


def print_result(output: Output, value: object, *renderables: RenderableType) -> None:
    """Print a command's result: `value` as JSON if asked for, else what people read."""
    if output.json:
        print_json(value)
        return
    console = result_console()
    for each in renderables:
        console.print(each)


def result_console() -> Console:
    """Return a console on standard output: as wide as the terminal or $COLUMNS, else wide enough for every table."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    return Console(highlight=False, width=wide, soft_wrap=not sys.stdout.isatty())


@contextmanager
def reporting(output: Output) -> Iterator[Report]:
    """Render events for the length of a block: bars on a terminal, lines elsewhere, nothing if quiet."""
    if output.quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _Lines().show


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, refresh_per_second=4) as bars:
        tasks = {}

        def show(event: Event) -> None:
            match event:
                case Step(title):
                    console.print(f"[bold]==>[/bold] {title}")
                case Note(text):
                    console.print(f"    {text}")
                case Warn(text, hint):
                    console.print(f"[yellow]warning:[/yellow] {text}. {hint}")
                case Progress(part, done, total):
                    if part not in tasks:
                        tasks[part] = bars.add_task(part, total=total)
                    bars.update(tasks[part], completed=done, total=total)
                    if done >= total:
                        bars.remove_task(tasks.pop(part))

        yield show


class _Lines:
    """Plain lines for logs: every step, and progress at most every few seconds."""

    interval = 10.0

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.told: dict[str, float] = {}

    def show(self, event: Event) -> None:
        match event:
            case Step(title):
                self._say(f"==> {title}")
            case Note(text):
                self._say(f"    {text}")
            case Warn(text, hint):
                self._say(f"warning: {text}. {hint}".rstrip())
            case Progress(part, done, total):
                self._progress(part, done, total)

    def _progress(self, part: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = self.began.setdefault(part, now)
        if done >= total:
            del self.began[part]
            self.told.pop(part, None)
            seconds = now - began
            rate = format_rate(total, seconds)
            self._say(f"    {part}: {format_bytes(total)} in {format_duration(seconds)} ({rate})")
        elif now - self.told.setdefault(part, now) >= self.interval:
            self.told[part] = now
            percent = 100 * done // total
            self._say(f"    {part}: {percent} % ({format_bytes(done)} of {format_bytes(total)})")

    @staticmethod
    def _say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201
