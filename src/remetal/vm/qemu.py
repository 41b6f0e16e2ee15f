"""Run a virtual machine for the length of a block, and talk to it: serial console, monitor, screen.

with start_machine(Machine(drives=(Drive(disk),)), folder) as running:
    running.wait_for(r"login: ", timeout=300)
    running.powerdown()
    running.wait_for_shutdown(60)
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remetal.errors import RefusedError, RemetalError
from remetal.system.run import Process, need_programs, start, wait_for_end
from remetal.units import format_duration
from remetal.vm.accelerator import probe_accelerator
from remetal.vm.firmware import open_firmware
from remetal.vm.machine import AHCI_PORTS, Machine, plan_argv
from remetal.vm.monitor import Monitor, open_monitor
from remetal.vm.screenshot import encode_png

PANIC = r"Kernel panic - not syncing"
"""What a Linux kernel says when it gives up: waiting for anything else is over then."""

_LOOK = 0.1
"""Seconds between two looks at the serial log."""


class MachineFailedError(RemetalError):
    """A virtual machine ended, panicked or stayed silent instead of doing what was waited for."""


@dataclass(slots=True)
class Running:
    """A machine that runs. `serial_log` holds all that it has said on its serial console, earlier boots first."""

    machine: Machine
    folder: Path
    serial_log: Path
    monitor: Monitor
    _process: Process
    _serial: socket.socket
    _recorder: threading.Thread
    _position: int
    _started: float = field(default_factory=time.monotonic)

    def wait_for(self, pattern: str, timeout: float, *, unless: str = PANIC) -> re.Match[str]:
        """Wait until the serial console says something that matches, and return the match.

        Each call goes on behind the last one's match; `^` and `$` match at lines; terminal control sequences
        are in the text as they came. `timeout` is in seconds. Raises MachineFailedError if it does not come in
        time, if something that matches `unless` comes first, or if the machine ends before.
        """
        wanted, bad = re.compile(pattern, re.MULTILINE), re.compile(unless, re.MULTILINE)
        deadline = time.monotonic() + timeout
        while True:
            ended = self._process.poll() is not None
            if ended:
                self._recorder.join()
            text = self.said(self._position)
            found, failed = wanted.search(text), bad.search(text)
            if failed is not None and (found is None or failed.start() < found.start()):
                raise self._failure(f"said '{failed[0].strip()}' instead of '{pattern}'")
            if found is not None:
                self._position += len(text[: found.end()].encode("latin-1"))
                return found
            if ended:
                raise self._failure(f"ended before it said '{pattern}'")
            if time.monotonic() > deadline:
                raise self._failure(f"did not say '{pattern}' within {format_duration(timeout)}")
            time.sleep(_LOOK)

    def said(self, position: int = 0) -> str:
        """Return the serial console's text from a byte position on, one character for each byte."""
        with self.serial_log.open("rb") as log:
            log.seek(position)
            return log.read().decode("latin-1")

    def send(self, text: str) -> None:
        """Type text on the serial console, `\\n` for Enter. Raises MachineFailedError if the machine has ended."""
        try:
            self._serial.sendall(text.encode())
        except OSError as error:
            raise self._failure("ended before it could read what was typed") from error

    def powerdown(self) -> None:
        """Press the power button: the system shuts itself down."""
        self.monitor.execute("system_powerdown")

    def wake(self) -> None:
        """Press a key on a machine that sleeps (ACPI S3)."""
        self.monitor.execute("system_wakeup")

    def reset(self) -> None:
        """Press the reset button."""
        self.monitor.execute("system_reset")

    def quit(self) -> None:
        """Pull the plug."""
        self.monitor.execute("quit")
        self.wait_for_shutdown(30)

    def status(self) -> str:
        """Return QEMU's word for the machine's state: `running`, `shutdown`, `guest-panicked`, …"""
        answer = self.monitor.execute("query-status")
        assert isinstance(answer, dict)
        return str(answer["status"])

    def events(self) -> list[dict[str, Any]]:
        """Return what QEMU has reported so far as QMP events (SHUTDOWN, RESET, GUEST_PANICKED, …), in order."""
        return [dict(event) for event in self.monitor.events()]

    def screendump(self, path: Path) -> None:
        """Write what the machine's screen shows now as a PNG file."""
        dump = self.folder / "screen.ppm"
        self.monitor.execute("screendump", {"filename": str(dump)})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(dump.read_bytes()))
        dump.unlink()

    def wait_for_shutdown(self, timeout: float) -> str:
        """Wait until the machine is off and return why, in QEMU's words: `guest-shutdown`, `host-qmp-quit`, …

        Raises MachineFailedError if it is still on after `timeout` seconds, or QEMU itself failed.
        """
        returncode = wait_for_end(self._process, timeout)
        if returncode is None:
            raise self._failure(f"was still on after {format_duration(timeout)}")
        self._recorder.join()
        if returncode != 0:
            raise self._failure(f"failed: QEMU ended with {returncode}")
        shutdowns = [event for event in self.events() if event["event"] == "SHUTDOWN"]
        return str(shutdowns[-1]["data"]["reason"]) if shutdowns else "unknown"

    def _failure(self, what: str) -> MachineFailedError:
        panicked = any(event["event"] == "GUEST_PANICKED" for event in self.monitor.events())
        lines = [_plain(line) for line in self.said().splitlines()]
        last = " / ".join([line for line in lines if line][-8:]) or "nothing"
        after = format_duration(time.monotonic() - self._started)
        said = self.folder / "qemu.log"
        complaint = said.read_text(errors="replace").strip() if said.exists() else ""
        return MachineFailedError(
            f"the virtual machine {what} ({after} after its start{', it panicked' if panicked else ''});"
            f" its last lines: {last}{f'; QEMU said: {complaint}' if complaint else ''}",
            hint=f"Its whole serial console is in {self.serial_log}.",
        )


