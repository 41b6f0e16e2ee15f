"""Forgetting, pruning and copying as plain commands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from remetal.units import MIB
from tests.commands.site import Site, hash_file


@pytest.fixture
def disk(site: Site) -> Path:
    """A disk file of which a part differs in each backup; three snapshots are made, tagged t0 to t2."""
    return back_up_thrice(site)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site with the same snapshots, for tests that change nothing."""
    site = Site(tmp_path_factory.mktemp("shared"))
    site.remetal("init", "--quiet")
    back_up_thrice(site)
    return site


def back_up_thrice(site: Site) -> Path:
    disk = site.folder / "d.img"
    disk.write_bytes(os.urandom(4 * MIB))
    for number in range(3):
        with disk.open("r+b") as file:
            file.seek(number * MIB)
            file.write(os.urandom(MIB))
        site.remetal("backup", "--machine", "web", "--disk", disk, "--tag", f"t{number}")
    return disk


def repository_size(site: Site) -> int:
    return sum(path.stat().st_size for path in (site.repository / "packs").rglob("*") if path.is_file())


def tags(site: Site) -> list[str]:
    return [each["tags"][0] for each in site.remetal("snapshots", "--json").json]


def test_forget_and_prune_leave_what_is_kept(site: Site, disk: Path) -> None:
    before = repository_size(site)
    shown = site.remetal("forget", "--keep-last", "1", "--keep-tag", "t0", "--dry-run", "--json").json
    assert [(each["tags"], each["kept"]) for each in shown] == [
        (["t0"], ["tag t0"]),
        (["t1"], []),
        (["t2"], ["newest", "last"]),
    ]
    assert tags(site) == ["t0", "t1", "t2"]
    done = site.remetal("forget", "--keep-last", "1")
    assert "2 snapshots forgotten, 1 kept" in done.out
    assert tags(site) == ["t2"]
    site.remetal("check", "--read-data")
    first = site.remetal("prune", "--json").json[0]
    assert (first["machine"], first["deleted_bytes"]) == ("web", 0)
    assert first["condemned_bytes"] > 0
    assert 6.9 * 86400 < first["grace_left"] <= 7 * 86400
    assert repository_size(site) >= before
    site.remetal("prune")
    second = site.remetal("prune", "--grace", "0", "--json").json[0]
    assert second["deleted_bytes"] == first["condemned_bytes"]
    assert repository_size(site) < before
    site.remetal("check", "--read-data")
    site.remetal("restore", "latest", "--map", site.folder / "new.img", "--yes", "--verify")
    assert hash_file(site.folder / "new.img") == hash_file(disk)
    site.remetal("backup", "--machine", "web", "--disk", disk, "--tag", "t3")
    assert tags(site) == ["t2", "t3"]
    site.remetal("check")


def test_policies_of_machines(site: Site, disk: Path) -> None:
    site.remetal("backup", "--machine", "db", "--disk", disk, "--tag", "d0")
    site.remetal("backup", "--machine", "db", "--disk", disk, "--tag", "d1")
    file = site.folder / "policies.toml"
    file.write_text("[machines.web]\nkeep-last = 2\n")
    shown = site.remetal("forget", "--policy", file, "--json").json
    assert {each["tags"][0]: each["kept"] for each in shown} == {
        "t0": [],
        "t1": ["last"],
        "t2": ["newest", "last"],
        "d0": ["no policy"],
        "d1": ["no policy"],
    }
    file.write_text("[default]\nkeep-last = 1\n[machines.web]\nkeep-last = 9\n")
    site.remetal("forget", "--policy", file)
    assert tags(site) == ["t1", "t2", "d1"]


def test_a_policy_of_no_machine_forgets_nothing(site: Site, disk: Path) -> None:
    """Who mistypes a name would else have the default policy for that machine."""
    before = tags(site)
    file = site.folder / "policies.toml"
    file.write_text("[default]\nkeep-last = 1\n[machines.wbe]\nkeep-last = 9\n")
    said = site.remetal("forget", "--policy", file, code=2).err
    assert "there is a policy for a machine 'wbe', which is not in the repository; nothing was forgotten" in said
    assert "The repository has: web." in said
    assert tags(site) == before


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "in one way"),
        (("latest", "--keep-last", "1"), 2, "in one way"),
        (("--keep-tag", "x"), 2, "keeps no snapshot by its age"),
        (("--keep-last", "-1"), 2, "negative"),
        (("latest",), 3, "newest of machine 'web'"),
        (("0000ffff",), 2, "snapshot"),
        (("--keep-last", "1", "--machine", "nobody"), 2, "no machine 'nobody'"),
        (("--policy", "/nonexistent"), 2, "cannot read"),
        (("--policy", "/etc/hostname"), 2, "no policies"),
    ],
)
def test_bad_input_of_forget(shared: Site, words: tuple[str, ...], code: int, says: str) -> None:
    done = shared.remetal("forget", *words, code=code)
    assert says in done.err
    assert tags(shared) == ["t0", "t1", "t2"]


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--grace", "soon"), "not a duration"), (("--max-unused", "101"), "hundred"), (("--machine", "x"), "no machine")],
)
def test_bad_input_of_prune(shared: Site, words: tuple[str, ...], says: str) -> None:
    assert says in shared.remetal("prune", *words, code=2).err


