"""The one gateway to other programs.

A program gets an argv list (never a shell), a clean environment with `LC_ALL=C.UTF-8`, and no standard
input unless the caller gives some. A failure raises `ProgramFailedError` with a command that can be pasted.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from remetal.errors import RefusedError, RemetalError

Argv = Sequence[str | os.PathLike[str]]

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

Process: TypeAlias = subprocess.Popen[bytes]
"""A program that runs beside us; made by `start`."""

_KEPT = ("HOME", "TMPDIR", "TZ", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_LINE_SHOWN = 300
_MAX_TOLD = 1 << 16
_PATIENCE = 5.0

PACKAGES = {
    "blkid": "util-linux",
    "bsdtar": "libarchive-tools",
    "btrfs": "btrfs-progs",
    "cryptsetup": "cryptsetup-bin",
    "depmod": "kmod",
    "dmsetup": "dmsetup",
    "dpkg-deb": "dpkg",
    "dumpe2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "fsck.exfat": "exfatprogs",
    "fsck.f2fs": "f2fs-tools",
    "fsck.vfat": "dosfstools",
    "grub-mkimage": "grub-common",
    "losetup": "mount",
    "lvm": "lvm2",
    "mariadb": "mariadb-client",
    "mcopy": "mtools",
    "mdadm": "mdadm",
    "mdir": "mtools",
    "mformat": "mtools",
    "mke2fs": "e2fsprogs",
    "mkfs.exfat": "exfatprogs",
    "mkfs.f2fs": "f2fs-tools",
    "mkfs.vfat": "dosfstools",
    "mkfs.xfs": "xfsprogs",
    "mksquashfs": "squashfs-tools",
    "mkswap": "util-linux",
    "mmd": "mtools",
    "mmdebstrap": "mmdebstrap",
    "modinfo": "kmod",
    "modprobe": "kmod",
    "ntfsresize": "ntfs-3g",
    "psql": "postgresql-client",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "redis-cli": "redis-tools",
    "resize.f2fs": "f2fs-tools",
    "resize2fs": "e2fsprogs",
    "rsync": "rsync",
    "thin_check": "thin-provisioning-tools",
    "tune.exfat": "exfatprogs",
    "tune2fs": "e2fsprogs",
    "virsh": "libvirt-clients",
    "wipefs": "util-linux",
    "xfs_db": "xfsprogs",
    "xfs_growfs": "xfsprogs",
    "xfs_logprint": "xfsprogs",
    "xorriso": "xorriso",
}
"""Debian's package for a program that remetal may find missing."""


class ProgramMissingError(RefusedError):
    """A program that the work needs is not installed."""


