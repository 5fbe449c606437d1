"""Recipes run on the same few texts."""

import pytest

from sparity.pipeline.run.tokens import tokenised_once


@pytest.fixture(autouse=True, scope="session")
def texts_tokenised_once():
    """For all recipes; a file in a test's own folder is another text."""
    with tokenised_once():
        yield
