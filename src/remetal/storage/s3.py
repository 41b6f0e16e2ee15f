"""A bucket as a store: `s3://BUCKET/PREFIX`, at AWS or at whatever speaks its protocol.

Credentials, region and endpoint come from where the `aws` command finds them: AWS_ACCESS_KEY_ID and its companions,
~/.aws/credentials and AWS_PROFILE, the instance's role; AWS_ENDPOINT_URL for another provider. The bucket has to honour
`If-None-Match: *`, which makes of two writers one the winner; unless it keeps every version, that is tried before the
first object is written.

What is large goes in parts: a slow line fails at one part then, and not at the whole. obstore's own uploads in parts
cannot be conditional, so the requests are botocore's.

In a bucket that keeps versions the oldest version of an object is the object: what somebody uploads over it, and
markers that say it is deleted, change nothing. Objects below `locks/` come and go; a marker ends those.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import botocore.exceptions
import botocore.session
import obstore
import obstore.exceptions
import obstore.store

from remetal.errors import RefusedError, UnavailableError, UsageError
from remetal.storage.address import split_address
from remetal.storage.store import (
    AlreadyExistsError,
    Entry,
    NotFoundError,
    Pieces,
    RetainedError,
    check_name,
    is_name,
    is_volatile,
)

if TYPE_CHECKING:
    from obstore.store import S3Credential

_TIMEOUT, _CONNECT_TIMEOUT = timedelta(minutes=10), timedelta(seconds=20)
"""For one whole request: as long as 32 MiB take at half a megabit a second."""
PART_SIZE = 8 << 20
"""Bytes above which an object goes in parts, and of each part; S3 wants 5 MiB at least."""
_PART_PAUSES = (0.5, 2.0, 8.0)
"""Seconds before a part is tried again."""
_ABANDONED = timedelta(days=1)
"""Age at which an upload in parts that nobody has finished is dead; that of the server's clock."""
_PROBE = ".remetal/conditional"
"""A key that no object has, to find out what the provider does."""
_KNOWN_VERSIONS = 1 << 17
"""Of how many objects the version that counts is remembered."""
_DEFAULT_REGION = "us-east-1"
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
_TAKEN = {"PreconditionFailed", "412"}
_DENIED = {"AccessDenied", "AllAccessDisabled", "InvalidRequest"}


@dataclass(frozen=True, slots=True)
class _Version:
    """One version of an object, or with the size -1 a marker that it was deleted; `row` as the server tells it."""

    key: str
    version: str
    size: int
    row: Mapping[str, Any]


