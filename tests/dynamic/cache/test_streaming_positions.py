"""StreamingLLM with positions in the cache: what the authors' code computes, which turns every key to its slot."""

import math

import pytest
import torch
from transformers import DynamicCache

import sparity
from sparity.dynamic.cache.attention import attend
from sparity.dynamic.cache.rotary import Rotary
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.store import Store
from sparity.errors import UnsupportedModel

IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(3))


def test_keys_turned_forward_are_keys_and_query_turned_to_their_slots():
    generator = torch.Generator().manual_seed(0)
    rotary, length = Rotary.of_base(10000.0, 8), 30
    raw_keys, values = torch.randn(2, length, 8, generator=generator), torch.randn(2, length, 8, generator=generator)
    raw_query = torch.randn(4, 8, generator=generator)
    store = Store(rotary.turn(raw_keys, torch.arange(length))[None], values[None])
    kept = torch.tensor([place < 3 or place >= 20 for place in range(length)])
    store.keep([kept, kept])
    query = rotary.turn(raw_query, torch.full((4,), length - 1))[None, :, None]
    found = attend(query, store, Sight(None, 1, 1, length), 8**-0.5, None, rotary)[0, 0]
    slots = torch.arange(int(kept.sum()))
    for head in range(4):
        keys = rotary.turn(raw_keys[head // 2, kept], slots)
        logits = keys @ rotary.turn(raw_query[head], slots[-1]) / math.sqrt(8)
        assert torch.allclose(found[head], logits.softmax(0) @ values[head // 2, kept], atol=1e-5)


@torch.no_grad()
def test_a_model_sees_the_first_tokens_close_by(family_models):
    model = family_models["llama"]
    options = {"sinks": 2, "recent": 4}
    logits = {}
    for turn in (False, True):
        with sparity.cache(model, {"streaming_llm": {"sinks": 2, "turn": turn}}, 12, **options):
            past = model(IDS).past_key_values
            logits[turn] = model(IDS[:, :1], past_key_values=past).logits
    assert not torch.allclose(logits[True], logits[False], atol=1e-3)
    # in the first block keys depend on tokens alone: with one block the model is that of the twelve tokens themselves
    blocks = model.model.layers
    try:
        model.model.layers = blocks[:1]
        model.config.num_hidden_layers = 1
        with sparity.cache(model, {"streaming_llm": {"sinks": 2, "turn": True}}, 12, **options):
            past = model(IDS).past_key_values
            found = model(IDS[:, :1], past_key_values=past).logits
        short = torch.cat([IDS[:, :2], IDS[:, 30:], IDS[:, :1]], 1)
        expected = model(short, past_key_values=DynamicCache(config=model.config)).logits[:, -1:]
    finally:
        model.model.layers = blocks
        model.config.num_hidden_layers = len(blocks)
    assert torch.allclose(found, expected, atol=1e-4)


def test_positions_that_depend_on_the_length_are_refused(family_models):
    for family, words in (("gemma3_text", "depend on the layer or on the length"), ("opt", "has no rotary positions")):
        refused = sparity.cache(family_models[family], {"streaming_llm": {"turn": True}}, 40)
        with pytest.raises(UnsupportedModel, match=words), refused:
            pass
