"""Runs in User Mode Linux: real servers on loopback, real file systems, and the contract of stores on all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from remetal.errors import RefusedError, RemetalError, UnavailableError
from remetal.repository.repository import init_repository
from remetal.storage import AlreadyExistsError, LocalStore, open_folder
from remetal.system import shares
from remetal.system.mounts import enter_private_mounts, mount_quietly, opened_mountpoint, probe_mounts
from remetal.workflows import stores
from remetal.workflows.access import list_snapshots
from remetal.workflows.backup import BackupRequest, back_up
from remetal.workflows.restore import RestoreRequest, prepared_restore
from remetal.workflows.stores import opened_store
from tests.servers import running_smbd

PASSWORD = "a,password with=signs"
DISKS = ("vfat", "exfat", "ext4", "xfs", "btrfs", "ntfs")
"""File systems on the disks behind the first, which the servers serve; each has its name as its label."""

_NFSD = """
modprobe -a nfsd nfs nfsv4 nfsv3 cifs
mount -t tmpfs state /var/lib/nfs
mkdir -p /var/lib/nfs/rpc_pipefs /var/lib/nfs/v4recovery /var/lib/nfs/sm
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
mount -t nfsd nfsd /proc/fs/nfsd
rpcbind -w
exportfs -i -o rw,no_root_squash,insecure,sync,no_subtree_check,fsid=0 127.0.0.1:/run/export
rpc.nfsd -G 10 4
rpc.mountd
echo Y > /proc/fs/nfsd/v4_end_grace
"""


@contextmanager
def running_servers() -> Iterator[dict[str, str]]:
    """Serve the first disk by NFS and Samba, and yield the locations of folders there, by kind."""
    root = Path("/run/export")
    root.mkdir()
    run("mkfs.ext4", "-q", "/dev/ubda")
    run("mount", "/dev/ubda", root)
    for name in ("srv/nfs", "srv/smb"):
        (root / name).mkdir(parents=True)
    run("bash", "-euc", _NFSD)
    with running_smbd(Path("/run/smb"), root / "srv", user="root", password=PASSWORD) as port:
        yield {"nfs": "nfs://127.0.0.1/srv/nfs/deep/repository", "smb": f"smb://root@127.0.0.1:{port}/vault/smb/deep"}


def make_disks() -> dict[str, str]:
    """Make the file systems, and return the locations of folders on them, by kind."""
    for number, kind in enumerate(DISKS):
        device = f"/dev/ubd{'bcdefgh'[number]}"
        label = ["-n", kind] if kind in {"vfat", "exfat"} else ["-L", kind]
        run(f"mkfs.{kind}", *(["-Q", "-F"] if kind == "ntfs" else []), *label, device)
    return {kind: f"usb:{kind}/a folder" for kind in DISKS}


def run(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def failure(location: str, *, read_only: bool = False) -> RemetalError:
    """Return the error that opening a location ends with."""
    with pytest.raises(RemetalError) as caught, opened_store(location, read_only=read_only):
        pass
    return caught.value


def check_failures(places: dict[str, str]) -> None:
    """What goes wrong is told as what it is, and never with a password."""
    smb = places["smb"]
    for location, kind, words in (
        ("nfs://no.such.host.invalid/srv", UnavailableError, "no.such.host.invalid"),
        ("nfs://127.0.0.1:1/srv", UnavailableError, "refused"),
        ("nfs://127.0.0.1/nothing/here", RefusedError, "no /nothing/here"),
        ("smb://root@127.0.0.1:1/vault", UnavailableError, "refused"),
        (smb.replace("/vault", "/nothing"), RefusedError, "no share 'nothing'"),
        (smb.replace("root@", "stranger@"), RefusedError, "stranger"),
        ("usb:ABSENT/x", UnavailableError, "ABSENT"),
    ):
        began = time.monotonic()
        error = failure(location)
        assert type(error) is kind, (location, error, error.hint)
        assert PASSWORD not in f"{error.message} {error.hint}"
        assert words in error.message, (location, error)
        assert time.monotonic() - began < 15, location
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMETAL_SMB_PASSWORD", "wrong, quite")
        error = failure(smb)
        assert isinstance(error, RefusedError)
        assert "root" in error.message
        assert "wrong" not in error.message


def check_disks(places: dict[str, str], work: Path) -> None:
    """A disk with a repository is neither a target nor captured, one with the label of another is not chosen."""
    disk = work / "disk.img"
    disk.write_bytes(os.urandom(1 << 20))
    os.environ["REMETAL_STATE"] = str(work / "state")
    repo = f"{places['ext4']} of a machine"
    with opened_store(repo) as opened:
        init_repository(opened.store, passphrase=PASSWORD)
    back_up(BackupRequest(repo, (disk,), "one"))
    with pytest.raises(RefusedError, match="lies on a file system that would be held still"):
        back_up(BackupRequest(repo, (Path("/dev/ubdd"),), "two"))
    request = RestoreRequest(repo, mapping=("/dev/ubdd",), overwrite=("/dev/ubdd",))
    with pytest.raises(RefusedError, match="/dev/ubdd must not be overwritten: it holds"), prepared_restore(request):
        pass
    with held(places["ext4"]):  # by somebody whose mounts are private
        assert [each.machine for each in list_snapshots(repo, None).snapshots] == ["one"]
        with opened_store(repo, read_only=True) as opened, pytest.raises(UnavailableError, match="Read-only"):
            opened.store.put("locks/x", [b"x"])
    run("tune2fs", "-L", "ext4", "/dev/ubda")
    error = failure(repo)
    assert isinstance(error, RefusedError)
    assert "several volumes" in error.message
    run("tune2fs", "-L", "served", "/dev/ubda")


def check_kills(places: dict[str, str]) -> None:
    """What is mounted for a program goes with it, however it ends, and so does what serves it."""
    for kind in ("nfs", "smb", "exfat", "ext4"):
        with held(places[kind]) as device:
            pass
        deadline = time.monotonic() + 10
        while any(device == each.source for each in probe_mounts()) or _is_claimed(device) or _is_served():
            assert time.monotonic() < deadline, (kind, device)
            time.sleep(0.1)


@contextmanager
def held(location: str) -> Iterator[str]:
    """Let another process open a store for the length of a block, kill it then, and yield what it has mounted."""
    with subprocess.Popen([sys.executable, "-c", _HOLDING, location], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        device = process.stdout.readline().decode().strip()
        try:
            yield device
        finally:
            process.kill()


_HOLDING = """
import sys, time
from remetal.system.mounts import enter_private_mounts, find_mount_of
from remetal.workflows.stores import opened_store
enter_private_mounts()
with opened_store(sys.argv[1]) as opened:
    opened.store.put("locks/%d" % time.time(), [b"x"])
    print(find_mount_of(opened.folder).source, flush=True)
    time.sleep(60)
