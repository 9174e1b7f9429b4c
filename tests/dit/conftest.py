"""What the tests of attention share."""

import pytest

from wan_core.dit.attention.backend import imported
from wan_core.dit.attention.dispatch import trial, warn_once
from wan_core.dit.attention.flex import flex


@pytest.fixture
def fresh():
    """As in a new process: nothing was imported, tried or warned of, and nothing of it is left behind."""
    remembering = (imported, trial, warn_once, flex)
    for function in remembering:
        function.cache_clear()
    yield
    for function in remembering:
        function.cache_clear()
