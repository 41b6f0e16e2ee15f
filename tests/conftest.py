"""Servers that take long to start, one of each for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ceph import Gateway, running_gateway


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A real S3 server."""
    with running_gateway(tmp_path_factory.mktemp("ceph")) as server:
        yield server