def test_the_last_snapshot_goes_only_on_demand(site: Site, disk: Path) -> None:
    ids = [each["id"] for each in json.loads(site.remetal("snapshots", "--json").out)]
    site.remetal("forget", *ids, "--even-newest")
    assert tags(site) == []
    site.remetal("prune", "--grace", "0")
    assert repository_size(site) == 0
    site.remetal("check")


def test_nothing_is_deleted_of_a_damaged_machine(site: Site, disk: Path) -> None:
    site.remetal("forget", "--keep-last", "1")
    before = repository_size(site)
    (damaged,) = list((site.repository / "index").rglob("*/*"))[:1]
    damaged.write_bytes(b"garbage")
    done = site.remetal("prune", "--grace", "0", code=5)
    assert "warning: web" in done.err
    assert repository_size(site) == before


@pytest.mark.parametrize("kind", ["keys/machines", "keys/secrets"])
def test_a_machine_that_cannot_be_opened_is_told_and_the_others_go_on(site: Site, disk: Path, kind: str) -> None:
    (damaged,) = (path for path in (site.repository / kind).iterdir())
    site.remetal("backup", "--machine", "db", "--disk", disk, "--tag", "d0")
    site.remetal("backup", "--machine", "db", "--disk", disk, "--tag", "d1")
    damaged.write_bytes(b"garbage")
    for words in (("--dry-run",), ()):
        done = site.remetal("forget", "--keep-last", "1", *words, "--json", code=5)
        assert [(each["tags"], each["kept"]) for each in done.json] == [(["d0"], []), (["d1"], ["newest", "last"])]
        assert f"warning: the object {kind}" in done.err.lower()
    done = site.remetal("prune", "--json", code=5)
    assert [each["machine"] for each in done.json] == ["db"]
    assert f"warning: the object {kind}" in done.err.lower()
    assert "passed over" in done.err
    for command in (("forget", "--keep-last", "1"), ("prune",)):
        site.remetal(*command, "--machine", "db")
        assert "none of those that can be opened" in site.remetal(*command, "--machine", "web", code=5).err


def test_forget_tells_of_what_it_cannot_read(site: Site, disk: Path) -> None:
    oldest = min((site.repository / "history").rglob("*/*"))
    oldest.write_bytes(b"garbage")
    done = site.remetal("forget", "--keep-last", "2", "--json", code=5)
    assert [each["tags"] for each in done.json] == [["t1"], ["t2"]]
    assert f"history/{oldest.parent.name}/{oldest.name}" in done.err


def test_the_keys_of_a_machine_do_not_forget(shared: Site) -> None:
    for words in (("forget", "--keep-last", "1"), ("prune",)):
        assert "passphrase is needed" in shared.remetal(*words, code=3, REMETAL_PASSPHRASE_FILE="").err


def test_a_copy_restores_and_follows(site: Site, disk: Path) -> None:
    copy = site.folder / "copy"
    done = site.remetal("copy", "--to", copy, "--json").json
    assert (done["there"], done["problems"]) == (0, [])
    site.remetal("restore", "latest", "--repo", copy, "--map", site.folder / "new.img", "--yes")
    assert hash_file(site.folder / "new.img") == hash_file(disk)
    site.remetal("forget", "--keep-last", "1")
    site.remetal("prune", "--grace", "0")
    site.remetal("copy", "--to", copy, "--delete")
    site.remetal("check", "--read-data", "--repo", copy)
    assert len(site.remetal("snapshots", "--repo", copy, "--json").json) == 1
    assert "same place" in site.remetal("copy", "--to", site.repository, code=2).err
    next(path for path in (site.repository / "packs").rglob("*") if path.is_file()).write_bytes(b"garbage")
    assert "damaged" in site.remetal("copy", "--to", site.folder / "third", code=5).out
