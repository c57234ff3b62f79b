"""What the tests of behaviour share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from behaviour_kit import Behaviour

from cogcache.small.shipped import WEIGHTS

WEIGHTS_OF = "COGCACHE_TEST_WEIGHTS"
"""Environment: a folder that ship.py wrote, to look at weights before they are put into the package."""


@pytest.fixture(scope="session")
def behaviour(tmp_path_factory: pytest.TempPathFactory) -> Behaviour:
    """Trained and generated once a run, whichever process comes first."""
    weights = Path(os.environ.get(WEIGHTS_OF, WEIGHTS))
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "behaviour"
    root.mkdir(exist_ok=True)
    return Behaviour(root, weights)
