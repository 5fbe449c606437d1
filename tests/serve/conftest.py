"""Models that are served."""

import pytest

from quick_models import tiny
from served_http import serving
from sparity.serve.served_model import open_model

__all__ = ["tiny"]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'odd' or message.content == 'refuse' %}"
    "{{ raise_exception('no such role') }}{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)


def open_llama(**options):
    """`zoo:llama`, ready to be served, with a chat template."""
    return open_model(
        "zoo:llama",
        **{"name": "llama", "slots": 4, "context": 256, "template": TEMPLATE, "prefix_bytes": 10**7, **options},
    )


@pytest.fixture(scope="session")
def server():
    """A server of `zoo:llama`."""
    with serving([open_llama()], body=100_000) as served:
        yield served


@pytest.fixture(scope="session")
def llama():
    """`zoo:llama` without a server."""
    return open_llama()
