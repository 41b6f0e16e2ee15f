"""How Hypothesis looks for examples, and servers that take long to start, one of each for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.ceph import Gateway, running_gateway

_UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("steady", _UNTIMED, derandomize=True)
"""The same examples each time: what `make test` says of a commit is not a matter of luck, nor of a busy machine."""
settings.register_profile("search", _UNTIMED)
"""Other examples each time: what `make fuzz` looks for."""
settings.load_profile("steady")


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A real S3 server."""
    with running_gateway(tmp_path_factory.mktemp("ceph")) as server:
        yield server
