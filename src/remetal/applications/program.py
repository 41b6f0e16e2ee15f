"""A program of the administrator's own, which is told what goes on by its environment."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from remetal.applications.contract import Moment, Phase, Settings
from remetal.errors import RemetalError
from remetal.system.limited import run_within
from remetal.system.promises import Promise, promised
from remetal.system.run import presentable

_LINES = 20
"""How many of the lines that a program prints are told."""


class ProgramSettings(Settings, frozen=True, kw_only=True):
    """`run` is the program, by its whole path, and its arguments; `at` are the phases at which it runs."""

    run: tuple[str, ...]
    at: tuple[Phase, ...]

    @property
    def trusted(self) -> tuple[str, ...]:
        """The program."""
        return self.run[:1]


class Program:
    """A program that runs at some of the phases; at `after-thaw` even if remetal is killed before it."""

    def __init__(self, settings: ProgramSettings) -> None:
        self.name = Path(settings.run[0]).name
        self.phases = settings.at
        self._argv = settings.run
        self._open = ExitStack()
        self._promise: Promise | None = None

    def carry_out(self, moment: Moment) -> None:
        """Run the program to its end; what it prints is told, up to 20 lines.

        One that is not to be obeyed is not run, and the promise to do it is taken back.
        """
        if moment.phase == "before-freeze" and "after-thaw" in self.phases:
            env = {"REMETAL_PHASE": "after-thaw", **moment.facts}
            promise = promised([self._argv], env=env, limit=moment.limit, trusted=self._argv[:1])
            self._promise = self._open.enter_context(promise)
        if moment.phase != "after-thaw":
            self._run(moment)
            return
        with self._open:
            try:
                if moment.obeys:
                    self._run(moment)
            except RemetalError:
                self._release()
                raise
            self._release()

    def _release(self) -> None:
        if self._promise is not None:
            self._promise.release()
        self._promise = None

    def _run(self, moment: Moment) -> None:
        done = run_within(moment.limit, self._argv, env={"REMETAL_PHASE": moment.phase, **moment.facts})
        printed = (done.stdout + b"\n" + done.stderr).decode("utf-8", "replace")
        said = [line for line in map(presentable, printed.splitlines()) if line]
        for line in said[:_LINES]:
            moment.tell(line)
        if len(said) > _LINES:
            moment.tell(f"… and {len(said) - _LINES} lines more")
