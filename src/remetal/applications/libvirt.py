"""Guests of libvirt: their agents freeze the file systems in them from before the freeze until after it.

So an image of a guest that lies on what is captured is as if the guest had been captured itself. They are thawed
whatever happens, also when remetal is killed, and at the latest when twice the limit is over.

Source: virsh(1), domfsfreeze and domfsthaw.
"""

from __future__ import annotations

from contextlib import ExitStack

from remetal.applications.contract import Moment, Phase, Settings
from remetal.errors import RemetalError
from remetal.system.limited import run_within
from remetal.system.promises import Promise, promised

_LEAST = 5.0
"""Seconds in which a guest may be thawed even if there are none any more."""


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
        self._open = ExitStack()
        self._promise: Promise | None = None

    def carry_out(self, moment: Moment) -> None:
        """Freeze the guests, or thaw them. Who cannot be frozen is named when all others are."""
        if moment.phase == "before-freeze":
            self._freeze(moment)
        else:
            self._thaw(moment)

    def _freeze(self, moment: Moment) -> None:
        guests = self._settings.guests or tuple(self._running(moment))
        if not guests:
            moment.tell("no guest is running")
            return
        thaws = [self._virsh("domfsthaw", guest) for guest in guests]
        held = promised(thaws, env={}, limit=max(moment.limit, _LEAST), wait=2 * moment.limit)
        self._promise = self._open.enter_context(held)
        failures = []
        for guest in guests:
            self._told[guest] = False
            try:
                run_within(moment.left(), self._virsh("domfsfreeze", guest), env={})
            except RemetalError as error:
                failures.append(f"guest {guest} was not frozen: {error.message}")
            else:
                self._told[guest] = True
        if failures:
            raise RemetalError(
                "; ".join(failures),
                hint='See whether its agent answers: virsh qemu-agent-command GUEST \'{"execute":"guest-ping"}\'; or '
                'name the guests that have one: guests = ["GUEST"].',
            )

    def _thaw(self, moment: Moment) -> None:
        told, self._told = self._told, {}
        promise, self._promise = self._promise, None
        failures: list[str] = []
        with self._open, ExitStack() as each_of_them:
            for guest, was_frozen in told.items():
                each_of_them.callback(self._thaw_one, guest, was_frozen, moment, failures)
            each_of_them.close()
            if promise is not None and not promise.release():
                failures.append(f"the guests were not frozen until the end, but for {2 * moment.limit:g} s")
        if failures:
            raise RemetalError(
                "; ".join(failures), hint=f"Try it by hand: virsh -c {self._settings.uri} domfsthaw GUEST"
            )

    def _thaw_one(self, guest: str, was_frozen: bool, moment: Moment, failures: list[str]) -> None:
        """Thaw a guest, also one that may have been frozen after we ceased to wait for it."""
        try:
            run_within(max(moment.left(), _LEAST), self._virsh("domfsthaw", guest), env={})
        except RemetalError as error:
            if was_frozen:
                failures.append(f"guest {guest} was not thawed: {error.message}")

    def _running(self, moment: Moment) -> list[str]:
        done = run_within(moment.left(), self._virsh("list", "--name", "--state-running"), env={})
        return [line for line in done.text.splitlines() if line]

    def _virsh(self, command: str, *words: str) -> list[str]:
        return ["virsh", "--quiet", "--connect", self._settings.uri, command, *words]
