"""Repositories as released versions wrote them: today's code reads each of them, byte for byte."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from remetal.repository.catalog import open_catalog
from remetal.repository.check import check_repository
from remetal.repository.repository import (
    list_keys,
    load_machine_keys,
    open_repository,
    unlock_with_kit,
    unlock_with_passphrase,
)
from remetal.repository.session import open_session
from tests.golden.make import LEFT_OUT, golden_image
from tests.repositories import MemoryStore, Site, restore, write

_FILES = sorted((Path(__file__).parents[1] / "golden").glob("format-*.json"))


@pytest.fixture(params=_FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text(encoding="utf-8"))
    return found | {"left_out": request.param.stem == "format-1-left-out"}


def open_site(golden: dict[str, Any], state: Path) -> Site:
    store = MemoryStore({name: base64.b64decode(data) for name, data in golden["objects"].items()})
    repository = open_repository(store)
    (state / f"{repository.config.id}.json").write_text(golden["machine_keys"], encoding="utf-8")
    keys = load_machine_keys(state, repository)
    assert keys is not None
    return Site(store, repository, keys, unlock_with_passphrase(repository, golden["passphrase"]))


def test_there_is_a_golden_repository() -> None:
    assert [path.name for path in _FILES] == ["format-1-left-out.json", "format-1.json"]


def test_it_is_read_to_the_last_byte(golden: dict[str, Any], tmp_path: Path) -> None:
    site = open_site(golden, tmp_path)
    assert unlock_with_kit(site.repository, "\n".join(golden["kit"])).id == site.key.id
    assert check_repository(site.repository, keys=site.key, read_data=True).problems == []
    assert [each.kind for each in list_keys(site.repository)] == ["recipient"] * 2 + ["passphrase"] * 2 + ["machine"]
    snapshots = open_catalog(site.repository, site.key).snapshots()
    assert [each.id for each in snapshots] == golden["snapshots"]
    for number, snapshot in enumerate(snapshots):
        assert hashlib.sha256(restore(site, snapshot)).hexdigest() == golden["images"][number]
        assert restore(site, snapshot) == golden_image(number)
        assert restore(site, snapshot, 1) == bytes(10 << 16)
        assert (snapshot.machine, snapshot.hostname, snapshot.tags) == ("golden", "golden.example", ("one", "two"))
        assert (snapshot.time, snapshot.layout) == ("2025-01-02T03:04:05Z", b'{"golden":true}')
        assert snapshot.left_out == (LEFT_OUT if number and golden["left_out"] else ())


def test_the_second_recipient_reads_what_was_sealed_to_it(golden: dict[str, Any], tmp_path: Path) -> None:
    site = open_site(golden, tmp_path)
    second = unlock_with_passphrase(site.repository, "second")
    assert [each.id for each in open_catalog(site.repository, second).snapshots()] == golden["snapshots"]


def test_the_machine_goes_on_where_it_was(golden: dict[str, Any], tmp_path: Path) -> None:
    site = open_site(golden, tmp_path)
    with open_session(site.repository, site.keys) as session:
        assert session.previous is not None
        assert session.previous.id == golden["snapshots"][-1]
        write(session, golden_image(1))
        snapshot = session.commit(layout=b"{}", hostname="h")
    assert session.statistics.chunks_new == session.statistics.changed_bytes == 0
    assert snapshot.images[0].digest == session.previous.images[0].digest
    assert snapshot.sequence == len(golden["snapshots"]) + 1
