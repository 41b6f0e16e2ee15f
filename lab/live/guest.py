"""A machine of the lab with a database, reached by SSH through a port of loopback; and remetal inside it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab import CHECKOUT
from lab.disk import find_mounts_of
from lab.live.cases import PORTS, LiveCase
from lab.machine import Recipe, copy_machine
from lab.proof import wait_for_boot
from lab.root import Root
from remetal.errors import RemetalError
from remetal.events import Report, Step
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import GIB
from remetal.vm.machine import Drive, Machine, Nic
from remetal.vm.qemu import Running, start_machine

_LATER = {"trixie": ("systemd-cryptsetup",)}
"""What a later release has in a package of its own: without it nothing opens what crypttab names."""
_STORAGE = ("lvm2", "mdadm", "cryptsetup", "thin-provisioning-tools", "btrfs-progs", "openssh-server", "netbase")
_DATABASES = {"postgresql": ("postgresql",), "mariadb": ("mariadb-server",)}
_NETWORK = """[Match]
Name=en* eth*

[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
"""
_UNUSED = ("test", "idlelib", "lib2to3", "ensurepip", "turtledemo")
"""Parts of Python that are not taken along."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A machine that runs, and how it is reached."""

    running: Running
    key: Path
    ssh_port: int
    database_port: int

    def call(self, command: str, *, timeout: float = 900, text: str = "") -> str:
        """Run a command there as root and return what it prints. Raises RemetalError with what it said."""
        argv = self._argv(command)
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode != 0:
            raise RemetalError(f"`{command}` ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """Start a command there as root, and return the process here that it talks to."""
        return subprocess.Popen(self._argv(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _argv(self, command: str) -> list[str]:
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes")
        argv = ["ssh", "-i", str(self.key), "-p", str(self.ssh_port), *(f"-o{each}" for each in options)]
        return [*argv, "root@127.0.0.1", command]

    def await_ssh(self, seconds: float) -> None:
        """Wait until it lets us in."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.call("true", timeout=60)
            except (RemetalError, subprocess.TimeoutExpired):
                if time.monotonic() > deadline:
                    raise
                time.sleep(2)
            else:
                return


def find_ports() -> tuple[int, int]:
    """Return two ports of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


def make_disk(case: LiveCase, disk: Path, key: Path, report: Report) -> None:
    """Make the disk of the case's machine, which lets in whoever has the key, and make the key."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    root = Root(case.suite, (*_STORAGE, *_LATER.get(case.suite, ()), *_DATABASES[case.database]))
    copy_machine(Recipe(name=case.name, size=3 * GIB, root=root), disk, report)
    _, span = find_mounts_of(disk)["/"]
    with attach_loop(span, writable=True) as device, mounted(device) as top:
        keys = top / "root/.ssh/authorized_keys"
        keys.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(key.with_suffix(".pub"), keys)
        subprocess.run(["ssh-keygen", "-q", "-A", "-f", top], check=True)
        (top / "etc/systemd/network/lab.network").write_text(_NETWORK)
        subprocess.run(["systemctl", "--quiet", f"--root={top}", "enable", "systemd-networkd", "ssh"], check=True)


def make_tools(image: Path) -> None:
    """Make an image with this checkout and the Python that runs it, each under the path that it has here."""
    library = Path(sys.base_prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    left_out = [str(library / name).lstrip("/") for name in _UNUSED]
    argv = ["mksquashfs", *map(str, _tool_paths()), str(image), "-no-strip", "-quiet", "-no-progress", "-comp", "zstd"]
    subprocess.run([*argv, "-Xcompression-level", "3", "-e", *left_out], check=True, cwd="/", stdout=subprocess.DEVNULL)


def plan_tools(device: str) -> str:
    """Return the script that puts what `make_tools` has made where it belongs, and `remetal` into the path."""
    lines = ["set -eux", "mkdir -p /run/tools", f"mount -t squashfs -o ro {device} /run/tools"]
    lines += [f"mkdir -p {path} && mount --bind /run/tools{path} {path}" for path in _tool_paths()]
    lines.append(f"ln -sfn {Path(sys.executable).with_name('remetal')} /usr/local/bin/remetal")
    return "\n".join(lines) + "\n"


def _tool_paths() -> list[Path]:
    base = Path(sys.base_prefix)
    return [Path(sys.prefix), CHECKOUT / "src", *([] if base == Path("/usr") else [base])]


@contextmanager
def started_guest(
    case: LiveCase, drives: tuple[Drive, ...], folder: Path, key: Path, ports: tuple[int, int], report: Report
) -> Iterator[Guest]:
    """Start the machine with these drives, and yield it when it has booted and lets us in."""
    nic = Nic(forwards=((ports[0], 22), (ports[1], PORTS[case.database])))
    machine = Machine(memory=2 * GIB, drives=drives, nics=(nic,))
    with start_machine(machine, folder) as running:
        report(Step("Booting the machine"))
        wait_for_boot(running, 900)
        guest = Guest(running, key, *ports)
        guest.await_ssh(180)
        yield guest
