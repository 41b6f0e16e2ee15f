"""Chunks that are stored ahead of the image that they become part of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from remetal.errors import RemetalError
from remetal.repository.check import check_repository
from remetal.repository.session import Batch, Known, Session, open_session
from tests.repositories import CHUNK, Site, batches_of, make_site, restore

_SITE = make_site()
_DATA = os.urandom(5 * CHUNK) + bytes(2 * CHUNK) + b"text " * 20_000 + os.urandom(77)
_CHUNKS = -(-len(_DATA) // CHUNK)


@pytest.fixture
def site() -> Site:
    return _SITE.copy()


def stored(session: Session, data: bytes) -> list[Known]:
    kept: list[Known] = []
    session.store("sda:1", len(data), batches_of(data), kept.append)
    return kept


def mixed(known: list[Known], data: bytes, *fresh: int) -> Iterator[Batch | Known]:
    """Yield an image of what is known, but for the chunks `fresh`, which are read now."""
    ids = {each.first + number: identity for each in known for number, identity in enumerate(each.ids)}
    for chunk in range(_CHUNKS):
        part = data[chunk * CHUNK : (chunk + 1) * CHUNK]
        if chunk in fresh:
            yield Batch(chunk, memoryview(part), lambda: None)
        else:
            yield Known(chunk, [ids[chunk]], len(part))


@pytest.mark.parametrize("fresh", [(), (0,), (3, 4, 8), tuple(range(_CHUNKS))], ids=str)
def test_an_image_of_both_is_what_it_should_be(site: Site, fresh: tuple[int, ...]) -> None:
    later = bytearray(_DATA)
    for chunk in fresh:
        later[chunk * CHUNK : chunk * CHUNK + 9] = os.urandom(9)
    with open_session(site.repository, site.keys) as session:
        known = stored(session, _DATA)
        image = session.write_image("sda:1", len(_DATA), mixed(known, bytes(later), *fresh))
        snapshot = session.commit(layout=b'{"version": 1}', hostname="web.example")
    assert restore(site, snapshot) == bytes(later)
    assert image.used == len(_DATA)
    assert image.stored == session.statistics.stored_bytes > 0
    assert session.statistics.read_bytes == len(_DATA)
    assert check_repository(site.repository, keys=site.key, read_data=True).problems == []


def test_the_next_backup_knows_what_was_stored_ahead(site: Site) -> None:
    for expected in (True, False):
        with open_session(site.repository, site.keys) as session:
            session.write_image("sda:1", len(_DATA), stored(session, _DATA))
            session.commit(layout=b'{"version": 1}', hostname="web.example")
        assert bool(session.statistics.chunks_new) == expected


def test_what_was_never_stored_is_not_taken_for_known(site: Site) -> None:
    with open_session(site.repository, site.keys) as session:
        known = stored(session, _DATA)
        flipped = bytes([known[0].ids[0][0] ^ 1]) + known[0].ids[0][1:]
        with pytest.raises(RemetalError, match="could not be read back"):
            session.write_image("sda:1", len(_DATA), [replace(known[0], ids=[flipped, *known[0].ids[1:]]), *known[1:]])
    assert not [name for name in site.store.objects if name.startswith("history/")]


def test_known_chunks_come_in_order(site: Site) -> None:
    with open_session(site.repository, site.keys) as session:
        known = stored(session, _DATA)
        with pytest.raises(ValueError, match="cannot stand"):
            session.write_image("sda:1", len(_DATA), known[::-1])