class S3Store:
    """The store of `remetal.storage.store` in a bucket, or below a prefix of it."""

    def __init__(self, location: str) -> None:
        secrets = "Keys belong into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials and AWS_PROFILE."
        parts = split_address(location, "s3://BUCKET/PREFIX", secrets=secrets)
        prefix = unquote(parts.path).strip("/")
        if not _BUCKET.fullmatch(parts.netloc) or (prefix and not is_name(prefix)):
            raise UsageError(
                "the address of the repository is not a place in a bucket",  # what stands in it may be a key
                hint=f"Write s3://BUCKET or s3://BUCKET/PREFIX, the prefix in lower case. {secrets}",
            )
        self._location, self._bucket = location, parts.netloc
        self._prefix = f"{prefix}/" if prefix else ""
        self._session = botocore.session.Session()
        self._guard = threading.Lock()
        self._objects: obstore.store.S3Store | None = None
        self._client: Any = None
        self._versioned = self._keeps_all = False
        self._swept = False
        self._probing = threading.Lock()
        self._replaces: bool | None = None
        self._joins: bool | None = None
        self._first: OrderedDict[str, _Version] = OrderedDict()

    @property
    def location(self) -> str:
        """The address as the person gave it."""
        return self._location

    def put(self, name: str, data: Pieces) -> None:
        """Create an object; see the contract."""
        check_name(name)
        with self._explained(name):
            objects = self._open()
            if self._versioned and self._find_first(name) is not None:
                raise self._taken(name)
            if not self._keeps_all:
                self._need_conditional()
            self._sweep()
            whole = b"".join(data)
            if len(whole) > PART_SIZE and (self._keeps_all or self._joins_conditionally()):
                version = self._put_parts(self._prefix + name, whole)
            else:
                made = obstore.put(objects, self._prefix + name, whole, mode="create", use_multipart=False)
                version = str(made["version"])
            if self._keeps_all:
                self._need_first(name, version)

    def _put_parts(self, key: str, data: bytes) -> str:
        """Create an object in parts, and return its version; what was uploaded goes away again where that fails."""
        place = {"Bucket": self._bucket, "Key": key}
        upload = self._client.create_multipart_upload(**place)["UploadId"]
        try:
            parts = []
            for number, start in enumerate(range(0, len(data), PART_SIZE), start=1):
                body = data[start : start + PART_SIZE]
                made = self._put_part(**place, UploadId=upload, PartNumber=number, Body=body)
                parts.append({"ETag": made["ETag"], "PartNumber": number})
            done = self._client.complete_multipart_upload(
                **place, UploadId=upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
        except BaseException:
            with suppress(botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
                self._client.abort_multipart_upload(**place, UploadId=upload)
            raise
        return str(done.get("VersionId", ""))

    def _put_part(self, **words: Any) -> Any:
        """Upload one part, and where the line breaks once more, so that what went before it is not lost."""
        for pause in _PART_PAUSES:
            try:
                return self._client.upload_part(**words)
            except (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError):
                time.sleep(pause)
        return self._client.upload_part(**words)

    def _need_conditional(self) -> None:
        """Raise RefusedError if the provider, or a proxy before it, creates an object over one that is there already.

        Tried once, on an object of our own, which stays: after the first time it takes one request. Without versions
        there would be no telling whose object it is.
        """
        with self._probing:
            if self._replaces is None:
                self._replaces = self._put_probe() and self._put_probe()
        if self._replaces:
            raise RefusedError(
                f"{self._location} creates an object over another one of the same name",
                hint="The provider, and a proxy before it, has to honour `If-None-Match: *`; or let the bucket keep "
                "versions, and these credentials see that it does (s3:GetBucketVersioning).",
            )

    def _put_probe(self) -> bool:
        """Create our own object; return whether that was let happen: there was none, or nobody looks."""
        try:
            obstore.put(self._open(), self._prefix + _PROBE, b"probe", mode="create", use_multipart=False)
        except obstore.exceptions.AlreadyExistsError:
            return False
        return True

    def _joins_conditionally(self) -> bool:
        """Whether the provider refuses to join parts to an object that is there already; some just replace it.

        Tried once, on the object of our own that `_need_conditional` has made.
        """
        with self._probing:
            if self._joins is None:
                try:
                    self._put_parts(self._prefix + _PROBE, b"probe")
                except botocore.exceptions.ClientError as error:
                    if _code(error) not in _TAKEN:
                        raise
                    self._joins = True
                else:
                    self._joins = False
            return self._joins

    def _sweep(self) -> None:
        """Once, end uploads in parts whose writers are no more: nobody lists them, and they cost money."""
        with self._guard:
            swept, self._swept = self._swept, True
        if swept:
            return
        with suppress(botocore.exceptions.ClientError):  # these credentials may not, or the provider cannot
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                now = _server_time(page)
                for row in page.get("Uploads", ()):
                    if row["Initiated"] < now - _ABANDONED:
                        self._client.abort_multipart_upload(
                            Bucket=self._bucket, Key=row["Key"], UploadId=row["UploadId"]
                        )

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return an object's bytes; see the contract."""
        check_name(name)
        with self._explained(name):
            objects = self._open()
            options: dict[str, Any] = {}
            if self._versioned:
                found = self._find_first(name)
                if found is None:
                    raise NotFoundError(f"{self._location} has no object '{name}'")
                options["version"], total = found.version, found.size
            elif start or size is not None:
                total = int(obstore.head(objects, self._prefix + name)["size"])
            else:
                return bytes(obstore.get(objects, self._prefix + name).bytes())
            end = total if size is None else min(total, start + size)
            if end <= start:
                return b""
            if (start, end) != (0, total):
                options["range"] = (start, end)
            return bytes(obstore.get(objects, self._prefix + name, options=options).bytes())  # type: ignore[arg-type]

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield objects in the order of names; see the contract."""
        if prefix.rpartition("/")[0] and not is_name(prefix.rpartition("/")[0]):
            return
        with self._explained(prefix):
            self._open()
            for entry in self._list_versions(prefix) if self._versioned else self._list(prefix):
                if is_name(entry.name):
                    yield entry

    def delete(self, name: str) -> None:
        """Remove an object; see the contract."""
        check_name(name)
        with self._explained(name):
            objects = self._open()
            if self._versioned:
                self._delete_versions(name)
                return
            with suppress(FileNotFoundError, obstore.exceptions.NotFoundError):
                obstore.delete(objects, self._prefix + name)

    def keep(self, names: Iterable[str]) -> int:
        """Lock objects again for as long as the bucket locks new ones; see the contract."""
        with self._explained(""):
            self._open()
            period, now = self._retention()
            if period is None:
                return 0
            kept = 0
            for name in names:
                found = self._find_first(name)
                if found is None:
                    continue
                place = {"Bucket": self._bucket, "Key": self._prefix + name, "VersionId": found.version}
                until = self._locked_until(place)
                if until is None or until < now + period / 2:
                    retention = {"Mode": "COMPLIANCE", "RetainUntilDate": now + period}
                    self._client.put_object_retention(**place, Retention=retention)
                    kept += 1
            return kept

    def close(self) -> None:
        """Let go of the connections."""
        if self._client is not None:
            self._client.close()

    def _open(self) -> obstore.store.S3Store:
        with self._guard:
            if self._objects is None:
                region = self._session.get_config_variable("region") or _DEFAULT_REGION
                self._client = self._session.create_client("s3", region_name=region, config=_client_config())
                endpoint = self._client.meta.endpoint_url
                self._objects = obstore.store.S3Store(
                    self._bucket,
                    region=region,
                    endpoint=endpoint,
                    credential_provider=self._credentials(),
                    client_options={
                        "allow_http": endpoint.startswith("http://"),
                        "timeout": _TIMEOUT,
                        "connect_timeout": _CONNECT_TIMEOUT,
                    },
                    retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},  # others try again
                )
                status = self._versioning()
                self._versioned, self._keeps_all = status in {"Enabled", "Suspended"}, status == "Enabled"
            return self._objects

    def _credentials(self) -> Callable[[], S3Credential]:
        """Return what gives the present credentials: those of a role change every hour."""
        found = self._session.get_credentials()
        if found is None:
            raise RefusedError(
                f"there are no credentials for {self._location}",
                hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with ~/.aws/credentials.",
            )

        def provide() -> S3Credential:
            now = found.get_frozen_credentials()
            return {
                "access_key_id": now.access_key,
                "secret_access_key": now.secret_key,
                "token": now.token,
                "expires_at": datetime.now(UTC) + timedelta(minutes=5),
            }

        return provide

    def _versioning(self) -> str:
        """Return whether the bucket keeps versions: `Enabled`, `Suspended` (those that there are), or nothing."""
        try:
            return str(self._client.get_bucket_versioning(Bucket=self._bucket).get("Status", ""))
        except botocore.exceptions.ClientError as error:
            if _code(error) in _DENIED:  # who may not ask gets the newest version, as everywhere
                return ""
            raise

    def _list(self, prefix: str) -> Iterator[Entry]:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
            for row in page.get("Contents", ()):
                yield Entry(row["Key"].removeprefix(self._prefix), row["Size"])

    def _list_versions(self, prefix: str) -> Iterator[Entry]:
        """Yield what there is of each name, in their order: all versions of a name stand together."""
        for key, versions in groupby(self._read_versions(prefix), key=lambda each: each.key):
            name = key.removeprefix(self._prefix)
            first = _choose(name, list(versions))
            if first is not None:
                self._remember(name, first)
                yield Entry(name, first.size)

    def _read_versions(self, prefix: str) -> Iterator[_Version]:
        """Yield all versions of the names with a prefix, and the markers that they are deleted, by name."""
        pages = self._client.get_paginator("list_object_versions")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
            rows = [_Version(row["Key"], row["VersionId"], row["Size"], row) for row in page.get("Versions", ())]
            rows += [_Version(row["Key"], row["VersionId"], -1, row) for row in page.get("DeleteMarkers", ())]
            yield from sorted(rows, key=lambda each: each.key)  # the newest first, and markers last, of each name

    def _find_first(self, name: str) -> _Version | None:
        """Return the version that is the object, or None if there is no object of that name."""
        with self._guard:
            if name in self._first and not is_volatile(name):
                return self._first[name]
        key = self._prefix + name
        first = _choose(name, [each for each in self._read_versions(name) if each.key == key])
        if first is not None:
            self._remember(name, first)
        return first

    def _remember(self, name: str, version: _Version) -> None:
        with self._guard:
            self._first[name] = version
            self._first.move_to_end(name)
            if len(self._first) > _KNOWN_VERSIONS:
                self._first.popitem(last=False)

    def _need_first(self, name: str, version: str) -> None:
        """Raise AlreadyExistsError if the version that was just made is not the first, and take it back.

        With versions some providers let every writer in that asks whether the name is free at the same moment.
        """
        first = self._find_first(name)
        if first is None or first.version != version:
            with suppress(RetainedError):
                self._delete_version(name, version)
            raise self._taken(name)

    def _delete_versions(self, name: str) -> None:
        """Delete all versions of an object for good, and the markers that it was deleted."""
        with self._guard:
            self._first.pop(name, None)
        try:
            for each in list(self._read_versions(name)):
                if each.key == self._prefix + name:
                    self._delete_version(name, each.version)
        except RetainedError:
            if not is_volatile(name):
                raise
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)

    def _delete_version(self, name: str, version: str) -> None:
        try:
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name, VersionId=version)
        except botocore.exceptions.ClientError as error:
            if _code(error) in _DENIED:
                raise RetainedError(
                    f"{self._location} does not let the object '{name}' be deleted yet",
                    hint="It is locked for a time, or these credentials may not delete versions.",
                ) from error
            raise

    def _taken(self, name: str) -> AlreadyExistsError:
        return AlreadyExistsError(f"{self._location} has an object '{name}' already")

    def _retention(self) -> tuple[timedelta | None, datetime]:
        """Return for how long the bucket locks new objects in compliance mode, None if it does not; and its time now.

        By our clock nothing is locked: a lock that is years too long could never be taken back.
        """
        try:
            told = self._client.get_object_lock_configuration(Bucket=self._bucket)
        except botocore.exceptions.ClientError as error:
            if _code(error) in {"ObjectLockConfigurationNotFoundError", "NotImplemented", *_DENIED}:
                return None, datetime.min.replace(tzinfo=UTC)
            raise
        rule = told["ObjectLockConfiguration"].get("Rule", {}).get("DefaultRetention", {})
        days = rule.get("Days", 0) + 365 * rule.get("Years", 0)
        return timedelta(days=days) if rule.get("Mode") == "COMPLIANCE" and days else None, _server_time(told)

    def _locked_until(self, place: dict[str, str]) -> datetime | None:
        try:
            until: datetime = self._client.get_object_retention(**place)["Retention"]["RetainUntilDate"]
        except botocore.exceptions.ClientError as error:
            if _code(error) in {"NoSuchObjectLockConfiguration", "ObjectLockConfigurationNotFoundError"}:
                return None
            raise
        return until if until.tzinfo else until.replace(tzinfo=UTC)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn errors of the libraries and the server into sentences."""
        try:
            yield
        except obstore.exceptions.AlreadyExistsError as error:
            raise self._taken(name) from error
        except (FileNotFoundError, obstore.exceptions.NotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise self._no_bucket() from error
            raise NotFoundError(f"{self._location} has no object '{name}'") from error
        except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError) as error:
            raise self._denied(name) from error
        except obstore.exceptions.NotSupportedError as error:
            raise RefusedError(
                f"{self._location} cannot create an object only where there is none",
                hint="The provider has to honour `If-None-Match: *`.",
            ) from error
        except botocore.exceptions.ClientError as error:
            if _code(error) == "NoSuchBucket":
                raise self._no_bucket() from error
            if _code(error) in _TAKEN:
                raise self._taken(name) from error
            if _code(error) in {*_DENIED, "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", "ExpiredToken"}:
                raise self._denied(name) from error
            raise self._failed(name, str(error)) from error
        except (obstore.exceptions.BaseError, botocore.exceptions.BotoCoreError, OSError) as error:
            raise self._failed(name, str(error).splitlines()[0] if str(error) else type(error).__name__) from error

    def _no_bucket(self) -> RefusedError:
        return RefusedError(f"there is no bucket {self._bucket}", hint="Make it first, with the provider's own tools.")

    def _denied(self, name: str) -> RefusedError:
        return RefusedError(
            f"{self._location} does not allow it at '{name}' with these credentials",
            hint="Check AWS_ACCESS_KEY_ID or AWS_PROFILE, and the policy of the bucket.",
        )

    def _failed(self, name: str, what: str) -> UnavailableError:
        return UnavailableError(
            f"{self._location} failed at '{name}': {what}",
            hint="Is the endpoint (AWS_ENDPOINT_URL) right, and reachable? Then run the command again.",
        )


def _choose(name: str, versions: Sequence[_Version]) -> _Version | None:
    """Return the version of a name that is the object: the oldest, or the oldest since what is volatile was deleted."""
    markers = [each for each in versions if each.size < 0]
    found = [each for each in versions if each.size >= 0]
    if is_volatile(name) and markers:
        if any(each.row["IsLatest"] for each in markers):
            return None
        deleted = max(each.row["LastModified"] for each in markers)
        found = [each for each in found if each.row["LastModified"] >= deleted]
    return found[-1] if found else None


def _client_config() -> Any:
    from botocore.config import Config

    return Config(
        connect_timeout=20,
        read_timeout=60,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


def _server_time(answer: Mapping[str, Any]) -> datetime:
    """Return what the server's clock showed when it answered."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
