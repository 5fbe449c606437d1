"""The fast path of decoding, given what it does not know: the model's own code must run and say what it says.

The library checks nothing, so whatever slipped through would read or write memory that is none of its.
"""

import copy

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

import sparity
from quick_models import cache_of
from sparity.engine.decoding.cache import GrowingLayer
from sparity.engine.decoding.model import not_fast
from sparity.engine.kernels import native
from sparity.errors import InvalidInput

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
PROMPT = torch.arange(10).reshape(2, 5)
ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, InvalidInput)
NEXT = torch.tensor([[7], [8]])


@pytest.fixture
def both(tiny):
    """One model on the engine, its layers dense, and the same in transformers alone."""
    model = tiny("llama")
    return sparity.attach(copy.deepcopy(model), form="dense"), model


def outcome(model, inputs):
    """What a call gives: hidden states, or the kind of error."""
    with torch.no_grad():
        try:
            found = model.model(**{"past_key_values": cache_of(model, PROMPT), "input_ids": NEXT, **inputs})
        except ERRORS as error:
            return type(error)
    return found[0] if isinstance(found, tuple) else found.last_hidden_state


def same(found, wanted):
    if isinstance(wanted, type):
        return found in (wanted, InvalidInput)
    return found.shape == wanted.shape and torch.allclose(found.float(), wanted.float(), rtol=0.05, atol=0.05)


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


LIES = {
    "more heads": {"num_attention_heads": 8},
    "heads that do not divide": {"num_attention_heads": 3},
    "more heads of keys": {"num_key_value_heads": 64},
    "no heads of keys": {"num_key_value_heads": 0},
    "wider heads": {"head_dim": 512},
    "no size of heads": {"head_dim": None},
    "a wide model": {"hidden_size": 1 << 30},
    "a wide MLP": {"intermediate_size": 1},
    "fewer layers": {"num_hidden_layers": 1},
    "more layers": {"num_hidden_layers": 99},
}


@pytest.mark.parametrize("name", LIES)
def test_a_configuration_that_lies(both, name):
    """What runs is what the modules are, as in transformers' own code."""
    for model in both:
        for key, value in LIES[name].items():
            setattr(model.config, key, value)
    cache = cache_of(both[1], PROMPT)
    found = [outcome(model, {"past_key_values": copy.deepcopy(cache)}) for model in both]
    assert same(*found)


def narrower(path, rows, columns):
    def change(model):
        layer = model.model.layers[1].get_submodule(path)
        layer.weight = nn.Parameter(layer.weight[:rows, :columns].detach().clone())

    return change


def attribute(path, value):
    owner, _, leaf = path.rpartition(".")
    return lambda model: setattr(model.model.layers[1].get_submodule(owner), leaf, value)


class Doubled(nn.Linear):
    """What an adapter does: a module of its own in the place of a layer."""

    def __init__(self, layer):
        super().__init__(1, 1)
        self.base_layer = layer

    def forward(self, x):
        return 2 * self.base_layer(x)


CHANGES = {
    "fewer queries": narrower("self_attn.q_proj", 16, 32),
    "fewer keys": narrower("self_attn.k_proj", 16, 32),
    "fewer values": narrower("self_attn.v_proj", 16, 32),
    "a narrow output": narrower("self_attn.o_proj", 32, 16),
    "fewer gates": narrower("mlp.gate_proj", 8, 32),
    "fewer ups": narrower("mlp.up_proj", 8, 32),
    "a narrow down": narrower("mlp.down_proj", 32, 8),
    "a short output": narrower("self_attn.o_proj", 16, 64),
    "another input": narrower("mlp.up_proj", 64, 16),
    "a short bias": attribute("mlp.up_proj.bias", nn.Parameter(torch.ones(3).bfloat16())),
    "a float32 bias": attribute("mlp.up_proj.bias", nn.Parameter(torch.ones(64))),
    "a short norm": attribute("input_layernorm.weight", nn.Parameter(torch.ones(5).bfloat16())),
    "a float32 norm": attribute("input_layernorm.weight", nn.Parameter(torch.ones(32))),
    "another norm": attribute("input_layernorm", nn.LayerNorm(32).bfloat16()),
    "another activation": attribute("mlp.act_fn", nn.ReLU()),
    "a norm of queries": attribute("self_attn.q_norm", nn.LayerNorm(16).bfloat16()),
    "a norm of keys": attribute("self_attn.k_norm", nn.LayerNorm(16).bfloat16()),
    "a layer that is gone": lambda model: model.model.layers.pop(1),
    "a layer of another kind": attribute("mlp", nn.Identity()),
}


