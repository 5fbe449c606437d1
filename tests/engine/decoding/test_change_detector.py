"""What is changed in a model after it was attached counts at the next token."""

import copy
import weakref

import pytest
import torch

import sparity
from quick_models import NEXT, PROMPT, cache_of, decoded, same
from sparity.engine.decoding.model import declines
from sparity.engine.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")


def test_parameters_may_change_their_memory_and_type(tiny, steps):
    model, tokens = sparity.attach(tiny("llama")), torch.arange(24).reshape(2, 12)
    expected = decoded(model, tokens)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()
    assert torch.equal(decoded(model, tokens), expected)
    taken = len(steps)
    model.model.norm.float()
    with torch.no_grad(), pytest.raises(RuntimeError):  # what transformers' own code says of mixed types
        model(tokens, use_cache=True)
    assert len(steps) == taken


def of_every(path, value):
    """A change of an attribute of every layer."""

    def change(model):
        owner, _, name = path.rpartition(".")
        for layer in model.model.layers:
            setattr(layer.get_submodule(owner), name, value)

    return change


def exchange_layers(model):
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in (1, 0, 2))


def drop_attention(model):
    model.train()
    of_every("self_attn.attention_dropout", 0.9)(model)


def see_windows(model):
    model.config.sliding_window, model.config.layer_types = 2, ["sliding_attention"] * 3
    model.model.has_sliding_layers = True


def add_bias(model):
    for layer in model.model.layers:
        layer.mlp.up_proj.bias = torch.nn.Parameter(torch.full((layer.mlp.up_proj.out_features,), 3.0).bfloat16())


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llama", of_every("self_attn.scaling", 2.0), None),
        ("llama", of_every("post_attention_layernorm.variance_epsilon", 5.0), None),
        ("qwen3", of_every("self_attn.k_norm.variance_epsilon", 5.0), "queries and keys are not normed alike"),
        ("llama", add_bias, None),
        ("llama", exchange_layers, "layers.0 keeps its keys and values as layer 1"),
        ("llama", drop_attention, None),
        ("qwen3", see_windows, "a window of the text only"),
    ],
)
def test_a_change_after_attaching_counts(tiny, family, change, reason):
    plain = tiny(family)
    model = sparity.attach(copy.deepcopy(plain))
    caches = {id(made): (cache_of(made, PROMPT), cache_of(made, PROMPT)) for made in (plain, model)}

    def step(made, which):
        torch.manual_seed(0)
        with torch.no_grad():
            return made.model(input_ids=NEXT, past_key_values=caches[id(made)][which]).last_hidden_state

    before = step(model, 0)
    change(plain)
    change(model)
    found = step(model, 1)
    assert same(found, step(plain, 1))
    assert (declines(model) is None) if reason is None else reason in declines(model)
    assert reason or not same(found, before)


def test_code_that_was_replaced_is_run(tiny, steps, monkeypatch):
    model = sparity.attach(tiny("llama"))
    cache, kind = cache_of(model, PROMPT), type(model.model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: x.fill_(float("nan")))
    with torch.no_grad():
        assert model(NEXT, past_key_values=cache).logits.isnan().all()
    assert steps == []
    assert "LlamaMLP.forward was replaced by one of" in declines(model)


def test_a_weight_is_kept_while_the_fast_path_has_its_address(tiny):
    model, tokens = sparity.attach(tiny("llama"), form="dense"), torch.arange(24).reshape(2, 12)
    decoded(model, tokens)
    layer = model.model.layers[0].self_attn.q_proj
    read = weakref.ref(layer.prepared)
    layer.weight.data = layer.weight.data.clone()
    with torch.no_grad():
        model(tokens, use_cache=False)  # prepares the weight anew, beside the fast path
    assert read() is not None  # else another weight could come to lie there, and pass for it
    decoded(model, tokens)
    assert read() is None
