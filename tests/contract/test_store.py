"""The contract of stores. A new store is one more fixture here."""

from __future__ import annotations

import json
import os
import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from remetal.errors import UsageError
from remetal.pace import Pace
from remetal.storage import AlreadyExistsError, Entry, LocalStore, NotFoundError, Pieces, Store, open_folder, open_store
from remetal.storage.http import HttpStore
from remetal.storage.limit import LimitedStore
from remetal.storage.retry import RetryingStore
from remetal.storage.s3 import S3Store
from remetal.storage.sftp import SftpStore
from remetal.system.blockdev import aligned_buffer
from remetal.units import MIB
from tests.ceph import Gateway
from tests.repositories import MemoryStore
from tests.servers import SshServer, running_nginx, running_sshd


class Shown:
    """What a folder holds as a web server shows it: written as files, read through the server."""

    def __init__(self, folder: Path, address: str) -> None:
        self._files = LocalStore(folder)
        self._web = HttpStore(address)

    @property
    def location(self) -> str:
        return self._web.location

    def put(self, name: str, data: Pieces) -> None:
        self._files.put(name, data)

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        return self._web.get(name, start=start, size=size)

    def entries(self, prefix: str) -> Iterator[Entry]:
        return self._web.entries(prefix)

    def delete(self, name: str) -> None:
        self._files.delete(name)

    def keep(self, names: Iterable[str]) -> int:
        return self._files.keep(names)

    def close(self) -> None:
        self._web.close()


MAKERS: dict[str, Callable[[Path], Store]] = {
    "local": lambda folder: LocalStore(folder / "deep" / "store"),
    "location": lambda folder: open_store(f"file://{folder}/with%20space"),
    "memory": lambda folder: MemoryStore(),
    "retrying": lambda folder: RetryingStore(LimitedStore(MemoryStore(), Pace(1e9))),
}
SERVERS = ("sftp", "nginx-html", "nginx-json", "s3", "s3-versions")
MOUNTED: dict[str, str] = json.loads(os.environ.get("REMETAL_TEST_STORES", "{}"))
"""Folders on file systems that this host's kernel may not know, by kind: where the suite runs inside another kernel."""


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, Path]]]:
    """The addresses of two web servers, by how they list folders, and the folders that they show."""
    top = tmp_path_factory.mktemp("web")
    with ExitStack() as stack:
        found: dict[str, tuple[str, Path]] = {}
        for kind in ("html", "json"):
            root = top / kind
            root.mkdir()
            server = running_nginx(top / f"{kind}-server", root, "autoindex on", f"autoindex_format {kind}")
            found[kind] = stack.enter_context(server), root
        yield found


@pytest.fixture(params=MOUNTED or [*MAKERS, *SERVERS])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    made = _make_store(request, tmp_path, monkeypatch)
    yield made
    made.close()


def _make_store(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param in MOUNTED:
        remote = request.param.startswith(("nfs", "smb"))
        return open_folder(Path(MOUNTED[request.param], uuid.uuid4().hex, "store"), request.param, remote=remote)
    if request.param in MAKERS:
        return MAKERS[request.param](folder)
    if request.param == "sftp":
        server: SshServer = request.getfixturevalue("sshd")
        monkeypatch.setenv("REMETAL_SSH_KEY", str(server.key))
        monkeypatch.setenv("REMETAL_SSH_KNOWN_HOSTS", str(server.known_hosts))
        return SftpStore(server.location(folder / "deep folder"))
    if request.param.startswith("s3"):
        gateway: Gateway = request.getfixturevalue("gateway")
        for variable, value in gateway.environment().items():
            monkeypatch.setenv(variable, value)
        bucket, client = f"contract-{request.param}", gateway.client()
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=bucket)
        if bucket.endswith("versions"):
            client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        return S3Store(f"s3://{bucket}/{uuid.uuid4().hex}")
    address, root = request.getfixturevalue("shown")[request.param.removeprefix("nginx-")]
    name = f"{folder.name}-{uuid.uuid4().hex[:6]}"
    (root / name).mkdir()
    return Shown(root / name, f"{address}/{name}")


def test_it_is_a_store(store: Store) -> None:
    assert isinstance(store, Store)
    assert store.location
    store.close()


def test_what_is_put_is_got(store: Store) -> None:
    store.put("packs/3f/3fa9", [b"one ", memoryview(b"two "), b"", b"three"])
    assert store.get("packs/3f/3fa9") == b"one two three"


def test_more_pieces_than_one_system_call_takes(store: Store) -> None:
    pieces = [bytes([number % 256]) * (number % 7) for number in range(5000)]
    store.put("many", pieces)
    assert store.get("many") == b"".join(pieces)


