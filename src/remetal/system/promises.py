"""What has to be done in any case, even if we are killed meanwhile; see `remetal.system.keeper`."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from remetal.errors import RemetalError
from remetal.system import keeper
from remetal.system.apart import outliving, set_apart
from remetal.system.limited import own_environment
from remetal.system.run import Argv, Process, resolve_program

_PATIENCE = 10.0
_RELEASED = b"."


class Promise:
    """Programs that somebody else runs if we do not come back."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def release(self) -> bool:
        """Let nobody run them any more; return whether nobody has begun to."""
        return self._say(_RELEASED)

    def keep(self, which: Sequence[int]) -> bool:
        """Let some of them be run now, by their numbers, and the others not any more; return as `release` does."""
        return self._say(json.dumps(which).encode())

    def _say(self, word: bytes) -> bool:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), word)
        ready = select.select([self._process.stdout], [], [], _PATIENCE)[0]
        return bool(ready) and not os.read(self._process.stdout.fileno(), 100)


@contextmanager
def promised(
    commands: Sequence[Argv],
    *,
    env: Mapping[str, str],
    limit: float,
    wait: float | None = None,
    again: float = 0.0,
    trusted: Sequence[str] = (),
) -> Iterator[Promise]:
    """Have programs run, each for at most `limit` seconds, if we are gone before the promise is released.

    They also run if it is not released within `wait` seconds, or when the block is left; but nothing runs if somebody
    else may change one of the `trusted` files then. Those that fail are run again for `again` seconds, for which nobody
    waits. `env` is as for `run_within`. Raises ProgramMissingError; RemetalError if nobody is there to keep it.
    """
    asked = {
        "wait": wait,
        "again": again,
        "limit": limit,
        "env": own_environment(env),
        "commands": [resolve_program(argv) for argv in commands],
        "trusted": list(trusted),
    }
    with outliving(keeper.__file__) as process:
        set_apart(process.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(asked).encode() + b"\n")
        ready = select.select([process.stdout], [], [], _PATIENCE)[0]
        if not ready or os.read(process.stdout.fileno(), 100) != b"ready\n":
            raise RemetalError("what has to be there if remetal is killed did not start; nothing was begun")
        yield Promise(process)
