"""Rendering: events as progress bars or plain lines, results as text or JSON, errors as sentences.

Results go to standard output; everything that happens on the way goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from remetal.errors import RemetalError
from remetal.events import Event, Note, Progress, Report, Step, Warn, silent
from remetal.units import format_bytes, format_duration, format_rate

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from remetal.cli.options import Output


_LONGEST = 4000
"""How many characters of one message are shown: whoever typed more than that knows what it was."""


def clean(text: str) -> str:
    """Return text so that a terminal shows it and obeys nothing in it: what is not printable becomes `\\x…`."""
    return "".join(each if each.isprintable() or each == "\n" else _visible(ord(each)) for each in text)


def _visible(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8 (PEP 383)
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def print_error(error: RemetalError, *, as_json: bool) -> None:
    """Print what happened and what to do next; as JSON also on standard output, for the calling program.

    What cannot be printed is not: the exit code remains.
    """
    with suppress(OSError):
        sys.stdout.flush()
    with suppress(OSError):
        message = clean(error.message).replace("\n", "\n         ")  # nobody's text begins a line of its own
        print(f"remetal: {_shortened(message)}.", file=sys.stderr)  # noqa: T201
        if error.hint:
            print(f"         {_shortened(clean(error.hint))}", file=sys.stderr)  # noqa: T201
    if as_json:
        with suppress(OSError):
            print_json({"error": {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}})
            sys.stdout.flush()


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"


def print_json(value: object) -> None:
    """Print a value as indented JSON that no terminal obeys. Bytes of names that are not UTF-8 are shown as `\\xff`."""
    try:
        text = msgspec.json.encode(value)
    except UnicodeEncodeError:
        text = msgspec.json.encode(_encodable(msgspec.to_builtins(value)))
    shown = msgspec.json.format(text, indent=2).decode()
    for line in shown.split("\n"):
        sys.stdout.write((line if line.isprintable() else "".join(map(_escaped, line))) + "\n")


def _escaped(letter: str) -> str:
    """Return a letter as JSON allows to write it, so that no terminal obeys it."""
    if letter.isprintable():
        return letter
    return json.dumps(letter)[1:-1] if letter != "\x7f" else "\\u007f"


def _encodable(value: object) -> object:
    match value:
        case str():
            return value.encode(errors="surrogateescape").decode(errors="backslashreplace")
        case dict():
            return {_encodable(key): _encodable(each) for key, each in value.items()}
        case list() | tuple():
            return [_encodable(each) for each in value]
    return value


def print_result(
    output: Output,
    value: object,
    *renderables: RenderableType,
    lost: str = "What the command had to do is done; only its report is lost.",
) -> None:
    """Print a command's result: `value` as JSON if asked for, else what people read.

    Raises RemetalError with the hint `lost` if standard output does not take it.
    """
    with delivered(lost):
        if output.json:
            print_json(value)
            return
        console = result_console()
        for each in renderables:
            console.print(each)


@contextmanager
def delivered(lost: str) -> Iterator[None]:
    """Make sure that what the block prints has left the program. Raises RemetalError with the hint `lost`.

    A reader that has gone away (`| head`) is no error of ours: BrokenPipeError.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RemetalError(
            f"standard output does not take the result: {os.strerror(error.errno or 0)}", hint=lost
        ) from error


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
    """Draw bars while something goes on that has an end; in between, the terminal is free for questions."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bars = Bars(*columns, console=console, transient=True, refresh_per_second=4)
    tasks: dict[str, TaskID] = {}

    def show(event: Event) -> None:
        match event:
            case Step(title):
                console.print(f"[bold]==>[/bold] {escape(clean(title))}")
            case Note(text):
                console.print(f"    {escape(clean(text))}")
            case Warn(text, hint):
                console.print(f"[yellow]warning:[/yellow] {escape(clean(_sentences(text, hint)))}")
            case Progress(part, done, total):
                if part not in tasks:
                    bars.start()
                    tasks[part] = bars.add_task(escape(clean(part)), total=total)
                bars.update(tasks[part], completed=done, total=total)
                if done >= total:
                    bars.remove_task(tasks.pop(part))
                    if not tasks:
                        bars.stop()

    try:
        yield show
    finally:
        if tasks:
            bars.stop()


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
                self._say(f"warning: {_sentences(text, hint)}")
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
            left = format_duration((now - began) * (total - done) / done) if done else "?"
            self._say(f"    {part}: {percent} % ({format_bytes(done)} of {format_bytes(total)}), about {left} left")

    @staticmethod
    def _say(line: str) -> None:
        with suppress(OSError):  # a full log, or a reader that is gone, must not stop a backup or a restore
            print(clean(line), file=sys.stderr, flush=True)  # noqa: T201


def _sentences(text: str, hint: str) -> str:
    return f"{text}. {hint}".rstrip()
