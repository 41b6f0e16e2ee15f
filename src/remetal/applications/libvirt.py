"""Guests of libvirt: their agents freeze the file systems in them from before the freeze until after it.

So an image of a guest that lies on what is captured is as if the guest had been captured itself. They are thawed
whatever happens, also when remetal is killed, and at the latest when twice the limit is over. A guest goes on freezing
if nobody waits for it any more, and cannot be thawed until it has; so what cannot be thawed is left to a process that
goes on trying.

Source: virsh(1), domfsfreeze and domfsthaw.
"""

from __future__ import annotations

from contextlib import ExitStack

from remetal.applications.contract import Moment, Phase, Settings
from remetal.errors import RemetalError
from remetal.system.limited import run_within
from remetal.system.promises import Promise, promised
from remetal.system.run import ProgramFailedError

_LEAST = 5.0
"""Seconds in which a guest may be thawed even if there are none any more."""
_AGAIN = 600.0
"""Seconds for which it is tried again to thaw one that cannot be thawed."""


class LibvirtSettings(Settings, frozen=True, kw_only=True):
    """Where the guests run, and which are meant: all that are running, unless some are named."""

    uri: str = "qemu:///system"
    guests: tuple[str, ...] = ()


class Libvirt:
    """The guests of one host, and those of them that were told to freeze."""

    name = "libvirt"
    phases: tuple[Phase, ...] = ("before-freeze", "after-thaw")

    def __init__(self, settings: LibvirtSettings) -> None:
        self._settings = settings
        self._told: dict[str, bool] = {}
        """Whether each guest that was told may be frozen; libvirt says of the others that they are not."""
        self._open = ExitStack()
        self._promise: Promise | None = None

    def carry_out(self, moment: Moment) -> None:
        """Freeze the guests, or thaw them. Who cannot be frozen is named when all others are."""
        if moment.phase == "before-freeze":
            self._freeze(moment)
        else:
            self._thaw(moment)

    def _freeze(self, moment: Moment) -> None:
        guests = list(dict.fromkeys(self._settings.guests or self._running(moment)))
        if not guests:
            moment.tell("no guest is running")
            return
        thaws = [self._virsh("domfsthaw", guest) for guest in guests]
        held = promised(thaws, env={}, limit=max(moment.limit, _LEAST), wait=2 * moment.limit, again=_AGAIN)
        self._promise = self._open.enter_context(held)
        failures = []
        for guest in guests:
            self._told[guest] = True
            try:
                run_within(moment.left(), self._virsh("domfsfreeze", guest), env={})
            except RemetalError as error:
                self._told[guest] = isinstance(error, ProgramFailedError) and error.returncode < 0
                failures.append(f"guest {guest} was not frozen: {error.message}")
        if failures:
            raise RemetalError(
                "; ".join(failures),
                hint='See whether its agent answers: virsh qemu-agent-command GUEST \'{"execute":"guest-ping"}\'; or '
                'name the guests that have one: guests = ["GUEST"].',
            )

    def _thaw(self, moment: Moment) -> None:
        told, self._told = self._told, {}
        promise, self._promise = self._promise, None
        failures: dict[str, str] = {}
        with self._open, ExitStack() as each_of_them:
            for guest in told:
                each_of_them.callback(self._thaw_one, guest, moment, failures)
            each_of_them.close()
            left = [number for number, guest in enumerate(told) if guest in failures]
            begun = promise is not None and not (promise.keep(left) if left else promise.release())
        said = [f"guest {guest} was not thawed: {why}" for guest, why in failures.items() if told[guest]]
        hint = f"It is tried again for {_AGAIN / 60:g} minutes. By hand: virsh -c {self._settings.uri} domfsthaw GUEST"
        if begun:
            said.append(f"the guests were not frozen until the end, but for {2 * moment.limit:g} s")
        if said:
            raise RemetalError("; ".join(said), hint=hint if left else "Allow more time: a higher limit.")

    def _thaw_one(self, guest: str, moment: Moment, failures: dict[str, str]) -> None:
        """Thaw a guest, also one that may have been frozen after we ceased to wait for it."""
        try:
            run_within(max(moment.left(), _LEAST), self._virsh("domfsthaw", guest), env={})
        except RemetalError as error:
            failures[guest] = error.message

    def _running(self, moment: Moment) -> list[str]:
        done = run_within(moment.left(), self._virsh("list", "--name", "--state-running"), env={})
        return [line for line in done.text.splitlines() if line]

    def _virsh(self, command: str, *words: str) -> list[str]:
        return ["virsh", "--quiet", "--connect", self._settings.uri, command, *words]
