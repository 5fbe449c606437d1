"""Models on the fast path whose configuration lies or whose modules change: what they say themselves holds."""

import copy

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

import sparity
from quick_models import NEXT, PROMPT, cache_of, outcome, same
from sparity.engine.decoding.cache import GrowingLayer
from sparity.engine.decoding.model import declines
from sparity.engine.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")


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
    assert name == "a layer that is gone" or declines(ours) is not None


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
    assert "layers.1.mlp.up_proj is a Doubled, which is not the model's own" in declines(both[0])
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
    layer.give(sparity.formats.build_format("bitmask").pack(torch.zeros(64, 32).bfloat16()))
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