class ProgramFailedError(RemetalError):
    """A program ended with an exit code that the caller did not allow."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str, *, ending: str = "") -> None:
        if not ending:
            ending = f"was ended by signal {-returncode}" if returncode < 0 else f"failed with exit code {returncode}"
        said = [line for line in map(presentable, stderr.strip().splitlines()[-6:]) if line]
        detail = f": {' / '.join(said)}" if said else ""
        super().__init__(f"{argv[0]} {ending}{detail}", hint=f"The command was: {shlex.join(argv)}")
        self.argv = list(argv)
        self.returncode = returncode
        self.stderr = stderr


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished program left: its exit code and its whole output, as bytes."""

    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text; undecodable bytes become replacement characters."""
        return self.stdout.decode("utf-8", "replace")


def find_program(name: str) -> str | None:
    """Return the path of a program, or None; looks into the sbin folders even when PATH lacks them."""
    return shutil.which(name, path=search_path())


def need_programs(*names: str) -> None:
    """Raise ProgramMissingError that names every missing program and its Debian package at once."""
    missing = [name for name in names if find_program(name) is None]
    if missing:
        packages = sorted({PACKAGES.get(name, name) for name in missing})
        raise ProgramMissingError(
            f"not installed: {', '.join(missing)}",
            hint=f"On Debian or Ubuntu: apt-get install {' '.join(packages)}",
        )


def run(
    argv: Argv,
    *,
    input: bytes | None = None,  # noqa: A002 - the standard library's own word for it
    allowed: Sequence[int] = (0,),
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Completed:
    """Run a program to its end and return its output.

    `allowed` are the exit codes that are not a failure; `timeout` is in seconds; `env` adds to the clean
    environment. Raises ProgramMissingError, or ProgramFailedError for any other exit code or a timeout.
    """
    command = resolve_program(argv)
    try:
        done = subprocess.run(
            command,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=timeout,
            env=clean_environment(env),
            cwd=cwd,
            check=False,
            preexec_fn=die_with_parent,
        )
    except subprocess.TimeoutExpired as error:
        stderr = (error.stderr or b"").decode("utf-8", "replace")
        ending = f"did not end within {error.timeout:g} s and was stopped"
        raise ProgramFailedError(command, -signal.SIGKILL, stderr, ending=ending) from error
    except (OSError, ValueError) as error:
        raise not_started(command, error) from error
    if done.returncode not in allowed:
        raise ProgramFailedError(command, done.returncode, (done.stderr or done.stdout).decode("utf-8", "replace"))
    return Completed(done.returncode, done.stdout, done.stderr)


def run_lines(argv: Argv, *, silent: bool = False) -> Generator[str, None, None]:
    """Run a program and yield the lines that it prints, while it prints them; it is ended if nobody wants more.

    `silent` is a program that says nothing on its error output unless something is wrong. Raises ProgramMissingError,
    or, at the end, ProgramFailedError for any exit code but 0.
    """
    command = resolve_program(argv)
    with tempfile.TemporaryFile(prefix="remetal-") as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=clean_environment(),
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, whose function was loaded at import
            )
        except (OSError, ValueError) as error:
            raise not_started(command, error) from error
        assert process.stdout is not None
        try:
            yield from (line.decode("utf-8", "replace").rstrip("\n") for line in process.stdout)
            process.wait()
        finally:
            process.stdout.close()
            process.kill()
            process.wait()
        errors.seek(0)
        told = errors.read(_MAX_TOLD).decode("utf-8", "replace")
        if process.returncode != 0 or (silent and told.strip()):
            raise ProgramFailedError(
                command, process.returncode, told, ending="" if process.returncode else "complained"
            )


@contextmanager
def start(
    argv: Argv,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    pass_fds: Sequence[int] = (),
    orphaned: signal.Signals = signal.SIGKILL,
) -> Iterator[Process]:
    """Run a program beside us for the length of a `with` block; it is ended when the block is left.

    Both outputs go to `log`, or are dropped. On leaving, SIGTERM, then after 5 s SIGKILL; `orphaned` is what it gets if
    we are killed. Raises ProgramMissingError, or ProgramFailedError if it cannot be started at all.
    """
    command = resolve_program(argv)
    with open(log or os.devnull, "ab") as output:  # noqa: PTH123 - os.devnull is no Path
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean_environment(env),
                cwd=cwd,
                pass_fds=pass_fds,
                preexec_fn=partial(die_with_parent, orphaned),  # noqa: PLW1509 - one system call, loaded at import
            )
        except (OSError, ValueError) as error:
            raise not_started(command, error) from error
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def converse(argv: Argv, *, pass_fds: Sequence[int] = ()) -> Iterator[Process]:
    """Run a program that outlives us, in a session of its own, and talk to it by pipes, which are not buffered.

    When the block is left its input is closed, and it has a while to end; it is not killed. Raises RemetalError if it
    cannot be started, or does not end.
    """
    command = resolve_program(argv)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=clean_environment(),
            cwd="/",
            pass_fds=pass_fds,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise not_started(command, error) from error
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            yield process
        finally:
            process.stdin.close()
            if wait_for_end(process, 2 * _PATIENCE) is None:
                raise RemetalError(
                    f"{command[0]} ({process.pid}) does not end",
                    hint=f"See what it does: cat /proc/{process.pid}/stack",
                )


def wait_for_end(process: Process, timeout: float) -> int | None:
    """Wait for a running program to end and return its exit code, or None if it still runs after `timeout` seconds."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None


def die_with_parent(orphaned: int = signal.SIGKILL) -> None:
    """Let the kernel end the child when we die (prctl(2), PR_SET_PDEATHSIG).

    A program that works on a disk must not go on beside the run that takes up where a killed one stopped.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, orphaned)


def presentable(line: str) -> str:
    """Return a line of a program's output as it may stand in a message: no control characters, not endless."""
    plain = "".join(each if each.isprintable() else " " for each in line[:_LINE_SHOWN]).strip()
    return plain if len(line) <= _LINE_SHOWN else f"{plain}…"


def not_started(command: Sequence[str], error: OSError | ValueError) -> RemetalError:
    """Return the error for a program that could not be started: it is not there, or the kernel refused it."""
    if isinstance(error, FileNotFoundError) and error.filename == command[0]:
        return ProgramMissingError(f"there is no program {command[0]}")
    why = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename not in {None, command[0]} else ""
    return ProgramFailedError(command, 126, "", ending=f"could not be started: {why}{where}")


def resolve_program(argv: Argv) -> list[str]:
    """Return the words of a command, the program by its whole path. Raises ProgramMissingError."""
    command = [os.fspath(word) for word in argv]
    if "/" not in command[0]:
        found = find_program(command[0])
        if found is None:
            need_programs(command[0])
            raise AssertionError("need_programs raises for a missing program")
        command[0] = found
    return command


def search_path() -> str:
    """Return the PATH that programs get: ours, and the sbin folders behind it."""
    folders = [*os.environ.get("PATH", os.defpath).split(os.pathsep), *_SBIN]
    return os.pathsep.join(dict.fromkeys(folder for folder in folders if folder))


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what a program finds in its environment: what it needs of ours, and `extra`."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {"PATH": search_path(), "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", **kept, **(extra or {})}
