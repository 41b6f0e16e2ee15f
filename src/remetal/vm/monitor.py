"""QEMU's monitor, spoken to from ordinary code: QMP lives in an event loop on a thread of its own.

Source: QEMU's QMP protocol specification and QAPI reference.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from qemu.qmp import ExecInterruptedError, QMPClient, QMPError

from remetal.errors import RemetalError

T = TypeVar("T")

_PATIENCE = 30.0
"""Seconds in which QEMU answers any command, even on a busy host."""


class MonitorError(RemetalError):
    """QEMU refused a command, or is gone."""


class Monitor:
    """An open conversation with one QEMU."""

    def __init__(self, client: QMPClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Run a QMP command and return its answer. Raises MonitorError if QEMU refuses it or has ended."""
        try:
            return self._wait(self._client.execute(command, arguments))
        except (QMPError, ExecInterruptedError, TimeoutError) as error:
            raise MonitorError(f"the virtual machine's monitor did not do '{command}': {error}") from error

    def events(self) -> list[Mapping[str, Any]]:
        """Return every event that QEMU has sent since the start, the oldest first, as QMP objects."""
        return [dict(event) for event in self._client.events.history]

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(_PATIENCE)
        except concurrent.futures.TimeoutError as error:
            future.cancel()
            raise TimeoutError(f"no answer within {_PATIENCE:.0f} s") from error


@contextmanager
def open_monitor(connection: socket.socket) -> Iterator[Monitor]:
    """Speak QMP over a connected socket for the length of a block. Takes the socket over.

    Raises MonitorError if nobody answers.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="qmp", daemon=True)
    thread.start()
    client = QMPClient("remetal")
    # Its own log lines would tell users of what we handle: a QEMU that ends hangs up.
    client.logger.disabled = True
    monitor = Monitor(client, loop)
    try:
        try:
            monitor._wait(client.connect(connection))
        except (QMPError, TimeoutError) as error:
            raise MonitorError(f"the virtual machine's monitor does not answer: {error}") from error
        yield monitor
    finally:
        with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
            monitor._wait(client.disconnect())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        connection.close()