@pytest.mark.parametrize("when", ["before", "after", "after a step"])
@pytest.mark.parametrize("name", CHANGES)
def test_modules_that_contradict_each_other(tiny, steps, name, when):
    ours, plain = tiny("llama"), tiny("llama")
    CHANGES[name](plain)
    if when == "before":
        CHANGES[name](ours)
    if {parameter.dtype for parameter in ours.parameters()} != {torch.bfloat16}:
        return
    sparity.attach(ours, form="dense")
    cache = cache_of(tiny("llama"), PROMPT)
    if when == "after a step":
        outcome(ours, {"past_key_values": copy.deepcopy(cache)})
        assert steps == [2]
        steps.clear()
    if when != "before":
        CHANGES[name](ours)
    found = [outcome(model, {"past_key_values": copy.deepcopy(cache)}) for model in (ours, plain)]
    assert same(*found)
    assert steps == []
    assert name == "a layer that is gone" or not_fast(ours) is not None


@pytest.mark.parametrize(
    ("name", "value"), [("head_dim", 32), ("head_dim", 16.5), ("head_dim", 0), ("num_key_value_groups", 1)]
)
def test_attention_that_contradicts_its_layers(tiny, steps, name, value):
    ours, plain = tiny("llama"), tiny("llama")
    for model in (ours, plain):
        attribute(f"self_attn.{name}", value)(model)
    sparity.attach(ours, form="dense")
    cache = cache_of(tiny("llama"), PROMPT)
    assert same(*(outcome(model, {"past_key_values": copy.deepcopy(cache)}) for model in (ours, plain)))
    assert steps == []


def test_an_adapter_put_on_later_is_not_passed_over(both, steps):
    expected = outcome(both[0], {})
    for model in both:
        model.model.layers[1].mlp.up_proj = Doubled(model.model.layers[1].mlp.up_proj)
    found = [outcome(model, {}) for model in both]
    assert same(*found)
    assert not same(found[0], expected)
    assert steps == [2]
    assert "layers.1.mlp.up_proj is a Doubled, which is not the model's own" in not_fast(both[0])
    both[0].model.layers[1].mlp.up_proj = both[0].model.layers[1].mlp.up_proj.base_layer
    assert same(outcome(both[0], {}), expected)
    assert steps == [2, 2]


def test_a_parameter_put_in_later_is_read(both):
    for model in both:
        outcome(model, {})
        model.model.layers[0].input_layernorm.weight = nn.Parameter(torch.full((32,), 3.0).bfloat16())
    assert same(*(outcome(model, {}) for model in both))


def test_another_packed_weight_is_read_and_the_old_one_is_let_go(tiny, steps):
    model = sparity.attach(tiny("llama"), form="bitmask")
    layer = model.model.layers[0].mlp.up_proj
    outcome(model, {})
    packed = layer.packed
    layer.give(sparity.engine.formats.build_format("bitmask").pack(torch.zeros(64, 32).bfloat16()))
    changed = outcome(model, {})
    layer.give(packed)
    assert not torch.equal(outcome(model, {}), changed)
    assert steps == [2, 2, 2]


def test_a_forward_put_on_a_module_is_called(both, steps):
    for model in both:
        layer = model.model.layers[0].mlp
        layer.forward = torch.zeros_like
    assert same(*(outcome(model, {}) for model in both))
    assert steps == []


def test_hooks_of_all_modules_are_called(both, steps):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        outcome(both[0], {"past_key_values": DynamicCache(config=both[0].config), "input_ids": NEXT})
    finally:
        handle.remove()
    assert len(seen) > 20
    assert steps == []


def test_hidden_states_once_asked_for_do_not_slow_down_what_follows(both, steps):
    outcome(both[0], {"output_hidden_states": True})
    assert steps == []
    outcome(both[0], {})
    assert steps == [2]


def test_a_cache_made_in_inference_mode_is_continued_outside(both, steps):
    found = []
    for model in both:
        with torch.inference_mode():
            cache = cache_of(model, PROMPT)
        first = outcome(model, {"past_key_values": cache})
        with torch.no_grad():
            prompt = model.model(input_ids=PROMPT, past_key_values=cache).last_hidden_state
        found.append(torch.cat((first, prompt), 1))
    assert same(*found)
    assert steps == [2]


def test_copies_of_a_layer_grow_apart():
    layer = GrowingLayer()
    layer.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
    copied = copy.copy(layer)
    layer.update(torch.full((1, 1, 1, 4), 2.0), torch.ones(1, 1, 1, 4))
    copied.update(torch.full((1, 1, 1, 4), 3.0), torch.ones(1, 1, 1, 4))
    layer.crop(-3)
    layer.update(torch.full((1, 1, 1, 4), 4.0), torch.ones(1, 1, 1, 4))
    assert layer.keys[0, 0, :, 0].tolist() == [1, 4]
    assert copied.keys[0, 0, :, 0].tolist() == [1, 1, 1, 3]
