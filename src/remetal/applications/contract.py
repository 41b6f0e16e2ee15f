"""What every application's file provides. One file is one application; the table in `__init__.py` registers it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import msgspec

Phase: TypeAlias = Literal["before-freeze", "frozen", "after-thaw", "after-backup"]
"""The moments at which something can be done about a backup of a machine that is in use, in their order."""

OnFailure: TypeAlias = Literal["end", "continue"]

LIMIT = 30.0
"""Seconds that an application has at each phase, where nobody says otherwise."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What a table of the hooks' file may say whatever the application; each has further keys of its own."""

    limit: float = LIMIT
    on_failure: OnFailure = "end"

    @property
    def trusted(self) -> tuple[str, ...]:
        """The files that are obeyed as root."""
        return ()


SettingsT = TypeVar("SettingsT", bound=Settings)


@dataclass(frozen=True, slots=True)
class Moment:
    """A phase that has begun: how many seconds there are for it, and where lines go that are worth knowing.

    `facts` is what there is to know of the backup, by the names that a program finds in its environment. `obeys` is
    whether files may still be obeyed; if not, what is held is let go without them.
    """

    phase: Phase
    limit: float
    facts: Mapping[str, str]
    tell: Callable[[str], None]
    obeys: bool = True
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return how many seconds there are still."""
        return max(self.began + self.limit - time.monotonic(), 0.0)


class Application(Protocol):
    """Something that is made ready for the moment of which the image is, for the length of one backup."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def phases(self) -> Collection[Phase]:
        """When it has something to do."""

    def carry_out(self, moment: Moment) -> None:
        """Do what is to be done at one of its phases, within the moment's limit.

        `after-thaw` is called whenever `before-freeze` was begun, even if that failed; where others may change by now
        what it would obey, with a moment that says so. Raises RemetalError.
        """


@dataclass(frozen=True, slots=True)
class Kind(Generic[SettingsT]):
    """An application that remetal knows: its settings, and what begins it."""

    settings: type[SettingsT]
    begin: Callable[[SettingsT], Application]


AnyKind: TypeAlias = Kind[Any]