"""


def _is_claimed(device: str) -> bool:
    if not device.startswith("/dev/"):
        return False
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError:
        return True
    return False


def _is_served() -> bool:
    return subprocess.run(["pgrep", "-f", "exfat-fuse"], check=False, stdout=subprocess.DEVNULL).returncode == 0


def check_races(folder: Path, other: Path) -> None:
    """Two clients of one server create the same names: each is created once, and has the bytes of who made it."""
    wins: dict[str, list[bytes]] = {}
    guard = threading.Lock()
    name = uuid.uuid4().hex

    def race(root: Path, mark: bytes) -> None:
        store = open_folder(root / name, "race", remote=True)
        for number in range(12):
            with suppress(AlreadyExistsError):
                store.put(f"locks/{number}", [mark])
                with guard:
                    wins.setdefault(f"locks/{number}", []).append(mark)

    threads = [threading.Thread(target=race, args=each) for each in ((folder, b"one"), (other, b"other")) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wins == {f"locks/{number}": [LocalStore(other / name).get(f"locks/{number}")] for number in range(12)}


def main(arguments: Sequence[str]) -> int:
    enter_private_mounts()
    os.environ["REMETAL_SMB_PASSWORD"] = PASSWORD
    shares._PATIENCE = stores.VOLUME_SECONDS = 1.0  # nothing that is missing here will come
    with running_servers() as served:
        before = probe_mounts()
        check_failures(served)
        places = served | make_disks()
        with TemporaryDirectory() as work:
            check_disks(places, Path(work))
        check_kills(places)
        assert probe_mounts() == before
        with ExitStack() as stack:
            opened = {kind: stack.enter_context(opened_store(place)).folder for kind, place in places.items()}
            folders = {kind: str(folder) for kind, folder in opened.items()}
            with mounted_again("nfs", "vers=3,nolock,addr=127.0.0.1", "127.0.0.1:/run/export/srv/nfs/deep") as other:
                folders["nfs3"] = str(other / "version 3")
                check_races(Path(folders["nfs"]), other / "repository")
                os.environ["REMETAL_TEST_STORES"] = json.dumps(folders)
                code = int(
                    pytest.main(["-q", "-x", "-p", "no:cacheprovider", *arguments, "tests/contract/test_store.py"])
                )
        assert probe_mounts() == before
    return code


@contextmanager
def mounted_again(kind: str, options: str, source: str) -> Iterator[Path]:
    with opened_mountpoint() as folder:
        mount_quietly(source, folder, kind, options, read_only=False)
        yield folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
