"""Models that are served."""

import pytest

from quick_models import tiny
from served_http import open_llama, serving

__all__ = ["tiny"]


@pytest.fixture(scope="session")
def server():
    """A server of `zoo:llama`."""
    with serving([open_llama()], body=100_000) as served:
        yield served


@pytest.fixture(scope="session")
def llama():
    """`zoo:llama` without a server."""
    return open_llama()
