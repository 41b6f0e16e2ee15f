"""The errors an administrator sees: what happened, to what, and what to do next.

Every error that may reach a person is one of these classes. The class fixes the process's exit code,
so that a script can tell a refusal from a failure. Only the command line prints them and exits.
"""

from __future__ import annotations

from typing import ClassVar


class RemetalError(Exception):
    """Something went wrong that a person has to know about.

    `message` says what happened and to which disk or object, in one sentence without a full stop.
    `hint` says what to do next; it may be empty where the message leaves no question.
    """

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "failed"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(RemetalError):
    """The command line asks for something that makes no sense."""

    exit_code = 2
    meaning = "usage"


class RefusedError(RemetalError):
    """A check before the first write said no: nothing was touched."""

    exit_code = 3
    meaning = "refused before anything was touched"


class UnfinishedError(RemetalError):
    """Writing to a target began and stopped; running the same command again goes on."""

    exit_code = 4
    meaning = "stopped after writing began, can be resumed"


class DamagedError(RemetalError):
    """The repository holds something other than what was written to it."""

    exit_code = 5
    meaning = "the repository is damaged"


class UnavailableError(RemetalError):
    """The repository or a resource is locked by somebody else or cannot be reached."""

    exit_code = 6
    meaning = "locked or unreachable"


EXIT_CODES: dict[int, str] = {
    0: "done",
    **{
        kind.exit_code: kind.meaning
        for kind in (RemetalError, UsageError, RefusedError, UnfinishedError, DamagedError, UnavailableError)
    },
}
"""The whole contract of exit codes, as `remetal --help` and the reference show it."""
