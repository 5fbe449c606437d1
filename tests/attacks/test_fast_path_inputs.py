"""The fast path of decoding, given what it does not know: the model's own code must run and say what it says.

The library checks nothing, so whatever slipped through would read or write memory that is none of its.
"""

import pytest
import torch

from quick_models import NEXT, PROMPT, cache_of, outcome, same
from sparity.engine.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
SEEN = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
FAST = {
    "nothing": {},
    "a float mask": {"attention_mask": SEEN.float()},
    "a bool mask": {"attention_mask": SEEN.bool()},
    "a uint8 mask": {"attention_mask": SEEN.byte()},
    "no row of a mask": {"attention_mask": SEEN[:, :1].expand(2, 6)},
    "int32 positions": {"position_ids": torch.tensor([[5], [3]], dtype=torch.int32)},
    "one position for all": {"position_ids": torch.tensor([[5]])},
    "int32 ids": {"input_ids": NEXT.int()},
    "a position beyond the context": {"position_ids": torch.tensor([[10**6]])},
}
SLOW = {
    "a mask of all layers": {"attention_mask": torch.zeros(2, 1, 1, 6)},
    "a bool mask of all layers": {"attention_mask": SEEN.bool()[:, None, None]},
    "a mask with three axes": {"attention_mask": SEEN[:, None]},
    "a short mask": {"attention_mask": SEEN[:, 1:]},
    "a long mask": {"attention_mask": torch.ones(2, 9, dtype=torch.long)},
    "a mask of one row": {"attention_mask": SEEN[:1]},
    "a mask with one axis": {"attention_mask": SEEN[0]},
    "masks by kind of layer": {"attention_mask": {"full_attention": None}},
    "a list as a mask": {"attention_mask": SEEN.tolist()},
    "positions with one axis": {"position_ids": torch.tensor([5])},
    "positions with three axes": {"position_ids": torch.full((1, 2, 1), 5)},
    "positions of two tokens": {"position_ids": torch.tensor([[5, 6]])},
    "positions of other rows": {"position_ids": torch.tensor([[5], [5], [5]])},
    "floating positions": {"position_ids": torch.tensor([[5.5], [5.5]])},
    "a number as a position": {"position_ids": 5},
    "no ids": {"input_ids": torch.empty(2, 0, dtype=torch.long)},
    "no rows": {"input_ids": torch.empty(0, 1, dtype=torch.long)},
    "ids with one axis": {"input_ids": torch.tensor([7])},
    "ids with three axes": {"input_ids": NEXT[None]},
    "a list of ids": {"input_ids": [[7], [8]]},
    "floating ids": {"input_ids": NEXT.float()},
    "ids beyond the vocabulary": {"input_ids": torch.tensor([[97], [-1]])},
    "neither ids nor embeddings": {"input_ids": None},
    "ids and embeddings": {"inputs_embeds": torch.zeros(2, 1, 32).bfloat16()},
    "float32 embeddings": {"input_ids": None, "inputs_embeds": torch.zeros(2, 1, 32)},
    "narrow embeddings": {"input_ids": None, "inputs_embeds": torch.zeros(2, 1, 16).bfloat16()},
    "embeddings without memory": {
        "input_ids": None,
        "inputs_embeds": torch.zeros(2, 1, 32, device="meta", dtype=torch.bfloat16),
    },
    "embeddings with two axes": {"input_ids": None, "inputs_embeds": torch.zeros(2, 32).bfloat16()},
    "a tuple as the result": {"return_dict": False},
    "other rows than the cache has": {"input_ids": torch.tensor([[1], [2], [3]])},
    "fewer rows than the cache has": {"input_ids": torch.tensor([[1]])},
}


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_odd_inputs_give_what_the_model_gives(both, steps, name):
    ours, plain = both
    inputs = {**FAST, **SLOW}[name]
    assert same(outcome(ours, inputs), outcome(plain, inputs))
    assert len(steps) == (name in FAST)


def other_length(cache):
    cache.layers[1].crop(-2)


def longer(cache):
    extra = torch.ones(2, 2, 1, 16).bfloat16()
    cache.layers[2].update(extra, extra)


def replaced(change):
    def edit(cache):
        for layer in cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    return edit


CACHES = {
    "layers of unlike lengths, the second shorter": other_length,
    "layers of unlike lengths, the last longer": longer,
    "one row for two": replaced(lambda held: held[:1]),
    "four rows for two": replaced(lambda held: held.repeat(2, 1, 1, 1)),
    "one head for two": replaced(lambda held: held[:, :1]),
    "heads of another size": replaced(lambda held: held[..., :8]),
    "another type": replaced(lambda held: held.float()),
    "no memory": replaced(lambda held: held.to("meta")),
    "three axes": replaced(lambda held: held[0]),
    "fewer layers": lambda cache: cache.layers.pop(),
    "no layers": lambda cache: cache.layers.clear(),
}


@pytest.mark.parametrize("name", CACHES)
def test_an_odd_cache_gives_what_the_model_gives(both, steps, name):
    found = []
    for model in both:
        cache = cache_of(model, PROMPT)
        CACHES[name](cache)
        found.append(outcome(model, {"past_key_values": cache}))
    assert same(*found)
    assert steps == []


def test_values_of_another_length_than_keys_are_refused(both, steps):
    cache = cache_of(both[0], PROMPT)
    cache.layers[0].values = cache.layers[0].values[:, :, 1:]
    assert outcome(both[0], {"past_key_values": cache}) is RuntimeError
    assert steps == []


def test_a_cache_is_read_as_it_is_and_not_as_its_buffers_are(both, steps):
    found = []
    for model in both:
        cache = cache_of(model, PROMPT)
        outcome(model, {"past_key_values": cache})
        replaced(lambda held: held.flip(0))(cache)
        found.append(outcome(model, {"past_key_values": cache}))
    assert same(*found)
    assert steps == [2, 2]


def test_a_prompt_of_one_token(both, steps):
    with torch.no_grad():
        found = [model.generate(PROMPT[:, :1], max_new_tokens=4, do_sample=False, pad_token_id=0) for model in both]
    assert torch.equal(*found)
    assert len(steps) == 4