@pytest.mark.parametrize("size", [MIB, MIB + 1, 4 * MIB + 4096, 9 * MIB - 1], ids=str)
@pytest.mark.parametrize("shift", [0, 1], ids=["on a page", "beside a page"])
def test_large_objects_from_any_memory(store: Store, size: int, shift: int) -> None:
    memory = aligned_buffer(size + shift)
    memory[:] = random.Random(size).randbytes(size + shift)
    store.put("large", [memory[shift:]])
    assert store.get("large") == memory[shift:]
    assert [entry.size for entry in store.entries("large")] == [size]


def test_an_empty_object(store: Store) -> None:
    store.put("empty", [])
    assert store.get("empty") == b""
    assert [entry.size for entry in store.entries("empty")] == [0]


@pytest.mark.parametrize(
    ("start", "size", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (3, 0, b""),
        (8, 9, b"89"),
        (10, 1, b""),
        (99, None, b""),
    ],
)
def test_ranges(store: Store, start: int, size: int | None, expected: bytes) -> None:
    store.put("digits", [b"0123456789"])
    assert store.get("digits", start=start, size=size) == expected


def test_a_taken_name_keeps_its_object(store: Store) -> None:
    store.put("index/a", [b"first"])
    with pytest.raises(AlreadyExistsError):
        store.put("index/a", [b"second"])
    assert store.get("index/a") == b"first"


def test_of_many_that_race_for_a_name_one_wins(store: Store) -> None:
    wins: list[bytes] = []
    start = threading.Barrier(8)

    def race(content: bytes) -> None:
        start.wait()
        try:
            store.put("locks/0001", [content])
        except AlreadyExistsError:
            return
        wins.append(content)

    threads = [threading.Thread(target=race, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wins == [store.get("locks/0001")]


def put_all(store: Store, names: list[str]) -> None:
    for name in names:
        store.put(name, [name.encode()])


def test_many_writers_at_once(store: Store) -> None:
    names = [f"packs/{number % 4:02x}/{number:04x}" for number in range(80)]
    threads = [threading.Thread(target=put_all, args=(store, names[start::4])) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry.name: store.get(entry.name) for entry in store.entries("")} == {name: name.encode() for name in names}


def test_what_is_missing(store: Store) -> None:
    with pytest.raises(NotFoundError):
        store.get("config")
    assert list(store.entries("packs/")) == []
    store.delete("config")


def test_a_folder_is_no_object(store: Store) -> None:
    store.put("packs/ab/cd", [b"x"])
    with pytest.raises(NotFoundError):
        store.get("packs/ab")


def test_deleted_objects_are_gone_and_may_come_again(store: Store) -> None:
    store.put("locks/a/1", [b"1"])
    store.delete("locks/a/1")
    store.delete("locks/a/1")
    with pytest.raises(NotFoundError):
        store.get("locks/a/1")
    store.put("locks/a/1", [b"2"])
    assert store.get("locks/a/1") == b"2"


def test_entries_come_in_the_order_of_names(store: Store) -> None:
    names = ["a-b", "a.b", "a/b", "a/b.c", "a/c/d", "a0", "b/c/d", "keys/machines/x", "keys/slots/y"]
    for name in reversed(names):
        store.put(name, [b"x" * len(name)])
    found = list(store.entries(""))
    assert [entry.name for entry in found] == sorted(names)
    assert all(entry.size == len(entry.name) for entry in found)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("keys/", ["keys/machines/x", "keys/slots/y", "keys/slots/z"]),
        ("keys/s", ["keys/slots/y", "keys/slots/z"]),
        ("keys/slots/z", ["keys/slots/z"]),
        ("keys", ["keys/machines/x", "keys/slots/y", "keys/slots/z", "keys2"]),
        ("nothing/", []),
        ("../", []),
    ],
)
def test_entries_of_a_prefix(store: Store, prefix: str, expected: list[str]) -> None:
    for name in ("keys2", "keys/machines/x", "keys/slots/z", "keys/slots/y", "locks/a"):
        store.put(name, [b""])
    assert [entry.name for entry in store.entries(prefix)] == expected


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".tmp/x", "a/.b", "A", "ä", "a b", "a\0b", "a\n", "x" * 300],
)
def test_names_that_break_the_contract(store: Store, name: str) -> None:
    with pytest.raises(UsageError):
        store.put(name, [b"x"])
    with pytest.raises(UsageError):
        store.get(name)
    with pytest.raises(UsageError):
        store.delete(name)
    assert list(store.entries("")) == []
