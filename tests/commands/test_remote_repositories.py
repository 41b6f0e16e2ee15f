"""Repositories that lie elsewhere, as plain commands: a real SSH server, a real S3 server, and a real web server."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from remetal.units import MIB
from tests.commands.site import Site, hash_file
from tests.servers import SshServer, free_port, running_nginx, running_sshd


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def away(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    """A site whose repository, which is not made yet, lies on the server that the test's parameter names."""
    site = Site(tmp_path)
    if request.param == "sftp":
        return over_ssh(site, request.getfixturevalue("sshd"))
    gateway = request.getfixturevalue("gateway")
    bucket = f"commands-{uuid.uuid4().hex[:12]}"
    gateway.client().create_bucket(Bucket=bucket)
    site.environment |= gateway.environment() | {"REMETAL_REPO": f"s3://{bucket}/servers/web"}
    return site


def over_ssh(site: Site, server: SshServer) -> Site:
    site.environment |= {
        "REMETAL_REPO": server.location(site.repository),
        "REMETAL_SSH_KEY": str(server.key),
        "REMETAL_SSH_KNOWN_HOSTS": str(server.known_hosts),
    }
    return site


def make_disk(site: Site) -> Path:
    """Make a disk file of which a store gets more than one part."""
    disk = site.folder / "d.img"
    disk.write_bytes(os.urandom(12 * MIB))
    return disk


def back_up(site: Site, disk: Path, tag: str) -> str:
    done = site.remetal("backup", "--machine", "web", "--disk", disk, "--tag", tag, "--json").json
    assert isinstance(done["snapshot"], str)
    return done["snapshot"]


@pytest.mark.parametrize("away", ["sftp", "s3"], indirect=True)
def test_the_life_of_a_repository(away: Site) -> None:
    assert away.remetal("init", "--json").json["location"] == away.environment["REMETAL_REPO"]
    disk = make_disk(away)
    first, before = back_up(away, disk, "t0"), hash_file(disk)
    with disk.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(os.urandom(4 * MIB))
    second = back_up(away, disk, "t1")
    assert [each["id"] for each in away.remetal("snapshots", "--json").json] == [first, second]
    old, new = away.folder / "old.img", away.folder / "new.img"
    away.remetal("restore", first[:12], "--map", old, "--yes")
    assert hash_file(old) == before
    away.remetal("forget", "--keep-last", "1")
    pruned = away.remetal("prune", "--grace", "0", "--max-unused", "0", "--json").json[0]
    assert pruned["deleted_bytes"] > 0
    assert [each["id"] for each in away.remetal("snapshots", "--json").json] == [second]
    away.remetal("check", "--read-data")
    away.remetal("restore", "latest", "--map", new, "--yes", "--verify")
    assert new.read_bytes() == disk.read_bytes()


def test_what_was_backed_up_over_ssh_is_restored_from_a_web_server(sshd: SshServer, tmp_path: Path) -> None:
    site = over_ssh(Site(tmp_path), sshd)
    site.remetal("init", "--quiet")
    disk = make_disk(site)
    made = back_up(site, disk, "t0")
    stored = {path: path.stat().st_mtime_ns for path in site.repository.rglob("*")}
    with running_nginx(tmp_path / "nginx", tmp_path, "autoindex on", "autoindex_format json") as address:
        site.environment["REMETAL_REPO"] = f"{address}/repository"
        assert [each["id"] for each in site.remetal("snapshots", "--json").json] == [made]
        site.remetal("check", "--read-data")
        new = site.folder / "new.img"
        plan = site.remetal("plan", "latest", "--map", new, "--json").json
        site.remetal("restore", "latest", "--map", new, "--confirm", plan["id"])
        assert new.read_bytes() == disk.read_bytes()
        for words in (
            ("backup", "--machine", "web", "--disk", disk),
            ("forget", made, "--even-newest"),
            ("prune",),
        ):
            said = site.remetal(*words, code=3).err
            assert f"{address}/repository can only be read" in said, words
            assert "Back up to a folder, sftp:// or s3://" in said, words
        said = site.remetal("init", "--repo", f"{address}/nowhere", code=3).err
        assert f"{address}/nowhere can only be read" in said
        said = site.remetal("snapshots", "--repo", f"{address}/nowhere", code=3).err
        assert f"there is no repository at {address}/nowhere" in said
    assert {path: path.stat().st_mtime_ns for path in site.repository.rglob("*")} == stored


def test_a_host_that_is_another_one_is_refused(sshd: SshServer, tmp_path: Path) -> None:
    site = over_ssh(Site(tmp_path), sshd)
    other = tmp_path / "known_hosts"
    other.write_text(f"[127.0.0.1]:{sshd.port} {(sshd.key.parent / 'client.pub').read_text()}")
    said = site.remetal("init", code=3, REMETAL_SSH_KNOWN_HOSTS=str(other)).err
    assert "the key of the host 127.0.0.1 is not known, or is another than it was" in said
    assert "Compare its fingerprint" in said
    said = site.remetal("snapshots", code=3, REMETAL_SSH_KEY=str(sshd.key.parent / "host")).err
    assert "lets nobody in with the keys that are here" in said
    assert "REMETAL_SSH_KEY" in said
    assert not site.repository.exists()


@pytest.mark.parametrize("away", ["s3"], indirect=True)
def test_credentials_that_open_nothing_are_refused(away: Site) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        said = away.remetal("init", code=3, **{name: "wrong"}).err
        assert "does not allow it" in said
        assert "AWS_ACCESS_KEY_ID or AWS_PROFILE" in said
    said = away.remetal("init", "--repo", f"s3://no-{uuid.uuid4().hex}", code=3).err
    assert "there is no bucket no-" in said
    repository = away.environment["REMETAL_REPO"].replace("s3://", "s3://KEY:hunter2@")
    said = away.remetal("init", "--repo", repository, code=2).err
    assert "must not stand in the address" in said
    assert "hunter2" not in said


def test_servers_that_are_away(tmp_path: Path) -> None:
    """All at once, since each is tried for a while."""
    site = Site(tmp_path)
    away = f"127.0.0.1:{free_port()}"
    site.environment |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "x")
    site.environment["AWS_ENDPOINT_URL"] = f"http://{away}"
    locations = [f"sftp://{away}/srv", "s3://bucket/servers", f"http://{away}/servers"]
    running = [site.start("snapshots", "--repo", each, stderr=subprocess.PIPE) for each in locations]
    for location, process in zip(locations, running, strict=True):
        said = process.communicate()[1].decode()
        assert process.returncode == 6, said
        assert f"remetal: {location} failed at 'config'" in said
        assert "Is the" in said
