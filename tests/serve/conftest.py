"""Models that are served."""

import pytest

import sparity
from quick_models import tiny
from sparity.models.loading import load_tokenizer

__all__ = ["tiny"]


@pytest.fixture(scope="session")
def zoo_llama():
    """`zoo:llama` on the engine, and its tokenizer."""
    return sparity.attach(sparity.load("zoo:llama", dtype="bfloat16")), load_tokenizer("zoo:llama")
