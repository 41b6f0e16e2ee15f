"""The process that keeps a promise if the one who gave it cannot: it runs programs when he is gone, or takes too long.

`python -I -S SCRIPT` gets a line of JSON: `wait`, in how many seconds it is time (or null), `limit`, how many
seconds each of the `commands` has, and their environment `env`. It says `ready`, and waits. A byte releases it. When
the time is over, or who asked is gone, it runs the commands one after the other, whatever becomes of each, and says
`kept`.

It imports nothing of remetal and writes to no file.
"""

import contextlib
import io
import json
import os
import select
import signal
import subprocess
from pathlib import Path


def is_released(wait: float | None) -> bool:
    """Wait until it is time; return whether there is nothing to do any more."""
    ready = select.select([0], [], [], wait)[0]
    return bool(ready) and bool(os.read(0, 1))


def run(argv: list[str], limit: float, env: dict[str, str]) -> None:
    """Run a program for at most so many seconds, as a session of its own."""
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """Wait, and do what was promised."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("promise-keeper")  # `killall python3` does not mean it
    promise = json.loads(io.FileIO(0, closefd=False).readline())
    os.write(1, b"ready\n")
    if is_released(promise["wait"]):
        return
    for argv in promise["commands"]:
        run(argv, promise["limit"], promise["env"])
    with contextlib.suppress(OSError):
        os.write(1, b"kept\n")


if __name__ == "__main__":
    main()
