"""Run programs under a Linux kernel of our own: User Mode Linux, with the host's files as its root.

A build host may have no device-mapper, no MD, no vfat, no partition scanning. User Mode Linux has them all,
boots in about three seconds and computes at native speed. Inside, `/` is the host's own file system, written
through, so the checkout, its `.venv` and all tools are where they always are; every disk file that is handed in
becomes `/dev/ubda`, `/dev/ubdb`, … in that order, with its partitions scanned (`/dev/ubda1`, …).

    outcome = run_in_uml("mkfs.vfat /dev/ubda1", disks=[disk])

Source: the kernel's Documentation/virt/uml/user_mode_linux_howto_v2.rst.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import CHECKOUT
from lab.cache import cached
from remetal.errors import RemetalError
from remetal.system.run import Argv, find_program, need_programs
from remetal.units import MIB, format_duration

_MODULES = Path("/usr/lib/uml/modules")
_REBOOT_POWER_OFF = 0x4321FEDC  # LINUX_REBOOT_CMD_POWER_OFF in <linux/reboot.h>


class UmlFailedError(RemetalError):
    """What ran inside ended with an exit code that the caller did not allow, or the kernel never came back."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the work inside left: its exit code and both outputs, as text, and the kernel's console."""

    returncode: int
    stdout: str
    stderr: str
    console: str


def python_argv(code: str) -> list[str]:
    """Return the argv that runs a Python snippet with the checkout's own environment."""
    return [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n{code}"]


def disk_device(index: int, partition: int | None = None) -> str:
    """Return the path, inside, of the disk handed in at `index`, or of one of its partitions."""
    return f"/dev/ubd{string.ascii_lowercase[index]}{'' if partition is None else partition}"


def run_in_uml(
    work: str | Argv,
    *,
    disks: Sequence[Path] = (),
    memory: int = 512 * MIB,
    timeout: float = 300.0,
    cwd: Path = CHECKOUT,
    env: Mapping[str, str] | None = None,
    allowed: Sequence[int] = (0,),
    log: Path | None = None,
) -> Outcome:
    """Boot a kernel, run `work` as root with udev started, power off, and return the outcome.

    `work` is a bash script (run with `-euo pipefail`), a script of another language that starts with `#!`, or an
    argv list. `disks` are files, up to 16, writable inside; what was written is in them when this returns.
    `memory` is in bytes, `timeout` in seconds for everything together. The console is also left at `log`.
    Raises UmlFailedError for an exit code that is not `allowed`, a kernel that died, or a timeout.
    """
    need_programs("linux.uml", "udevadm")
    with TemporaryDirectory(prefix="uml-") as place:
        folder = Path(place)
        init = _write_job(folder, work, cwd, env or {})
        _boot(_kernel_argv(folder, init, disks, memory), folder, timeout, log)
        outcome = _read_outcome(folder)
    if outcome.returncode not in allowed:
        raise UmlFailedError(
            f"the work in User Mode Linux failed with exit code {outcome.returncode}: {_tail(outcome.stderr)}",
            hint=f"Its output was: {_tail(outcome.stdout)}",
        )
    return outcome


def _kernel_argv(folder: Path, init: Path, disks: Sequence[Path], memory: int) -> list[str]:
    program = find_program("linux.uml")
    assert program is not None
    return [
        program,
        f"mem={memory // MIB}M",
        *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "rw", "quiet", "con=null", "con0=null,fd:1"),
        f"uml_dir={folder}",
        "umid=uml",
        *(f"ubd{index}={disk.resolve()}" for index, disk in enumerate(disks)),
        f"init={init}",
    ]


