"""The file of hooks: TOML with a table for each application, in the order in which they are made ready."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import msgspec

from remetal.applications import APPLICATIONS
from remetal.applications.contract import AnyKind, Kind, Settings
from remetal.applications.hooks import Hook
from remetal.applications.program import Program, ProgramSettings
from remetal.applications.trust import check_owner, need_trusted
from remetal.errors import RefusedError, UsageError

HOOKS = Path("/etc/remetal/hooks.toml")
"""Where the hooks are, where nobody says otherwise."""

_PROGRAM = Kind(ProgramSettings, Program)
_EXAMPLE = (
    'It should look so: [[hook]], application = "postgresql", or run = ["/PATH/PROGRAM"], at = ["before-freeze"].'
)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    hook: tuple[dict[str, Any], ...] = ()


def find_hooks() -> Path | None:
    """Return the file of hooks that this machine has, if it has one."""
    return HOOKS if os.path.lexists(HOOKS) else None


def read_hooks(path: Path) -> list[Hook]:
    """Read hooks from a TOML file.

    Raises UsageError if it cannot be read or says what it cannot; RefusedError if somebody other than root, or who runs
    us, could change it or a program that it names.
    """
    try:
        check_owner(path)
        file = msgspec.toml.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise UsageError(f"cannot read the hooks in {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"{path} holds no hooks: {error}", hint=_EXAMPLE) from error
    return [_read_hook(f"{path}, hook {number}", number, table) for number, table in enumerate(file.hook, 1)]


def _read_hook(where: str, number: int, table: dict[str, Any]) -> Hook:
    kind = _kind_of(where, table)
    try:
        settings: Settings = msgspec.convert(
            {key: value for key, value in table.items() if key != "application"}, type=kind.settings
        )
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {error}", hint=_EXAMPLE) from error
    if not 0 < settings.limit < math.inf:
        raise UsageError(f"{where}: limit = {settings.limit:g} is no time", hint="Give seconds, such as limit = 30.")
    if isinstance(settings, ProgramSettings) and not (settings.run and settings.at):
        raise UsageError(f"{where}: {'at' if settings.run else 'run'} is empty", hint=_EXAMPLE)
    trusted = tuple(map(Path, settings.trusted))
    for each in trusted:
        _check_trusted(where, each)
    return Hook(number, kind.begin(settings), settings.limit, settings.on_failure, trusted)


def _kind_of(where: str, table: dict[str, Any]) -> AnyKind:
    name = table.get("application")
    if (name is None) == ("run" not in table):
        raise UsageError(f"{where}: it needs either application or run", hint=_EXAMPLE)
    if name is None:
        return _PROGRAM
    if not isinstance(name, str) or name not in APPLICATIONS:
        raise UsageError(f"{where}: there is no application {name!r}", hint=f"There are: {', '.join(APPLICATIONS)}.")
    return APPLICATIONS[name]


def _check_trusted(where: str, path: Path) -> None:
    if not path.is_absolute():
        raise UsageError(f"{where}: '{path}' is no whole path", hint=f"Write it so: /PLACE/{path.name}.")
    try:
        need_trusted(path)  # if it is missing that is told when it is needed, and may be allowed
    except RefusedError as error:
        raise RefusedError(f"{where}: {error.message}", hint=error.hint) from error
