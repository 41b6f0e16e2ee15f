"""What the contract of stores does not say: keys and hosts that are wrong, servers that lie, hang or go away."""

from __future__ import annotations

import http.server
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import asyncssh
import pytest

from remetal import storage
from remetal.errors import RefusedError, RemetalError, UnavailableError, UsageError
from remetal.pace import Pace
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.repository import open_repository
from remetal.storage import AlreadyExistsError, Entry, LocalStore, NotFoundError, Pieces, open_store
from remetal.storage.http import HttpStore
from remetal.storage.limit import LimitedStore
from remetal.storage.retry import RetryingStore
from remetal.storage.sftp import SftpStore
from remetal.system.blockdev import Span
from remetal.system.loop import attach_loop
from remetal.system.mounts import mounted
from remetal.units import MIB
from remetal.workflows.stores import opened_store
from tests.repositories import MemoryStore, Site, backup, make_site, restore
from tests.servers import SshServer, free_port, make_certificate, running_handler, running_nginx, running_sshd

_DISK = 320 * MIB


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    with running_sshd(tmp_path / "sshd") as server:
        monkeypatch.setenv("REMETAL_SSH_KEY", str(server.key))
        monkeypatch.setenv("REMETAL_SSH_KNOWN_HOSTS", str(server.known_hosts))
        yield server


@contextmanager
def sftp(server: SshServer, folder: Path) -> Iterator[SftpStore]:
    store = SftpStore(server.location(folder))
    try:
        yield store
    finally:
        store.close()


def test_a_host_that_is_not_known_is_refused(sshd: SshServer, tmp_path: Path) -> None:
    sshd.known_hosts.write_text("")
    with sftp(sshd, tmp_path / "s") as store, pytest.raises(RefusedError, match="key of the host") as caught:
        store.put("a", [b"x"])
    assert "known_hosts" in caught.value.hint
    assert not (tmp_path / "s").exists()


def test_a_host_whose_key_has_changed_is_refused(sshd: SshServer, tmp_path: Path) -> None:
    other = (sshd.key.parent / "client.pub").read_text()
    sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {other}")
    with sftp(sshd, tmp_path / "s") as store, pytest.raises(RefusedError, match="another than it was"):
        store.get("a")


