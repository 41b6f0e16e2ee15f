"""kill -9 at any moment of a real backup, and a disk that fills up while one runs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remetal.errors import UnavailableError
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.machines import MachineKeys
from remetal.repository.reader import open_reader
from remetal.repository.recipients import RecipientKey
from remetal.repository.repository import (
    Repository,
    enroll_machine,
    init_repository,
    load_machine_keys,
    open_repository,
    save_machine_keys,
    unlock_with_kit,
)
from remetal.repository.session import open_session
from remetal.storage import LocalStore
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.system.run import run
from remetal.units import MIB
from tests.repositories import CHUNK, PASSPHRASE, batches_of

_BACKUP = """
import sys
from pathlib import Path
from remetal.repository import packs
from remetal.repository.repository import load_machine_keys, open_repository
from remetal.repository.session import open_session
from remetal.repository import encoder
from remetal.storage import open_store
from tests.repositories import batches_of

packs.PACK_SIZE = 1 << 20
encoder.PACKS_PER_INDEX = 2
repository = open_repository(open_store(sys.argv[1]))
keys = load_machine_keys(Path(sys.argv[2]), repository)
data = Path(sys.argv[3]).read_bytes()
print("ready", flush=True)
with open_session(repository, keys) as session:
    session.write_image("sda:1", len(data), batches_of(data))
    session.commit(layout=b"{}", hostname="h")
print(session.statistics.chunks_new, flush=True)
"""

_CHECKOUT = Path(__file__).parents[2]


class Place:
    """A repository in a folder, the machine's state, and an image to back up."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore(folder / "repository")
        self.state = folder / "state"
        self.image = folder / "image"
        self.repository, kit = init_repository(self.store, passphrase=PASSPHRASE, chunk_size=CHUNK)
        self.key: RecipientKey = unlock_with_kit(self.repository, kit.text())
        save_machine_keys(self.state, enroll_machine(self.repository, "web"))

    def keys(self) -> MachineKeys:
        keys = load_machine_keys(self.state, self.repository)
        assert keys is not None
        return keys

    def start(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", _BACKUP, str(self.store.root), str(self.state), str(self.image)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=_CHECKOUT)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process


def read_newest(repository: Repository, key: RecipientKey) -> bytes:
    snapshot = open_catalog(repository, key).snapshots()[-1]
    image = snapshot.images[0]
    data = bytearray(image.size)
    with open_reader(repository, key, snapshot) as reader:
        for each in reader.runs(image):
            for index, identity in enumerate(each.ids, start=each.first):
                chunk = reader.read_chunk(identity)
                data[index * CHUNK : index * CHUNK + len(chunk)] = chunk
    return bytes(data)


def test_a_backup_that_is_killed_at_any_moment(tmp_path: Path) -> None:
    place = Place(tmp_path)
    images = [os.urandom(12 * MIB)]
    place.image.write_bytes(images[0])
    began = time.monotonic()
    with place.start() as process:
        assert process.wait() == 0
    whole = time.monotonic() - began
    moments = random.Random(5)
    kept, killed = 1, 0
    for moment in (0.02, *(moments.uniform(0.0, whole / 2) for _ in range(5))):  # Python alone needs longer than 0.02 s
        images.append(os.urandom(12 * MIB))
        place.image.write_bytes(images[-1])
        with place.start() as process:
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        assert check_repository(place.repository, keys=place.key, read_data=True).problems == []
        snapshots = open_catalog(place.repository, place.key).snapshots()
        assert kept <= len(snapshots) <= kept + 1
        kept = len(snapshots)
        assert read_newest(place.repository, place.key) in images
    assert killed > 0
    with place.start() as process:
        assert process.wait() == 0
    assert read_newest(place.repository, place.key) == images[-1]
    assert check_repository(place.repository, keys=place.keys()).problems == []
    assert list(place.store.entries("locks/")) == []
    assert [path.name for path in (place.store.root / ".tmp").iterdir()] == ["reserve"]


def test_the_backup_after_a_kill_stores_only_what_is_missing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.image.write_bytes(os.urandom(24 * MIB))
    with place.start() as process:
        deadline = time.monotonic() + 30
        while not list(place.store.entries("index/")) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(place.store.entries("index/"))
    with place.start() as process:
        assert process.stdout is not None
        new = int(process.stdout.readline())
        assert process.wait() == 0
    assert new < 24 * MIB // CHUNK


def test_a_disk_that_fills_up_during_a_backup(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(24 * MIB)
    run(["mkfs.ext4", "-q", "-N", "1024", disk])
    with attach_loop(Span(disk, 0, 24 * MIB), writable=True) as device, mounted(device) as folder:
        store = LocalStore(folder / "repository")
        repository, kit = init_repository(store, passphrase=PASSPHRASE, chunk_size=CHUNK)
        key = unlock_with_kit(repository, kit.text())
        keys = enroll_machine(repository, "web")
        small, large = os.urandom(CHUNK * 3), os.urandom(40 * MIB)
        write(repository, keys, small)
        with pytest.raises(UnavailableError) as caught:
            write(repository, keys, large)
        assert "free there" in caught.value.hint
        again = open_repository(store)
        assert check_repository(again, keys=key, read_data=True).problems == []
        assert read_newest(again, key) == small
        assert list(store.entries("locks/")) == []
        write(again, keys, small[CHUNK:])
        assert read_newest(again, key) == small[CHUNK:]


def write(repository: Repository, keys: MachineKeys, data: bytes) -> None:
    with open_session(repository, keys) as session:
        session.write_image("sda:1", len(data), batches_of(data))
        session.commit(layout=b"{}", hostname="h")
