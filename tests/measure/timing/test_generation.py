"""One timed generation, with a clock that counts."""

import itertools

import pytest
import torch
from torch import nn

from families import build, tiny_configs
from sparity.engine.attach import attach, attached
from sparity.engine.decoding.model import has_fast_path
from sparity.engine.kernels import native
from sparity.errors import InvalidInput
from sparity.measure.data.report import Spread
from sparity.measure.timing import generation
from sparity.measure.timing.generation import Stamps, Timed, check_context, prompts, time_generation
from sparity.measure.timing.speed import compare_speed, engine_declines, pace

NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}")


@pytest.fixture(scope="module")
def llama():
    return build(tiny_configs()["llama"])


def clock(*times):
    return iter(times).__next__


def test_the_prompt_is_no_token_and_one_stall_does_not_count():
    stamps = Stamps(clock(10.0, 10.5, 10.6, 10.7, 19.0))
    for ids in ([[1, 2]], [3], [4], [5], [6]):
        stamps.put(torch.tensor(ids))
    stamps.end()
    timed = stamps.timed()
    assert timed.first_token == 0.5
    assert timed.token == pytest.approx(0.1)


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_generated_to_the_end_whatever_they_are(llama, monkeypatch, batch):
    """Also where the model's own file would stop: every token is its end."""
    monkeypatch.setattr(llama.generation_config, "eos_token_id", list(range(llama.config.vocab_size)))
    ticks = itertools.count()
    made = []
    monkeypatch.setattr(generation, "Stamps", lambda: made.append(Stamps(lambda: float(next(ticks)))) or made[-1])
    ids = torch.arange(4 * batch).view(batch, 4)
    assert time_generation(llama, ids, 5) == Timed(1.0, 1.0)
    assert made[0].times == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_beams_that_the_models_own_file_asks_for_are_not_timed(llama, monkeypatch):
    monkeypatch.setattr(llama.generation_config, "num_beams", 2)
    assert time_generation(llama, torch.arange(4)[None], 1).token > 0


ASKED = [
    {"num_beams": 10**6},
    {"num_return_sequences": 10**6},
    {"prompt_lookup_num_tokens": 5},
    {"prompt_lookup_num_tokens": -3},
    {"num_assistant_tokens": -1, "assistant_early_exit": 900},
    {"do_sample": True, "temperature": 100.0},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"min_new_tokens": 10**9},
    {"max_time": 1e-9},
    {"cache_implementation": "quantized"},
    {"stop_strings": ["a"]},
    {"guidance_scale": 3.0},
    {"use_cache": False},
    {"suppress_tokens": [10**9]},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_whatever_the_models_own_file_asks_for_plain_greedy_decoding_is_timed(monkeypatch, asked):
    model = build(tiny_configs()["llama"])
    ids = torch.arange(8).view(2, 4)
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: seen.append(tuple(k["input_ids"].shape)) or forward(*a, **k))
    for key, value in asked.items():
        setattr(model.generation_config, key, value)
    own = model.generation_config
    time_generation(model, ids, 2)
    assert seen == [(2, 4), (2, 1), (2, 1)]  # the prompt, then two tokens, each in one step from the cache
    assert model.generation_config is own
    assert all(getattr(own, key) == value for key, value in asked.items())


def test_prompts_are_windows_of_the_text_from_the_start_again_where_it_ends():
    assert prompts(torch.arange(5), 3, 3).tolist() == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert prompts(torch.arange(9), 1, 2).tolist() == [[0, 1]]


def test_a_context_that_is_too_short_is_refused(llama):
    context = llama.config.max_position_embeddings
    check_context("bench", llama.config, context - 3, 3)
    with pytest.raises(
        InvalidInput, match=f"^bench: a prompt of {context - 3} and 4 new tokens do not fit .* {context} "
    ):
        check_context("bench", llama.config, context - 3, 4)


def test_a_pace_counts_the_tokens_of_the_batch():
    found = pace([Timed(1.0, 0.5), Timed(3.0, 0.25), Timed(2.0, 1.0)], batch=4)
    assert found.first_token == Spread(2.0, 1.0, 3.0)
    assert found.decode == Spread(8.0, 4.0, 16.0)


def test_speed_ratios_are_above_one_where_sparse_is_faster(monkeypatch, llama):
    dense, sparse = build(tiny_configs()["llama"]), llama
    times = {id(dense): Timed(3.0, 0.4), id(sparse): Timed(2.0, 0.1)}
    seen = []

    def generate(model, ids, tokens):
        seen.append((tuple(ids.shape), tokens))
        return times[id(model)]

    monkeypatch.setattr("sparity.measure.timing.speed.time_generation", generate)
    speed = compare_speed(dense, sparse, torch.arange(40), prompt=8, tokens=4, rounds=2, batch=2)
    assert seen == [((2, 8), 4)] * 6
    assert speed.decode_ratio.median == pytest.approx(4)
    assert speed.first_token_ratio.median == 1.5
    assert (speed.batch, speed.dense.decode.median, speed.sparse.decode.median) == (2, 5.0, 20.0)
    assert speed.engine_dense is None  # the sparse model runs in transformers too


@NATIVE
def test_beside_a_model_on_the_engine_the_dense_one_is_timed_there_too_and_left_as_it_was(monkeypatch):
    dense = build(tiny_configs()["llama"]).to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    sparse = attach(build(tiny_configs()["llama"]).to(torch.bfloat16))
    seen = []

    def generate(model, ids, tokens):
        name = "sparse" if model is sparse else "engine" if has_fast_path(model) else "dense"
        seen.append(name)
        return {"sparse": Timed(2.0, 0.1), "engine": Timed(1.0, 0.15), "dense": Timed(3.0, 0.4)}[name]

    monkeypatch.setattr("sparity.measure.timing.speed.time_generation", generate)
    speed = compare_speed(dense, sparse, torch.arange(40), prompt=8, tokens=4, rounds=2)
    assert seen == ["engine", "sparse", "dense", "dense", "sparse", "engine", "engine", "sparse", "dense"]
    assert speed.decode_ratio.median == pytest.approx(4)
    assert speed.engine_dense.decode_ratio.median == pytest.approx(1.5)
    assert speed.engine_dense.first_token_ratio.median == 0.5
    assert speed.engine_dense.pace.first_token.median == 1.0
    assert {type(layer) for layer in dense.model.layers.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
    assert all(torch.equal(weight, before[name]) for name, weight in dense.state_dict().items())


def test_why_a_dense_model_is_not_timed_on_the_engine(monkeypatch, llama):
    monkeypatch.setattr(native, "unavailable", lambda: None)
    assert engine_declines(llama) == "the engine runs models in bfloat16 on the CPU, not float32 on cpu"
    half = build(tiny_configs()["llama"]).to(torch.bfloat16)
    assert engine_declines(half) is None
    with attached(half, form="dense"):
        assert engine_declines(half) == "it runs on the engine already"
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler")
    assert engine_declines(half) == "no compiled kernels: no compiler"