def test_a_key_that_opens_nothing(sshd: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMETAL_SSH_KEY", str(sshd.key.parent / "host"))
    with sftp(sshd, tmp_path / "s") as store, pytest.raises(RefusedError, match="lets nobody in"):
        store.get("a")
    monkeypatch.setenv("REMETAL_SSH_KEY", "/etc/hostname")
    with sftp(sshd, tmp_path / "s") as store, pytest.raises(UsageError, match="cannot be used"):
        store.get("a")


def test_nobody_listens(tmp_path: Path) -> None:
    store = SftpStore(f"sftp://root@127.0.0.1:{free_port()}{tmp_path}")
    with pytest.raises(UnavailableError, match="failed at 'a'"):
        store.get("a")
    store.close()


@pytest.mark.parametrize(
    "location", ["sftp://host", "sftp://host/", "sftp:///folder", "sftp://u:secret@host/f", "sftp://host:x/f"]
)
def test_addresses_that_make_no_sense(location: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(location)
    assert "secret" not in caught.value.message


def test_a_connection_that_breaks_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_sshd(tmp_path / "sshd") as server:
        monkeypatch.setenv("REMETAL_SSH_KEY", str(server.key))
        monkeypatch.setenv("REMETAL_SSH_KNOWN_HOSTS", str(server.known_hosts))
        with sftp(server, tmp_path / "s") as store:
            retrying = RetryingStore(store, sleep=lambda seconds: None)
            retrying.put("a", [b"x"])
            assert store._connection is not None
            assert store._loop is not None
            store._loop.call_soon_threadsafe(store._connection.abort)
            time.sleep(0.1)
            assert retrying.get("a") == b"x"


def test_temporary_files_of_the_dead_are_swept(sshd: SshServer, tmp_path: Path) -> None:
    old, fresh = tmp_path / "s/.tmp/old", tmp_path / "s/.tmp/fresh"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(old, (time.time() - 90_000, time.time() - 90_000))
    with sftp(sshd, tmp_path / "s") as store:
        store.put("a", [b"x"])
    assert [each.name for each in (tmp_path / "s/.tmp").iterdir()] == ["fresh"]


def test_a_server_that_cannot_make_files_durable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_sshd(tmp_path / "sshd", "Subsystem sftp internal-sftp -P fsync") as server:
        monkeypatch.setenv("REMETAL_SSH_KEY", str(server.key))
        monkeypatch.setenv("REMETAL_SSH_KNOWN_HOSTS", str(server.known_hosts))
        with sftp(server, tmp_path / "s") as store, pytest.raises(RemetalError):
            store.put("a", [b"x"])
    assert not list((tmp_path / "s").glob("[a-z]*"))


class Cut:
    """A file system on a disk file, mounted at `folder`, whose power can be cut."""

    def __init__(self, image: Path, kind: str, stack: ExitStack) -> None:
        with image.open("wb") as file:
            file.truncate(_DISK)
        subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
        self._image, self._stack = image, stack
        self.folder = self._mount(image)

    def _mount(self, image: Path) -> Path:
        device = self._stack.enter_context(attach_loop(Span(image, 0, _DISK), writable=True))
        return self._stack.enter_context(mounted(device))

    def after_power_cut(self) -> dict[str, bytes]:
        """Return the objects in the folder `s` that are on the disk, whatever the kernel has in memory."""
        copy = self._image.with_suffix(".copy")
        subprocess.run(["cp", "--sparse=always", self._image, copy], check=True)
        self._stack.close()  # two of one UUID are not mounted at once
        store = LocalStore(self._mount(copy) / "s")
        return {entry.name: store.get(entry.name) for entry in store.entries("")}


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cut]:
    with ExitStack() as stack:
        yield Cut(tmp_path / "disk.img", request.param, stack)


def test_what_is_acknowledged_survives_a_power_cut_of_the_server(sshd: SshServer, disk: Cut) -> None:
    with sftp(sshd, disk.folder / "s") as store:
        store.put("a/b/one", [b"1" * 5000])
        store.put("a/c/two", [b"2" * 5000])
        assert disk.after_power_cut() == {"a/b/one": b"1" * 5000, "a/c/two": b"2" * 5000}


def test_what_somebody_killed_has_left_survives_once_it_is_relied_on(sshd: SshServer, disk: Cut) -> None:
    """Its name was never made durable: whoever finds it taken does that."""
    (disk.folder / "s").mkdir()
    os.sync()
    (disk.folder / "s/left").write_bytes(b"left")
    with sftp(sshd, disk.folder / "s") as store:
        with pytest.raises(AlreadyExistsError):
            store.put("left", [b"mine"])
        assert disk.after_power_cut() == {"left": b"left"}


def test_a_name_that_cannot_be_made_durable_is_taken_back(
    sshd: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    async def fail_second(file: asyncssh.SFTPClientFile) -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            raise asyncssh.SFTPFailure("Input/output error")

    monkeypatch.setattr(asyncssh.SFTPClientFile, "fsync", fail_second)
    with sftp(sshd, tmp_path / "s") as store:
        with pytest.raises(UnavailableError, match="Input/output"):
            store.put("a", [b"x"])
        assert list(store.entries("")) == []
        store.put("a", [b"x"])
        assert store.get("a") == b"x"


def test_a_repository_over_sftp_and_its_copy_on_the_web(sshd: SshServer, tmp_path: Path) -> None:
    """Backed up over SFTP, restored from the web server that shows the same folder."""
    memory = make_site()
    with sftp(sshd, tmp_path / "repo") as store:
        for name, data in memory.store.objects.items():
            store.put(name, [data])
        site = Site(store, open_repository(store), memory.keys, memory.key)  # type: ignore[arg-type]
        data = bytes(range(256)) * 5000
        snapshot = backup(site, data)
        assert restore(site, snapshot) == data
        assert check_repository(site.repository, keys=site.key, read_data=True).ok
    with running_nginx(tmp_path / "nginx", tmp_path / "repo", "autoindex on") as address:
        web = open_store(address)
        site = Site(web, open_repository(web), memory.keys, memory.key)  # type: ignore[arg-type]
        assert [each.id for each in open_catalog(site.repository, site.key).snapshots()] == [snapshot.id]
        assert restore(site, snapshot) == data
        with pytest.raises(RefusedError, match="can only be read"):
            backup(site, data)
        web.close()


def test_a_web_server_has_to_show_a_certificate_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/a").write_bytes(b"0123456789")
    good, other = make_certificate(tmp_path / "good", "127.0.0.1"), make_certificate(tmp_path / "other", "127.0.0.2")
    for shown, trusted, words in ((good, None, "certificate"), (other, other, "127.0.0.1"), (good, good, "")):
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted.path if trusted is not None else "/dev/null"))
        with (
            running_nginx(tmp_path / "nginx", tmp_path / "repo", "autoindex on", certificate=shown) as address,
            closing(open_store(address)) as store,
        ):
            if words:
                with pytest.raises(RefusedError, match=words):
                    store.get("a")
            else:
                assert store.get("a", start=3, size=4) == b"3456"
                assert [each.name for each in store.entries("")] == ["a"]