@contextmanager
def start_machine(machine: Machine, folder: Path, *, accelerator: tuple[str, ...] | None = None) -> Iterator[Running]:
    """Start a machine and yield it running; it is ended, if it still runs, when the block is left.

    `folder` (made if missing) gets `serial.log` (a further boot is appended), `qemu.log` and the UEFI variables,
    which the next boot in the same folder finds again. `accelerator` defaults to the fastest that works here.
    Raises RefusedError for a drive that is not there or an impossible description, MachineFailedError if QEMU
    does not start.
    """
    _check(machine)
    need_programs("qemu-system-x86_64")
    folder.mkdir(parents=True, exist_ok=True)
    firmware = open_firmware(folder, secure_boot=machine.secure_boot) if machine.firmware == "uefi" else None
    serial_log = folder / "serial.log"
    serial_log.touch()
    with ExitStack() as stack:
        serial, serial_end = socket.socketpair()
        stack.enter_context(serial)
        recorder = _record(serial, serial_log)
        stack.callback(recorder.join)
        stack.enter_context(serial_end)
        control, control_end = socket.socketpair()
        stack.enter_context(control_end)
        argv = plan_argv(
            machine,
            probe_accelerator() if accelerator is None else accelerator,
            firmware,
            serial_end.fileno(),
            control_end.fileno(),
        )
        position = serial_log.stat().st_size
        ends = (serial_end.fileno(), control_end.fileno())
        (folder / "qemu.log").unlink(missing_ok=True)
        process = stack.enter_context(start(argv, log=folder / "qemu.log", pass_fds=ends))
        serial_end.close()
        control_end.close()
        try:
            monitor = stack.enter_context(open_monitor(control))
        except RemetalError as error:
            said = (folder / "qemu.log").read_text(errors="replace").strip()
            raise MachineFailedError(f"QEMU did not start: {said or error.message}") from error
        yield Running(machine, folder, serial_log, monitor, process, serial, recorder, position)


def _check(machine: Machine) -> None:
    files = [*(drive.path for drive in machine.drives), *([machine.cdrom] if machine.cdrom else [])]
    if machine.direct_boot is not None:
        files += [machine.direct_boot.kernel, *([machine.direct_boot.initrd] if machine.direct_boot.initrd else [])]
    for path in files:
        if not path.is_file() or not os.access(path, os.R_OK):
            raise RefusedError(f"the virtual machine's {path} is not a readable file")
    if sum(drive.bus == "ahci" for drive in machine.drives) > AHCI_PORTS - 1:
        raise RefusedError(f"a virtual machine takes {AHCI_PORTS - 1} AHCI disks beside its CD drive")
    if machine.secure_boot and machine.firmware != "uefi":
        raise RefusedError("Secure Boot needs UEFI firmware")


def _record(serial: socket.socket, log: Path) -> threading.Thread:
    """Append to a log what the guest says, until its end of the socket is closed.

    QEMU's own `logfile` has a character twice whenever the socket was full.
    """

    def read(end: socket.socket) -> None:
        with end, log.open("ab", buffering=0) as file, suppress(ConnectionError):
            while said := end.recv(65536):
                file.write(said)

    thread = threading.Thread(target=read, args=(serial.dup(),), name="serial", daemon=True)
    thread.start()
    return thread


_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b-\x1f]")


def _plain(line: str) -> str:
    return _CONTROL.sub("", line).strip()
