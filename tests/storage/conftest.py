"""What the storage ring shares: a kernel of our own to run things under."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lab.uml import Outcome, run_in_uml

Uml = Callable[..., Outcome]


@pytest.fixture
def uml() -> Uml:
    """`uml(work, disks=[…])`: run a script or an argv under User Mode Linux; see `lab.uml.run_in_uml`."""
    return run_in_uml
