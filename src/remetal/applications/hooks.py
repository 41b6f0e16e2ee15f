"""What is done around the moment of which a backup is: applications are told before, in it, after it and at the end.

They are told in the order of the file before the freeze and in it, and in the opposite order after it. Whoever was told
before is told after, whatever happens in between: another's failure, a file system that cannot be frozen, Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

from remetal.applications.contract import Application, Moment, OnFailure, Phase
from remetal.applications.trust import need_trusted
from remetal.errors import RemetalError
from remetal.events import Event, Note, Report, Step, Warn, silent


class HookFailedError(RemetalError):
    """An application without which there is to be no backup was not ready, or was not told."""


@dataclass(frozen=True, slots=True)
class Hook:
    """An application, as the file's table of that number asks for it; `limit` is in seconds, for each phase.

    `trusted` are files that it obeys: nobody but root may be able to change them.
    """

    number: int
    application: Application
    limit: float
    on_failure: OnFailure
    trusted: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"hook {self.number} ({self.application.name})"


class Hooks:
    """The hooks of one backup of a machine. Without any, nothing is done."""

    def __init__(self, hooks: Sequence[Hook] = (), *, machine: str = "", report: Report = silent) -> None:
        self.snapshot: str | None = None
        """The id of the snapshot, once it is complete."""
        self._hooks = hooks
        self._machine = machine
        self._report = report
        self._folders: Sequence[Path] = ()
        self._unreported: list[Event] = []

    @contextmanager
    def backup(self) -> Iterator[None]:
        """Carry out a backup, and tell at its end whether it is complete. Raises HookFailedError."""
        with ExitStack() as stack:
            for hook in self._at("after-backup"):
                stack.push(partial(self._carry_out_last, hook, "after-backup"))
            yield

    @contextmanager
    def quiet(self, folders: Sequence[Path]) -> Iterator[None]:
        """Make all ready for the freeze of the file systems that are mounted at folders, and let them go after it.

        Raises HookFailedError.
        """
        self._folders = folders
        ready = self._at("before-freeze")
        with ExitStack() as stack:
            if ready:
                self._report(Step(f"Making ready: {', '.join(each.application.name for each in ready)}"))
            for hook in self._hooks:
                if "after-thaw" in hook.application.phases:
                    stack.push(partial(self._carry_out_last, hook, "after-thaw"))
                if hook in ready:
                    self._carry_out(hook, "before-freeze", self._report)
            stack.callback(self._report_late)
            yield

    def frozen(self) -> None:
        """Tell that the file systems are frozen. Raises HookFailedError.

        What is said meanwhile is reported when they are let go, since who shows it may wait for them.
        """
        for hook in self._at("frozen"):
            self._carry_out(hook, "frozen", self._unreported.append)

    def has(self, phase: Phase) -> bool:
        """Whether anybody is told of a phase."""
        return bool(self._at(phase))

    def _at(self, phase: Phase) -> list[Hook]:
        return [each for each in self._hooks if phase in each.application.phases]

    def _report_late(self) -> None:
        events, self._unreported = self._unreported, []
        for event in events:
            self._report(event)

    def _carry_out_last(
        self,
        hook: Hook,
        phase: Phase,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Carry out a phase that comes after what it is about; an error that there is already is not covered up."""
        try:
            self._carry_out(hook, phase, self._report)
        except HookFailedError as failure:
            if error is None:
                raise
            self._report(Warn(failure.message, failure.hint))

    def _carry_out(self, hook: Hook, phase: Phase, report: Report) -> None:
        moment = Moment(phase, hook.limit, self._facts(phase), _teller(hook, report))
        try:
            _tell(hook, moment)
        except RemetalError as error:
            message = f"{hook.label} failed at {phase}: {error.message}"
            if hook.on_failure == "continue":
                report(Warn(message, error.hint))
                return
            raise HookFailedError(message, hint=f"{self._consequence(phase)} {error.hint}".strip()) from error

    def _consequence(self, phase: Phase) -> str:
        if phase == "after-backup" and self.snapshot is not None:
            return f"The backup is complete: snapshot {self.snapshot}."
        return 'Nothing is listed of this backup. Mend it, or let backups go on without it: on-failure = "continue".'

    def _facts(self, phase: Phase) -> dict[str, str]:
        facts = {"REMETAL_MACHINE": self._machine, "REMETAL_FOLDERS": "\n".join(map(str, self._folders))}
        if phase == "after-backup":
            facts["REMETAL_RESULT"] = "failed" if self.snapshot is None else "complete"
            if self.snapshot is not None:
                facts["REMETAL_SNAPSHOT"] = self.snapshot
        return facts


def _tell(hook: Hook, moment: Moment) -> None:
    """Tell an application of a phase. Raises RemetalError, also if others may change what it obeys."""
    try:
        for each in hook.trusted:  # once more: files may have come since
            need_trusted(each)
    except RemetalError:
        if moment.phase == "after-thaw":
            try:
                hook.application.carry_out(replace(moment, obeys=False))
            except RemetalError as error:
                moment.tell(error.message)
        raise
    hook.application.carry_out(moment)


def _teller(hook: Hook, report: Report) -> Callable[[str], None]:
    return lambda line: report(Note(f"{hook.label}: {line}"))
