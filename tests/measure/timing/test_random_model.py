"""The random model beside a small one: what it holds, and when it is left out."""

import pytest

from sparity.engine.kernels import native
from sparity.measure.timing import random_model
from sparity.measure.timing.generation import Timed

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}
BLOCKS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)  # weights of the matrices
REST = 2 * 96 * 64 + 5 * 64  # embedding, head, norms


@pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}")
def test_half_of_the_blocks_is_zero_and_three_models_take_turns(monkeypatch):
    turns = []

    def generate(model, ids, tokens):
        assert not model(ids).logits.isnan().any()
        turns.append(tuple(ids.shape))
        return Timed(1.0, 0.1)

    monkeypatch.setattr("sparity.measure.timing.speed.time_generation", generate)
    monkeypatch.setattr(random_model, "available_memory", lambda: None)
    found = random_model.time_larger(TINY)
    assert turns == [(1, random_model.PROMPT)] * 3 * (random_model.ROUNDS + 1)
    assert found.parameters == BLOCKS + REST
    assert found.sparsity == pytest.approx(0.5, abs=0.01)
    assert 2 * (BLOCKS + REST) <= found.bytes_dense < 2 * (BLOCKS + REST) + 256  # and the rotary table
    saved = 2 * BLOCKS * (1 - 0.5 - 1 / 16)  # the masks take a sixteenth, offsets a little
    assert found.bytes_dense - found.bytes_sparse == pytest.approx(saved, rel=0.05)
    assert found.speed.engine_dense.decode_ratio.median == 1
    assert found.skipped is None


def test_it_is_left_out_without_memory_or_kernels(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: None)
    monkeypatch.setattr(random_model, "available_memory", lambda: 3_900_000_000)
    found = random_model.time_larger()
    assert (found.speed, found.parameters) == (None, 349_206_528)
    assert found.skipped == "3.9 GB of memory is available, 4.0 GB is needed"
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler")
    assert random_model.time_larger().skipped == "no compiled kernels: no compiler"
