"""A folder in which the specification's names mean something: models and texts under exactly those names."""

import pytest
from transformers import AutoTokenizer

import sparity
from sparity.calibration.bundled import bundled_documents

MODELS = ("Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3-8B", "Qwen/Qwen2.5-14B")
TEXTS = ("wikitext-2", "c4")
CONTEXT, DOCUMENTS = 16, 40  # 128 windows of calibration text are then quickly gone through


@pytest.fixture(scope="session")
def names(tmp_path_factory):
    """The folder: the first two blocks of the bundled model with a short context, and Python's documentation."""
    place = tmp_path_factory.mktemp("sagellm")
    model = sparity.load("zoo:llama")
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers, model.config.max_position_embeddings = 2, CONTEXT
    for name in MODELS:
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for name in TEXTS:
        (place / name).write_text("\n\n".join(list(bundled_documents("python-docs:calibration"))[:DOCUMENTS]))
    return place


@pytest.fixture
def here(names, monkeypatch):
    """That folder as the current one; what is made in it stays for the tests that follow."""
    monkeypatch.chdir(names)
    return names
