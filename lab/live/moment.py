"""The moment of which a backup is, as the ledger outside of the machine knows it.

A hook of the backup says which phase it is, and waits until it was written down what every client had sent by then, and
what was acknowledged. So no clock takes part in that: while everything is frozen nothing can be committed, so what was
acknowledged has to be in the backup, and what was not sent cannot be.

Before Linux 6.8 no hook can run in that phase if a volume is to be read from a snapshot. There the moment is between
two notes, one right before it and one right after it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lab.live.cases import LiveCase
from lab.live.guest import Guest
from lab.live.ledger import Client

HOOKS = "/run/moment/hooks.toml"
"""The file in the machine that `remetal backup` has to be told of."""
_WATCH = """
exec 3<>/run/moment/told 4<>/run/moment/noted
while read -r phase <&3; do echo $phase; read -r noted; echo noted >&4; done
"""


@dataclass(frozen=True, slots=True)
class Noted:
    """How many transactions each client had acknowledged, and sent, when a phase of a backup was told."""

    phase: str
    acknowledged: tuple[int, ...]
    sent: tuple[int, ...]


def find_phases(case: LiveCase) -> tuple[str, ...]:
    """Return the phases at which something is noted of a backup of the case's machine."""
    return ("before-freeze", "after-thaw") if any(each.on == "LVM-thin" for each in case.places) else ("frozen",)


def plan_moment(case: LiveCase) -> str:
    """Return the script that makes the hook, in memory: what lies on a disk is frozen."""
    phases = ", ".join(f'"{phase}"' for phase in find_phases(case))
    return f"""
set -eux
mkdir /run/moment
mkfifo /run/moment/told /run/moment/noted
echo 'echo $REMETAL_PHASE > /run/moment/told; read -r noted < /run/moment/noted' > /run/moment/hook
echo '[[hook]]
run = ["/bin/sh", "/run/moment/hook"]
at = [{phases}]' > {HOOKS}
"""


@contextmanager
def noting(guest: Guest, clients: Sequence[Client]) -> Iterator[list[Noted]]:
    """Write down each phase that a backup in the machine tells of until the block is left."""
    notes: list[Noted] = []
    with guest.start(_WATCH) as session:
        assert session.stdin is not None
        told, answer = session.stdout, session.stdin

        def note() -> None:
            for phase in told or ():
                acknowledged = tuple(each.acknowledged for each in clients)
                notes.append(Noted(phase.decode().strip(), acknowledged, tuple(each.sent for each in clients)))
                answer.write(b"noted\n")
                answer.flush()

        thread = threading.Thread(target=note, name="moment")
        thread.start()
        try:
            yield notes
        finally:
            session.kill()
            thread.join()