@contextmanager
def answering(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Run a web server whose every answer is given by a function."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *words: object) -> None:
            pass

    with running_handler(Handler) as address:
        yield address


def _whole(handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def test_a_server_without_ranges_still_serves(tmp_path: Path) -> None:
    with answering(lambda handler: _whole(handler, 200, b"0123456789")) as address:
        store = HttpStore(address)
        assert store.get("a", start=3, size=4) == b"3456"
        assert store.get("a", start=8) == b"89"
        store.close()


def test_a_truncated_answer_is_no_answer() -> None:
    with answering(lambda handler: _whole(handler, 200, b"0123", Content_Length="10")) as address:
        store = HttpStore(address)
        with pytest.raises(UnavailableError):
            store.get("a")
        store.close()


@pytest.mark.parametrize("status", [301, 403, 500, 503])
def test_statuses_that_are_no_answer(status: int) -> None:
    with answering(lambda handler: _whole(handler, status, b"", Location="http://other/x")) as address:
        store = HttpStore(address)
        with pytest.raises(UnavailableError, match=str(status)):
            store.get("a")
        with pytest.raises(RefusedError, match="does not list"):
            list(store.entries(""))
        store.close()


@pytest.mark.parametrize("body", [b"{}", b"[{}]", b"[1]", b"\xff", b'[{"name":"a","type":"file","size":-1}]'])
def test_listings_that_are_none(body: bytes) -> None:
    with answering(lambda handler: _whole(handler, 200, body, Content_Type="application/json")) as address:
        store = HttpStore(address)
        with suppress(UnavailableError):
            assert {entry.name for entry in store.entries("")} <= {"a"}
        store.close()


def test_links_out_of_the_folder_are_not_followed() -> None:
    page = (
        b'<a href="../up">x</a><a href="http://evil/a">x</a><a href="/abs">x</a><a href="?C=N">x</a>'
        b'<a href="a%2Fb">x</a><a href="good">x</a><a href="//evil/b">x</a><a>x</a>'
    )
    with answering(lambda handler: _whole(handler, 200, page, Content_Type="text/html")) as address:
        store = HttpStore(f"{address}/repo")
        assert [entry.name for entry in store.entries("")] == ["good"]
        store.close()


@pytest.mark.parametrize("location", ["http://", "https://u:p@host/x", "http://host/x?y", "ftp://host/x"])
def test_web_addresses_that_make_no_sense(location: str) -> None:
    with pytest.raises(UsageError):
        open_store(location)


class FlakyStore(MemoryStore):
    """A store in memory of which every call fails a few times, before or after it has taken effect."""

    def __init__(self, failures: int, *, after: bool) -> None:
        super().__init__()
        self.left = self.failures = failures
        self.late = after
        self.stumbles: dict[int, int] = {}

    def _fail(self, now: bool) -> None:
        if now == self.late and self.left:
            self.left -= 1
            raise UnavailableError("flaky")
        if now == self.late:
            self.left = self.failures

    def put(self, name: str, data: Pieces) -> None:
        self._fail(False)
        super().put(name, data)
        self._fail(True)

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        self._fail(False)
        return super().get(name, start=start, size=size)

    def entries(self, prefix: str) -> Iterator[Entry]:
        for number, entry in enumerate(super().entries(prefix)):
            if number % 3 == 2 and self.stumbles.get(number, 0) < self.failures:
                self.stumbles[number] = self.stumbles.get(number, 0) + 1
                raise UnavailableError("flaky")
            yield entry


@pytest.mark.parametrize("after", [False, True])
def test_a_flaky_store_is_as_good_as_another(after: bool) -> None:
    pauses: list[float] = []
    flaky = FlakyStore(2, after=after)
    store = RetryingStore(flaky, sleep=pauses.append)
    names = [f"packs/{number:02}" for number in range(12)]
    for name in names:
        store.put(name, [name.encode()])
    flaky.left = 0
    with pytest.raises(AlreadyExistsError):
        store.put("packs/00", [b"other"])
    flaky.left = 2
    assert [entry.name for entry in store.entries("")] == names
    assert [store.get(name) for name in names] == [name.encode() for name in names]
    with pytest.raises(NotFoundError):
        store.get("nothing")
    assert pauses
    assert all(0.25 <= pause <= 30 for pause in pauses)


class KeepingStore(MemoryStore):
    """A store that protects objects; every second time it fails after half of them."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: set[str] = set()
        self.calls = 0

    def keep(self, names: Iterable[str]) -> int:
        asked = list(names)
        self.calls += 1
        if self.calls % 2:
            self.kept.update(asked[: len(asked) // 2])
            raise UnavailableError("flaky")
        due = set(asked) - self.kept
        self.kept |= due
        return len(due)


def test_of_millions_of_names_to_keep_few_are_remembered() -> None:
    below, taken = KeepingStore(), 0

    def names() -> Iterator[str]:
        nonlocal taken
        for number in range(10_000):
            assert number - len(below.kept) <= 5_000
            taken += 1
            yield f"packs/{number}"

    store = RetryingStore(below, sleep=lambda seconds: None)
    assert store.keep(names()) == 5_000
    assert taken == len(below.kept) == 10_000


def test_a_store_that_stays_away_is_given_up_on() -> None:
    pauses: list[float] = []
    store = RetryingStore(FlakyStore(100, after=False), sleep=pauses.append, attempts=4)
    with pytest.raises(UnavailableError):
        store.put("a", [b"x"])
    assert len(pauses) == 3
    assert pauses == sorted(pauses)


def test_the_limit_holds_on_the_long_run() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    store = LimitedStore(MemoryStore(), Pace(1000, sleep=sleep, clock=lambda: now[0]))
    for number in range(10):
        store.put(f"{number}", [bytes(500)])
    for number in range(10):
        store.get(f"{number}")
    assert 9.0 <= now[0] <= 10.0


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "server"])
def test_the_environment_limits_every_store(
    sshd: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    monkeypatch.setenv("REMETAL_LIMIT_RATE", "1M")
    began = time.monotonic()
    with opened_store(sshd.location(tmp_path / "s") if remote else str(tmp_path / "s")) as opened:
        for number in range(3):
            opened.store.put(f"{number}", [bytes(MIB // 2)])
        assert time.monotonic() - began >= 1.0
        opened.store.get("0")
        assert time.monotonic() - began >= 1.5


def test_an_upload_that_is_tried_again_counts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage.KINDS, "flaky", lambda location: FlakyStore(1, after=False))
    began = time.monotonic()
    store = open_store("flaky://", rate=MIB)
    store.put("a", [bytes(MIB // 2)])
    assert time.monotonic() - began >= 0.5
    store.put("b", [b""])
    assert time.monotonic() - began >= 1.0


def test_a_local_folder_is_not_wrapped(tmp_path: Path) -> None:
    assert isinstance(open_store(str(tmp_path)), LocalStore)
