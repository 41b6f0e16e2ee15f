"""A password or key in an address is refused by every kind of repository, and shown by none."""

from __future__ import annotations

import pytest

from remetal.errors import UsageError
from remetal.storage import KINDS, open_store
from remetal.workflows.stores import MOUNTED, opened_store

WHERE = {
    "file": "needs none",
    "sftp": "REMETAL_SSH_KEY",
    "http": "without a password",
    "https": "without a password",
    "s3": "AWS_SECRET_ACCESS_KEY",
    "nfs": "no passwords",
    "smb": "REMETAL_SMB_PASSWORD",
}
"""What the hint of each kind says of the place where a password or key belongs."""
LEAKS = [
    "user:hunter2@host/folder/x",
    "user:hunter2@host:22/folder/x",
    "user:hunter2@host:port/folder/x",
    "user:hunter2@host:0/folder/x",
    "user:hunter2@host:99999/folder/x",
    "user:hunter2@[host/folder/x",
    "user:hunter2@host",
    "user:hunter2@/folder/x",
    "user:SE@hunter2@host/folder/x",
    "user:with/hunter2@host/folder/x",
    "user:with?hunter2@host/folder/x",
    "user:with#hunter2@host/folder/x",
    "user:%53hunter2@host/folder/x",
    ":hunter2@host/folder/x",
    "user:hunter2/folder/x",
    "host/folder/x?token=hunter2",
    "host/folder/x#hunter2",
    "user:hunter2@host/../x?y",
]


@pytest.mark.parametrize("rest", LEAKS)
@pytest.mark.parametrize("scheme", WHERE)
def test_a_secret_in_an_address_is_refused_and_not_shown(scheme: str, rest: str) -> None:
    with pytest.raises(UsageError) as caught, opened_store(f"{scheme}://{rest}"):
        pass
    assert "hunter2" not in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert WHERE[scheme] in caught.value.hint


@pytest.mark.parametrize("scheme", ["file", "http", "https", "s3", "nfs"])
def test_who_needs_no_user_refuses_one(scheme: str) -> None:
    with pytest.raises(UsageError) as caught, opened_store(f"{scheme}://hunter2@host/folder/x"):
        pass
    assert "hunter2" not in f"{caught.value.message} {caught.value.hint}"
    assert WHERE[scheme] in caught.value.hint


@pytest.mark.parametrize("rest", ["KEY:12/hunter2@bucket/x", "KEY/hunter2@bucket", "bu cket/x", "KEY:12"])
def test_what_is_no_bucket_is_told_before_anything_is_asked_for(rest: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(f"s3://{rest}")
    assert "hunter2" not in f"{caught.value.message} {caught.value.hint}"


def test_all_kinds_are_among_these() -> None:
    assert {*KINDS, *MOUNTED} - {"usb", "uuid"} == set(WHERE)


@pytest.mark.parametrize(
    "location",
    ["sftp://me@host:2222/srv/a@b", "sftp://host/a%23b%3Fc", "s3://bucket", "http://[::1]:8000/a@b", "file:///a%3Fb"],
)
def test_addresses_that_are_good(location: str) -> None:
    store = open_store(location)
    assert store.location == location
    store.close()
