"""S3 beyond the contract: versions, object lock, keys that are wrong, against a real server."""

from __future__ import annotations

import http.server
import json
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest
from botocore.exceptions import EndpointConnectionError

from remetal.errors import RefusedError, UnavailableError, UsageError
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.prune import PruneResult, prune_machine
from remetal.repository.repository import open_repository
from remetal.storage import AlreadyExistsError, NotFoundError, RetainedError, open_store, s3
from remetal.storage.retry import RetryingStore
from remetal.storage.s3 import PART_SIZE, S3Store
from tests.ceph import Gateway
from tests.repositories import Site, backup, make_site, noise, restore
from tests.servers import free_port, running_handler


@pytest.fixture
def client(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in gateway.environment().items():
        monkeypatch.setenv(name, value)
    return gateway.client()


@pytest.fixture
def versioned(client: Any) -> Iterator[S3Store]:
    name = f"v-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    store = S3Store(f"s3://{name}/repo")
    yield store
    store.close()


@pytest.fixture
def locked(client: Any) -> Iterator[S3Store]:
    """A place in a bucket that locks every object in compliance mode for a day."""
    name = f"l-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
    client.put_object_lock_configuration(
        Bucket=name, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
    )
    store = S3Store(f"s3://{name}/repo")
    yield store
    store.close()


@pytest.fixture
def plain(client: Any) -> Iterator[S3Store]:
    name = f"p-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    store = S3Store(f"s3://{name}/repo")
    yield store
    store.close()


LARGE = bytes(range(256)) * (5 << 12) * 4
"""20 MiB: three parts."""
SOON = 30
"""Seconds in which locks end that a test waits for; what has to happen before takes some."""


def parts_of(client: Any, store: S3Store, name: str) -> int:
    """Return of how many parts an object was made: the server writes it into the entity tag."""
    tag = client.head_object(Bucket=store._bucket, Key=f"repo/{name}")["ETag"].strip('"')
    return int(tag.partition("-")[2] or 1)


def test_a_large_object_goes_in_parts_and_is_created_once(client: Any, versioned: S3Store) -> None:
    versioned.put("packs/a", [LARGE[:1000], memoryview(LARGE)[1000:]])
    assert parts_of(client, versioned, "packs/a") == 3
    assert versioned.get("packs/a") == LARGE
    for each in (versioned, S3Store(versioned.location)):
        with pytest.raises(AlreadyExistsError):
            each.put("packs/a", [LARGE[1:]])
        assert each.get("packs/a") == LARGE


def test_of_two_that_write_a_large_object_at_once_one_wins(versioned: S3Store) -> None:
    other = S3Store(versioned.location)
    other.put("locks/open", [b"x"])
    assert other._find_first("packs/a") is None
    versioned.put("packs/a", [LARGE])
    with pytest.raises(AlreadyExistsError):
        other._need_first("packs/a", other._put_parts("repo/packs/a", LARGE[1:]))
    assert versioned.get("packs/a") == S3Store(versioned.location).get("packs/a") == LARGE


def test_a_provider_that_joins_parts_over_an_object_gets_it_whole(client: Any, plain: S3Store) -> None:
    plain.put("packs/a", [LARGE])
    assert plain.get("packs/a") == LARGE
    assert parts_of(client, plain, "packs/a") == (3 if plain._joins else 1)
    with pytest.raises(AlreadyExistsError):
        plain.put("packs/a", [LARGE[1:]])
    assert plain.get("packs/a") == LARGE
    assert [entry.name for entry in plain.entries("")] == ["packs/a"]


def probes_of(client: Any, store: S3Store) -> list[str]:
    found = client.list_objects_v2(Bucket=store._bucket, Prefix="repo/.remetal/")
    return [row["Key"] for row in found.get("Contents", ())]


def test_who_only_reads_tries_nothing(client: Any, plain: S3Store) -> None:
    with pytest.raises(NotFoundError):
        plain.get("config")
    assert list(plain.entries("")) == []
    plain.delete("config")
    assert probes_of(client, plain) == []


def test_whether_objects_are_created_once_is_tried_once(
    client: Any, plain: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, tried = S3Store._put_probe, list[bool]()

    def try_it(store: S3Store) -> bool:
        tried.append(put(store))
        return tried[-1]

    monkeypatch.setattr(S3Store, "_put_probe", try_it)
    for name in "ab":
        plain.put(name, [b"x"])
    assert tried == [True, False]
    assert probes_of(client, plain) == ["repo/.remetal/conditional"]
    other = S3Store(plain.location)
    for name in "cd":
        other.put(name, [b"x"])
    assert tried == [True, False, False]


def test_where_every_version_is_kept_nothing_is_tried(client: Any, versioned: S3Store, locked: S3Store) -> None:
    for store in (versioned, locked):
        store.put("a", [b"x"])
        assert probes_of(client, store) == []


def test_a_bucket_that_keeps_no_more_versions(client: Any, versioned: S3Store) -> None:
    """Those that it has kept count; a new object is the only version of its name, so nobody may write over it."""
    versioned.put("a", [b"x"])
    client.put_bucket_versioning(Bucket=versioned._bucket, VersioningConfiguration={"Status": "Suspended"})
    other = S3Store(versioned.location)
    other.put("b", [b"x"])
    assert len(probes_of(client, versioned)) == 1
    for name in "ab":
        with pytest.raises(AlreadyExistsError):
            other.put(name, [b"y"])
        assert other.get(name) == b"x"
    other.put("packs/a", [LARGE])
    assert S3Store(versioned.location).get("packs/a") == LARGE


class Careless(http.server.BaseHTTPRequestHandler):
    """A provider that creates whatever it is told to, and does not look whether there is something."""

    protocol_version = "HTTP/1.1"
    written: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.written.append(self.path)
        self._answer(b"", ETag='"0"')

    def do_GET(self) -> None:
        assert self.path.endswith("?versioning")
        self._answer(b"<VersioningConfiguration/>")

    def _answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


def test_a_provider_that_writes_over_objects_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    with running_handler(Careless) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        store = RetryingStore(S3Store("s3://bucket/repo"), sleep=lambda seconds: None)
        for name in ("locks/m/1", "locks/m/2"):
            with pytest.raises(RefusedError, match="over another one"):
                store.put(name, [b"x"])
        store.close()
    assert Careless.written == ["/bucket/repo/.remetal/conditional"] * 2


def test_an_upload_that_was_cut_off_is_ended_by_a_later_writer(
    client: Any, versioned: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"Bucket": versioned._bucket, "Key": "repo/packs/a"}
    upload = client.create_multipart_upload(**place)["UploadId"]
    client.upload_part(**place, UploadId=upload, PartNumber=1, Body=LARGE[: 5 << 20])
    versioned.put("packs/b", [b"small"])
    assert len(client.list_multipart_uploads(Bucket=versioned._bucket)["Uploads"]) == 1
    time.sleep(2.1)  # the server tells whole seconds
    monkeypatch.setattr(s3, "_ABANDONED", timedelta(seconds=1))
    S3Store(versioned.location).put("packs/c", [b"small"])
    assert "Uploads" not in client.list_multipart_uploads(Bucket=versioned._bucket)
    versioned.put("packs/a", [LARGE])
    assert versioned.get("packs/a") == LARGE


def test_a_part_that_fails_leaves_nothing_and_the_next_attempt_succeeds(
    client: Any, versioned: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = failing_parts(versioned, monkeypatch, 3)
    RetryingStore(versioned, sleep=lambda seconds: None).put("packs/a", [LARGE])
    assert len(set(uploads)) == 2
    assert versioned.get("packs/a") == LARGE
    assert "Uploads" not in client.list_multipart_uploads(Bucket=versioned._bucket)


def test_a_part_is_sent_again_and_those_before_it_are_not(
    client: Any, versioned: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = failing_parts(versioned, monkeypatch, 2)
    versioned.put("packs/a", [LARGE])
    assert len(uploads) == -(-len(LARGE) // PART_SIZE) + 2
    assert len(set(uploads)) == 1
    assert versioned.get("packs/a") == LARGE


def failing_parts(store: S3Store, monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Let the second part of uploads fail so many times; return the upload of each part that is sent."""
    store.put("locks/open", [b"x"])
    whole = store._client.upload_part
    sent: list[str] = []
    left = count

    def upload_part(**words: Any) -> Any:
        nonlocal left
        sent.append(words["UploadId"])
        if words["PartNumber"] == 2 and left:
            left -= 1
            raise EndpointConnectionError(endpoint_url="http://away")
        return whole(**words)

    monkeypatch.setattr("remetal.storage.s3._PART_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(store._client, "upload_part", upload_part)
    return sent


def test_garbage_over_an_object_changes_nothing(client: Any, versioned: S3Store) -> None:
    bucket = versioned._bucket
    versioned.put("packs/a", [b"the truth"])
    client.put_object(Bucket=bucket, Key="repo/packs/a", Body=b"garbage, longer than the truth")
    client.delete_object(Bucket=bucket, Key="repo/packs/a")
    for store in (versioned, S3Store(versioned.location)):
        assert [(entry.name, entry.size) for entry in store.entries("")] == [("packs/a", 9)]
        assert store.get("packs/a") == b"the truth"
        assert store.get("packs/a", start=4) == b"truth"
        assert store.get("packs/a", start=4, size=2) == b"tr"
    versioned.delete("packs/a")
    with pytest.raises(NotFoundError):
        versioned.get("packs/a")
    assert client.list_object_versions(Bucket=bucket).get("Versions", []) == []


def test_more_garbage_over_an_object_than_one_page_lists(client: Any, versioned: S3Store) -> None:
    """The server lists a thousand versions at once, the newest first: the object is on the second page."""
    names = ["packs/a", "packs/b", "packs/c"]
    for name in names:
        versioned.put(name, [b"the truth"])
    place = {"Bucket": versioned._bucket, "Key": "repo/packs/b"}

    def spoil(number: int) -> None:
        if number % 20:
            client.put_object(**place, Body=b"garbage, longer than the truth")
        else:
            client.delete_object(**place)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(spoil, range(1100)))
    other = S3Store(versioned.location)
    assert other.get("packs/b") == b"the truth"
    assert [(entry.name, entry.size) for entry in other.entries("")] == [(name, 9) for name in names]
    with pytest.raises(AlreadyExistsError):
        S3Store(versioned.location).put("packs/b", [b"other"])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pages_end_anywhere(client: Any, versioned: S3Store, size: int) -> None:
    """Between two names, within the versions of one, among the markers that it is deleted."""
    names = ["packs/a", "packs/b", "packs/c"]
    for name in names:
        versioned.put(name, [b"the truth"])
        place = {"Bucket": versioned._bucket, "Key": f"repo/{name}"}
        for _ in range(2):
            client.put_object(**place, Body=b"garbage")
            client.delete_object(**place)
    other = S3Store(versioned.location)
    other.put("locks/m/1", [b"x"])
    list_versions = "before-parameter-build.s3.ListObjectVersions"
    other._client.meta.events.register(list_versions, lambda params, **words: params.update(MaxKeys=size))
    assert [(entry.name, entry.size) for entry in other.entries("packs/")] == [(name, 9) for name in names]
    other.delete("packs/b")
    assert [entry.name for entry in other.entries("packs/")] == ["packs/a", "packs/c"]
    left = client.list_object_versions(Bucket=versioned._bucket, Prefix="repo/packs/b")
    assert left.keys().isdisjoint({"Versions", "DeleteMarkers"})


def deny(client: Any, bucket: str, action: str) -> None:
    """Let nobody do something with a bucket."""
    statement = {"Effect": "Deny", "Principal": "*", "Action": action, "Resource": f"arn:aws:s3:::{bucket}"}
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))


def test_who_may_not_ask_for_versions_gets_the_newest_and_replaces_nothing(client: Any, versioned: S3Store) -> None:
    """As the documentation says. This server creates one version over another, so nothing is written there at all."""
    versioned.put("packs/a", [b"the truth"])
    client.put_object(Bucket=versioned._bucket, Key="repo/packs/a", Body=b"newer")
    deny(client, versioned._bucket, "s3:GetBucketVersioning")
    other = S3Store(versioned.location)
    assert other.get("packs/a") == b"newer"
    assert [(entry.name, entry.size) for entry in other.entries("")] == [("packs/a", 5)]
    for name in ("packs/a", "packs/b"):
        with pytest.raises(RefusedError, match="over another one") as caught:
            other.put(name, [b"x"])
        assert "s3:GetBucketVersioning" in caught.value.hint
    client.delete_bucket_policy(Bucket=versioned._bucket)
    assert S3Store(versioned.location).get("packs/a") == b"the truth"


def test_who_sees_versions_and_may_not_list_them_is_refused(client: Any, versioned: S3Store) -> None:
    versioned.put("packs/a", [b"the truth"])
    deny(client, versioned._bucket, "s3:ListBucketVersions")
    with pytest.raises(RefusedError, match="does not allow it at 'packs/a'"):
        S3Store(versioned.location).get("packs/a")


def test_locks_come_and_go_in_a_bucket_with_versions(versioned: S3Store) -> None:
    for _ in range(3):
        versioned.put("locks/m/1", [b"x"])
        versioned.put("maps/m/1", [b"x"])
        assert [entry.name for entry in versioned.entries("")] == ["locks/m/1", "maps/m/1"]
        assert [entry.name for entry in versioned.entries("locks/")] == ["locks/m/1"]
        versioned.delete("locks/m/1")
        assert list(versioned.entries("locks/")) == []
        versioned.delete("maps/m/1")


def test_what_is_locked_stays(locked: S3Store) -> None:
    locked.put("packs/a", [b"x"])
    with pytest.raises(RetainedError, match="does not let the object"):
        locked.delete("packs/a")
    assert locked.get("packs/a") == b"x"
    locked.put("locks/m/1", [b"x"])
    locked.delete("locks/m/1")
    assert list(locked.entries("locks/")) == []


def test_keeping_locks_again_what_ends_soon(client: Any, locked: S3Store) -> None:
    locked.put("packs/a", [b"x"])
    assert locked.keep(["packs/a", "packs/none"]) == 0
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 30}}
    client.put_object_lock_configuration(
        Bucket=locked._bucket, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
    )
    assert locked.keep(["packs/a"]) == 1
    until = client.get_object_retention(Bucket=locked._bucket, Key="repo/packs/a")["Retention"]["RetainUntilDate"]
    assert until > datetime.now(UTC) + timedelta(days=29)
    assert locked.keep(["packs/a"]) == 0


def make_site_in(store: S3Store) -> Site:
    memory = make_site()
    for name, data in memory.store.objects.items():
        store.put(name, [data])
    return Site(store, open_repository(store), memory.keys, memory.key)  # type: ignore[arg-type]


def test_a_repository_in_a_locked_bucket(locked: S3Store) -> None:
    """What is forgotten is not listed; what a prune would delete stays, is told, and comes up again."""
    site = make_site_in(locked)
    one, two = noise("s3 one", 3), noise("s3 two", 3)
    first, second = backup(site, one), backup(site, two)
    forget_snapshots(site.repository, site.key, [first.id])

    def prune() -> PruneResult:
        return prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=0)

    result = prune()
    assert (result.deleted_objects, result.retained_objects >= 3) == (0, True)
    assert prune().retained_objects == result.retained_objects
    assert [each.id for each in open_catalog(site.repository, site.key).snapshots()] == [second.id]
    assert restore(site, second) == two
    assert check_repository(site.repository, keys=site.key, read_data=True).problems == []
    third = backup(site, one)
    assert restore(site, third) == one


def locks_of(client: Any, store: S3Store) -> dict[str, datetime]:
    """Return until when each object is locked that lasts, by its name."""
    rows = client.list_object_versions(Bucket=store._bucket).get("Versions", [])
    found: dict[str, datetime] = {}
    for row in rows:
        name = row["Key"].removeprefix("repo/")
        if not name.startswith("locks/"):
            place = {"Bucket": store._bucket, "Key": row["Key"], "VersionId": row["VersionId"]}
            assert name not in found
            found[name] = client.get_object_retention(**place)["Retention"]["RetainUntilDate"]
    return found


def kinds_of(names: Iterable[str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


def test_a_prune_locks_again_what_is_needed_and_lets_go_of_the_rest(client: Any) -> None:
    """What is condemned, doomed or forgotten waits for the end of its lock, and prunes do not put that off."""
    bucket = f"l-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    store = S3Store(f"s3://{bucket}/repo")
    site = make_site_in(store)
    data = noise("large", 160)
    first, second = backup(site, noise("other", 160)), backup(site, data)
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=SOON)
    for entry in store.entries(""):
        if not entry.name.startswith("locks/"):
            retention = {"Mode": "COMPLIANCE", "RetainUntilDate": soon}
            client.put_object_retention(Bucket=bucket, Key=f"repo/{entry.name}", Retention=retention)
    rule = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}}
    client.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=rule)
    before = locks_of(client, store)
    assert set(before.values()) == {soon}
    forget_snapshots(site.repository, site.key, [first.id])

    def prune() -> PruneResult:
        return prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=0)

    results = [prune(), prune()]
    during = locks_of(client, store)
    assert before.keys() <= during.keys()
    time.sleep(max(0.0, (soon - datetime.now(UTC)).total_seconds() + 1.5))
    last = prune()
    needed = locks_of(client, store).keys() & before.keys()
    gone = before.keys() - needed
    assert {name for name in needed if during[name] < soon + timedelta(hours=20)} == set()
    assert {name: during[name] for name in gone} == dict.fromkeys(gone, soon)
    assert kinds_of(needed) == {"config", "keys", "packs", "index", "maps", "history"}
    assert kinds_of(gone) == {"packs", "index", "maps", "parity", "history"}
    doomed = [name for name in gone if not name.startswith(("parity/", "history/"))]
    assert [(each.deleted_bytes, each.retained_objects) for each in results] == [(0, len(doomed))] * 2
    assert (last.retained_objects, last.deleted_bytes > 0) == (0, True)
    assert max(parts_of(client, store, name) for name in needed if name.startswith("packs/")) > 1
    assert restore(site, second) == data
    assert check_repository(site.repository, keys=site.key, read_data=True).problems == []
    store.close()


def test_keys_and_places_that_are_wrong(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match="there is no bucket nowhere"):
        S3Store("s3://nowhere/repo").get("config")
    with pytest.raises(RefusedError, match="there is no bucket nowhere"):
        list(S3Store("s3://nowhere/repo").entries(""))
    client.create_bucket(Bucket="denied")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(RefusedError, match="with these credentials"):
        S3Store("s3://denied/repo").get("config")
    with pytest.raises(RefusedError, match="with these credentials"):
        S3Store("s3://denied/repo").put("a", [b"x"])
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(RefusedError, match="no credentials"):
        S3Store("s3://denied/repo").get("config")


def test_credentials_from_a_file(gateway: Gateway, client: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client.create_bucket(Bucket="from-file")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text(
        f"[vault]\naws_access_key_id = {gateway.access_key}\naws_secret_access_key = {gateway.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "vault")
    store = S3Store("s3://from-file/repo")
    store.put("a", [b"x"])
    assert store.get("a") == b"x"


def test_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UnavailableError, match="failed at 'a'"):
        S3Store("s3://bucket/repo").get("a")


@pytest.mark.parametrize("location", ["s3://", "s3:///x", "s3://b/../x", "s3://b/A", "s3://b/x?y"])
def test_addresses_that_make_no_sense(location: str) -> None:
    with pytest.raises(UsageError):
        open_store(location)
