"""The cache that grows in place against the one of transformers, through everything that generation does to it."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from transformers.cache_utils import DynamicCache, DynamicLayer, QuantizedCache, StaticCache

from sparity.engine.decoding.cache import STEP, GrowingLayer, use_growing_layers

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 70)),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.just("reorder_cache"), st.permutations([0, 1])),
        st.tuples(st.just("batch_repeat_interleave"), st.just(2)),
        st.tuples(st.just("batch_select_indices"), st.just([1, 0])),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=1,
    max_size=8,
)


@given(OPERATIONS, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_it_holds_what_the_ordinary_one_holds(operations, seed):
    generator = torch.Generator().manual_seed(seed)
    ordinary, growing = DynamicLayer(), GrowingLayer()
    batch = 2
    for name, argument in [("update", 5), *operations, ("update", 1)]:
        if name == "update":
            states = [torch.randn(batch, 3, argument, width, generator=generator) for width in (4, 6)]
            for found, wanted in zip(growing.update(*states), ordinary.update(*states), strict=True):
                assert torch.equal(found, wanted)
            continue
        if name == "crop":
            if ordinary.get_seq_length() <= argument:
                continue
            argument = -argument
        if name == "reset":
            growing.reset(), ordinary.reset()
            batch = batch if ordinary.get_seq_length() else 2  # releases before 5.20 keep the length, and zeros
            continue
        if ordinary.get_seq_length() and name.startswith("batch_repeat"):
            batch *= argument
        if ordinary.get_seq_length() and name.startswith(("batch_select", "reorder")):
            argument, batch = torch.tensor(argument), 2
        elif name.startswith(("batch_select", "reorder")):
            argument = torch.tensor(argument)
        getattr(growing, name)(argument), getattr(ordinary, name)(argument)
    assert growing.get_seq_length() == ordinary.get_seq_length()
    assert torch.equal(growing.keys, ordinary.keys)
    assert torch.equal(growing.values, ordinary.values)


@torch.no_grad()
def test_tokens_are_written_behind_the_others():
    layer = GrowingLayer()
    layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
    begin = layer.keys.data_ptr()
    for _ in range(STEP):
        layer.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    assert layer.keys.data_ptr() == begin
    assert layer.keys[0, 0, :, 0].tolist() == [1.0] * 5 + [0.0] * STEP


def test_gradients_pass_through_what_was_cached():
    layer, states = GrowingLayer(), torch.ones(1, 1, 2, 4, requires_grad=True)
    layer.update(states, states)
    keys, _ = layer.update(2 * states, states)
    keys.sum().backward()
    assert states.grad.eq(3).all()


def test_gradients_of_queries_alone_find_the_keys_that_they_met():
    layer, query = GrowingLayer(), torch.ones(4, requires_grad=True)
    with torch.no_grad():
        layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    scores = [(layer.update(*torch.ones(2, 1, 1, 1, 4))[0] @ query).sum() for _ in range(2)]
    sum(scores).backward()
    assert query.grad.tolist() == [7.0] * 4  # 3 keys, then 4


def test_only_ordinary_caches_are_changed():
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    (layer,) = use_growing_layers(cache)
    assert cache.layers == [layer]
    assert layer.get_seq_length() == 2
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 1)
    assert type(cache.layers[1]) is GrowingLayer
    from transformers import LlamaConfig, MistralConfig

    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    for other in (
        None,
        DynamicCache(config=MistralConfig(**small, sliding_window=4)),
        StaticCache(config=LlamaConfig(**small), max_cache_len=8),
    ):
        kinds = [type(layer) for layer in other.layers] if other else None
        assert use_growing_layers(other) is None
        assert not other or [type(layer) for layer in other.layers] == kinds
    assert issubclass(QuantizedCache, DynamicCache) is False
