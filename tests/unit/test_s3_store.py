"""S3 beyond the contract: versions, object lock, keys that are wrong, against a real server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from remetal.errors import RefusedError, UnavailableError, UsageError
from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.forget import forget_snapshots
from remetal.repository.prune import PruneResult, prune_machine
from remetal.repository.repository import open_repository
from remetal.storage import NotFoundError, RetainedError, open_store
from remetal.storage.s3 import S3Store
from tests.ceph import Gateway
from tests.repositories import Site, backup, make_site, restore
from tests.servers import free_port
from tests.unit.test_repository_prune import noise


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


def test_a_repository_in_a_locked_bucket(locked: S3Store) -> None:
    """What is forgotten is not listed; what a prune would delete stays, is told, and comes up again."""
    memory = make_site()
    for name, data in memory.store.objects.items():
        locked.put(name, [data])
    site = Site(locked, open_repository(locked), memory.keys, memory.key)  # type: ignore[arg-type]
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