def _write_job(folder: Path, work: str | Argv, cwd: Path, env: Mapping[str, str]) -> Path:
    """Write the work and pid 1 into the folder; return pid 1's path."""
    if isinstance(work, str):
        script = work if work.startswith("#!") else f"#!/bin/bash\nset -euo pipefail\n{work}\n"
    else:
        script = f"#!/bin/bash\nexec {shlex.join(os.fspath(word) for word in work)}\n"
    _write_program(folder / "work", script)
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    )
    variables = {"PATH": path, "HOME": "/root", "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", **env}
    settings = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    power_off = f"import ctypes; ctypes.CDLL(None).reboot({_REBOOT_POWER_OFF:#x})"
    init = folder / "init"
    _write_program(
        init,
        _INIT.format(
            settings=settings,
            cwd=shlex.quote(str(cwd)),
            folder=shlex.quote(str(folder)),
            modules=shlex.quote(str(_MODULES)),
            power_off=shlex.join([sys.executable, "-I", "-c", power_off]),
        ),
    )
    # A mount point that hosts without modules of their own may lack; inside, a tmpfs hides it.
    Path("/lib/modules").mkdir(exist_ok=True)
    return init


_INIT = """#!/bin/bash
{settings}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock /run/udev
ln -sfn /proc/self/fd /dev/fd
ln -sfn fd/0 /dev/stdin; ln -sfn fd/1 /dev/stdout; ln -sfn fd/2 /dev/stderr
mount -t tmpfs modules /lib/modules
for each in {modules}/*; do ln -s "$each" /lib/modules/; done
# What LVM and friends note about this kernel's volumes must not land in the host's /etc.
for each in /etc/lvm/archive /etc/lvm/backup /etc/lvm/devices; do
  mkdir -p $each && mount -t tmpfs private $each
done
ip link set lo up 2>/dev/null || true
modprobe --all --quiet loop dm-mod fuse || true
udevd=$(command -v systemd-udevd || echo /lib/systemd/systemd-udevd)
$udevd --daemon
# Disks only: the hundreds of terminals that this kernel brings along would take udev seconds.
udevadm trigger --action=add --subsystem-match=block
udevadm settle
cd {cwd}
{folder}/work </dev/null >{folder}/stdout 2>{folder}/stderr
echo $? >{folder}/exit.part
cd /
umount --all --types nohostfs,noproc,nosysfs,nodevtmpfs,nodevpts,notmpfs
sync
mv {folder}/exit.part {folder}/exit
exec {power_off}
"""


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _find_preload() -> dict[str, str]:
    """Return the environment that lets the kernel run on a processor with AMX (see xstate.c); nothing on others."""
    if not re.search(r"^flags\s*:.*\bamx_tile\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
        return {}
    source = Path(__file__).with_name("xstate.c")

    def build(path: Path) -> None:
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", path, source], check=True)

    library = cached("uml-xstate", [source.read_text()], build)
    return {"LD_PRELOAD": str(library)}


def _boot(argv: Sequence[str], folder: Path, timeout: float, log: Path | None) -> None:
    """Run the kernel to its end. It is a group of processes: all of them are ended whatever happens."""
    console = folder / "console"
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(folder)
    expired = False
    with console.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": memory, **_find_preload()},
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            expired = True
        finally:
            _end_group(process)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(console.read_bytes())
    if expired or not (folder / "exit").exists():
        reason = f"did not end within {format_duration(timeout)}" if expired else "died"
        said = [_text(folder / name) for name in ("console", "stdout", "stderr")]
        raise UmlFailedError(
            f"the User Mode Linux kernel {reason}: {_tail(said[0])}",
            hint=f"The work had said: {_tail(said[1])} / {_tail(said[2])}",
        )


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_outcome(folder: Path) -> Outcome:
    stdout, stderr, console = (_text(folder / name) for name in ("stdout", "stderr", "console"))
    return Outcome(int(_text(folder / "exit")), stdout, stderr, console)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _tail(text: str, lines: int = 8) -> str:
    kept = [line.strip() for line in text.splitlines() if line.strip()][-lines:]
    return " / ".join(kept) or "nothing"
