"""What a fuzz target is: a parser that meets any bytes, and what may come of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

SECONDS = 2.0
"""Processor time that one input may take."""
MEMORY = 256
"""MiB that a target may take with all its inputs, beyond what the interpreter itself does."""


@dataclass(frozen=True)
class Target:
    """A parser under test. `run` may raise `errors` and nothing else; it asserts whatever else has to hold.

    `seeds` makes good inputs. `believed` are checks that no fuzzer gets past, checksums mostly, and what stands in
    their place: so the code behind them is reached.
    """

    name: str
    run: Callable[[bytes], None]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], Iterable[bytes]]
    believed: Mapping[str, Any] = field(default_factory=dict)

    def meet(self, data: bytes) -> None:
        """Let the target meet one input. Raises whatever it should not have raised."""
        with ExitStack() as stack:
            for name, value in self.believed.items():
                stack.enter_context(patch(name, value))
            stack.enter_context(suppress(*self.errors))
            self.run(data)


class Right(int):
    """A checksum that is the one that is expected, whichever that is."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 0


def right(*_: object) -> Right:
    """Compute it."""
    return Right()
