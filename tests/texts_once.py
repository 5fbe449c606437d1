"""Texts that many tests read are tokenised once."""

import pytest

from sparity.pipeline.run.tokens import tokenised_once


@pytest.fixture(autouse=True, scope="module")
def texts_tokenised_once():
    """Where it is imported, a module reads every text once; a file in a test's own folder is a text of its own."""
    with tokenised_once():
        yield
