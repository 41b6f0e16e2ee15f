"""Locations that have to be mounted: what is understood, what is refused, and where credentials come from."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from remetal.errors import RefusedError, RemetalError, UnavailableError, UsageError
from remetal.media.answer import is_address, merge_answer, named_places, parse_answer, parse_command_line
from remetal.storage import is_redundant
from remetal.system import shares
from remetal.system.shares import NfsShare, SmbShare, mounted_nfs, mounted_smb
from remetal.workflows import stores
from remetal.workflows.recover import parse_settings
from remetal.workflows.stores import opened_store
from tests.servers import free_port


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USER", "PASSWORD", "DOMAIN", "CREDENTIALS"):
        monkeypatch.delenv(f"REMETAL_SMB_{name}", raising=False)


@pytest.mark.parametrize(
    "location",
    [
        "nfs://",
        "nfs:///srv",
        "nfs://host:0/srv",
        "nfs://host:x/srv",
        "nfs://host:99999/srv",
        "nfs://root@host/srv",
        "nfs://host/srv/../../etc",
        "nfs://host/srv?x=y",
        "smb://host",
        "smb://host/",
        "smb://host/share/%2e%2e/x",
        "smb://host/share/a%00b",
        "smb://root:secret@host/share",
        "nfs://root:secret@host/share",
        "usb:",
        "usb:/x",
        "usb:LABEL/../x",
    ],
)
def test_locations_that_name_nothing(location: str) -> None:
    with pytest.raises(UsageError) as caught, opened_store(location):
        pass
    assert "secret" not in f"{caught.value.message} {caught.value.hint}"


def test_credentials_come_from_the_address_the_environment_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stores._smb_credentials("") == ("", "", "")
    with pytest.raises(RefusedError, match="no password for the SMB user web"):
        stores._smb_credentials("web")
    file = tmp_path / "credentials"
    file.write_text("username=filed\npassword=with=sign, and comma\ndomain=HOUSE\n")
    monkeypatch.setenv("REMETAL_SMB_CREDENTIALS", str(file))
    assert stores._smb_credentials("") == ("filed", "with=sign, and comma", "HOUSE")
    with pytest.raises(RefusedError):  # the file's password is another user's
        stores._smb_credentials("web")
    monkeypatch.setenv("REMETAL_SMB_USER", "named")
    monkeypatch.setenv("REMETAL_SMB_PASSWORD", "spoken")
    assert stores._smb_credentials("") == ("named", "spoken", "HOUSE")
    assert stores._smb_credentials("web") == ("web", "spoken", "HOUSE")
    monkeypatch.setenv("REMETAL_SMB_CREDENTIALS", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="absent"):
        stores._smb_credentials("")


def test_a_password_cannot_smuggle_options_in(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(shares, "_reach", lambda *words: "192.0.2.1")
    monkeypatch.setattr(shares, "mount_quietly", lambda source, folder, kind, options, **words: seen.append(options))
    with mounted_smb(SmbShare("h", "s", user="a,b", password="x,uid=5"), read_only=False):
        assert "user=a,,b" in seen[0]
        assert "pass=x,,uid=5" in seen[0]
    with pytest.raises(UsageError), mounted_smb(SmbShare("h", "s", user="u", password="a\nb"), read_only=False):
        pass
    assert "x,uid" not in repr(SmbShare("h", "s", user="u", password="x,uid=5"))


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with (
        pytest.raises(UnavailableError, match=f"127.0.0.1, port {port}.*refused"),
        opened_store(f"nfs://127.0.0.1:{port}/srv"),
    ):
        pass
    monkeypatch.setattr(shares, "_PATIENCE", 0.0)
    with pytest.raises(UnavailableError, match="nowhere"), opened_store("smb://nowhere.invalid/share"):
        pass


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENODEV, RefusedError, "kernel knows no"),
        (errno.EPERM, RefusedError, "only root"),
        (errno.EACCES, RefusedError, "does not let"),
        (errno.ETIMEDOUT, UnavailableError, "timed out"),
    ],
)
def test_what_the_kernel_says_is_told_as_what_it_is(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[RemetalError], words: str
) -> None:
    """These answers need another kernel or server than a host has; all others are tested on real ones."""

    def refuse(*arguments: object, **words: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shares, "_reach", lambda *arguments: "192.0.2.1")
    monkeypatch.setattr(shares, "mount_quietly", refuse)
    with pytest.raises(kind, match=words), mounted_nfs(NfsShare("nas", "/srv"), read_only=True):
        pass
    with pytest.raises(kind, match=words), mounted_smb(SmbShare("nas", "srv"), read_only=True):
        pass


def test_a_stick_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "VOLUME_SECONDS", 0.0)
    with pytest.raises(UnavailableError, match="'NO SUCH LABEL'"), opened_store("usb:NO SUCH LABEL/x"):
        pass


def test_an_answer_names_a_repository_on_the_network() -> None:
    text = b'repository = "smb://web@nas/vault"\nsettings-file = "usb:KEYS/env"\npassphrase = "x"\n'
    answer = parse_answer(text, "a.toml")
    assert is_address(answer.repository)
    assert named_places(answer) == ["usb:KEYS/env"]
    line = parse_command_line("remetal.repo=nfs://nas/vault remetal.settings-file=/run/env remetal.kit-file=/run/kit")
    assert named_places(merge_answer(None, line, "")) == ["/run/env", "/run/kit"]


def test_settings_of_an_answer() -> None:
    text = "# where it is\nREMETAL_SMB_PASSWORD=a=b c\n\nAWS_PROFILE=vault\n"
    assert parse_settings(text, "env") == {"REMETAL_SMB_PASSWORD": "a=b c", "AWS_PROFILE": "vault"}
    for line in ("PATH=/secret", "REMETAL_X", "LD_PRELOAD=secret", "export REMETAL_X=secret", "=secret"):
        with pytest.raises(RefusedError, match="line 2 of 'env'") as caught:
            parse_settings(f"REMETAL_A=1\n{line}\n", "env")
        assert "secret" not in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    "location",
    [
        "/mnt/backup",
        "file:///mnt",
        "usb:stick/a",
        "uuid:12-34/a",
        "nfs://h/a",
        "smb://h/a",
        "sftp://h/a",
        "https://h/a",
    ],
)
def test_only_s3_keeps_objects_several_times_itself(location: str) -> None:
    assert not is_redundant(location)
    assert is_redundant("s3://bucket/prefix")
