"""Models on the engine, given what PyTorch and transformers let one do to a model: done right, or refused in words."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import sparity
from sparity.engine import attach as attaching
from sparity.engine.decoding.model import declines, has_fast_path
from sparity.engine.kernels import native
from sparity.engine.modules.linear import DenseLinear
from sparity.errors import InvalidInput

TOKENS = torch.arange(24).reshape(2, 12) % 97
NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.float()


def near(found, wanted, share=0.03):
    return float((found - wanted).abs().max()) <= share * float(wanted.abs().max())


def parameters(model):
    return {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}


def is_what_it_was(model, before):
    after = dict(model.named_parameters())
    return after.keys() == before.keys() and all(
        after[name] is parameter and torch.equal(parameter, value) for name, (parameter, value) in before.items()
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, InvalidInput])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("how", [sparity.attach, lambda model: sparity.attached(model).__enter__()])
def test_a_failure_half_way_leaves_the_model_as_it_was(tiny, monkeypatch, how, family, error):
    model = tiny(family)
    before, plain = parameters(model), logits(model)
    left, original = [7], attaching._packed

    def failing(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise error("half way")
        return original(*arguments)

    monkeypatch.setattr(attaching, "_packed", failing)
    with pytest.raises((error, InvalidInput)):  # memory that is short is the user's to change
        how(model)
    assert is_what_it_was(model, before)
    assert not has_fast_path(model)
    assert "save_pretrained" not in vars(model)
    assert torch.equal(logits(model), plain)


def test_int8_that_fails_half_way_goes_on_where_it_stopped(tiny, tmp_path):
    model = tiny("llama")
    bad = model.model.layers[2].mlp.up_proj.weight
    good = bad.detach().clone()
    with torch.no_grad():
        bad[0, 0] = float("nan")
    with pytest.raises(InvalidInput, match=r"layers\.2\.mlp\.up_proj"):
        sparity.attach(model, values="int8")
    model.save_pretrained(tmp_path / "half")  # nothing is lost in between
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").model.layers[0].mlp.up_proj.packed.quantized
    with torch.no_grad():
        bad.copy_(good)
    whole = sparity.attach(tiny("llama"), values="int8")
    assert torch.equal(logits(sparity.attach(model, values="int8")), logits(whole))


def test_dense_weights_are_let_go_one_by_one(tiny, monkeypatch):
    model = tiny("llama")
    weights = [layer.weight for name, layer in model.named_modules() if name.endswith("_proj")]
    held, original = [], attaching._packed

    def counting(*arguments):
        held.append(sum(weight.numel() > 0 for weight in weights))
        return original(*arguments)

    monkeypatch.setattr(attaching, "_packed", counting)
    sparity.attach(model)
    assert held == list(range(len(weights), 0, -1))


def test_contexts_within_each_other(tiny, tmp_path):
    model = tiny("llama")
    before = parameters(model)
    with sparity.attached(model, form="bitmask"):
        expected = logits(model)
        with sparity.attached(model) as inner:
            assert inner is model
        assert has_fast_path(model)
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)
    assert is_what_it_was(model, before)
    assert not has_fast_path(model)


def test_a_packed_model_stays_on_the_engine_after_a_context(tiny, tmp_path):
    sparity.attach(tiny("llama")).save_pretrained(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected, reason = logits(model), declines(model)
    with sparity.attached(model):
        pass
    assert declines(model) == reason
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


def shared_layer(model):
    """One layer in two places."""
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj


def tied_weights(model):
    """Two layers with one weight."""
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize("share", [shared_layer, tied_weights])
@pytest.mark.parametrize("values", ["same", "int8"])
def test_what_layers_share(tiny, tmp_path, share, values):
    model = tiny("llama")
    share(model)
    before, plain, share = parameters(model), logits(model), 0.2 if values == "int8" else 0.03
    with sparity.attached(model, form="bitmask", values=values):
        assert near(logits(model), plain, share)
    assert is_what_it_was(model, before)
    assert torch.equal(logits(model), plain)
    sparity.attach(model, form="bitmask", values=values)
    expected = logits(model)
    assert near(expected, plain, share)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)


def test_what_is_changed_within_the_context_is_undone_with_it(tiny):
    model = tiny("llama")
    layers = list(model.model.layers)
    with sparity.attached(model):
        model.model.layers[0].mlp.up_proj = nn.Identity()
        del model.model.layers[1]
    assert type(layers[0].mlp.up_proj) is nn.Linear
    assert all(type(layer.mlp.down_proj) is nn.Linear and layer.mlp.down_proj.weight.numel() for layer in layers)
    model.model.layers.insert(1, layers[1])
    assert torch.equal(logits(model), logits(tiny("llama")))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_state_dict_has_every_weight(tiny, family):
    model = tiny(family)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    sparity.attach(model)
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    wrapped = nn.ModuleDict({"inside": model}).state_dict()
    assert {f"inside.{name}" for name in wanted} == wrapped.keys()
    other = tiny(family)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(found)
    assert torch.equal(logits(other), logits(tiny(family)))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_is_not_loaded_over_packed_weights(tiny, strict):
    model, plain = sparity.attach(tiny("llama")), tiny("llama")
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.q_proj\.weight is packed and cannot be overwritten"):
        model.load_state_dict(plain.state_dict(), strict=strict)


def test_saving_a_given_state_dict_is_refused(tiny, tmp_path):
    model = sparity.attach(tiny("llama"))
    with pytest.raises(InvalidInput, match="leave state_dict out"):
        model.save_pretrained(tmp_path / "saved", state_dict=tiny("llama").state_dict())
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("form", ["bitmask", "dense"])
@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_pickling_is_refused(tiny, form, write):
    with pytest.raises(InvalidInput, match="cannot be pickled: save_pretrained writes it"):
        write(sparity.attach(tiny("llama"), form=form))


@pytest.mark.parametrize("move", [lambda model: model.to("meta"), lambda model: model.to_empty(device="meta")])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_another_device_is_refused_before_anything_is_moved(tiny, family, move):
    model = sparity.attach(tiny(family))
    expected = logits(model)
    with pytest.raises(InvalidInput, match="cannot be moved to meta"):
        move(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_cast_changes_all_but_the_packed_weights(tiny, steps, dtype):
    model = sparity.attach(tiny("llama"), form="bitmask")
    expected, there = logits(model), copy.deepcopy(model).to(dtype)
    assert there.lm_head.weight.dtype == dtype
    assert near(logits(there), expected)
    assert there.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 15)
    assert steps == []
    again = there.to(torch.bfloat16)
    assert near(logits(again), expected)
    again.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert native.unavailable() or steps == [2, 2]


def test_a_model_in_a_wrapper_is_refused_and_works_once_attached(tiny):
    model = tiny("llama")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(InvalidInput, match="not OptimizedModule: where one is wrapped, attach the model inside"):
        sparity.attach(compiled)
    expected = logits(sparity.attach(model))

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *arguments, **named):
            return self.inner(*arguments, **named)

    assert torch.equal(logits(Wrapper(model)), expected)


def test_a_compiled_model_gives_the_same(tiny):
    model = sparity.attach(tiny("llama"))
    expected = logits(model)
    torch._dynamo.reset()
    assert near(logits(torch.compile(model, backend="eager")), expected)
    with torch.no_grad():
        cached = torch.compile(model, backend="eager")(TOKENS[:, :5], use_cache=True)
        step = torch.compile(model, backend="eager")(TOKENS[:, 5:6], past_key_values=cached.past_key_values)
        wanted = model(TOKENS[:, :6]).logits[:, -1:]
    assert near(step.logits.float(), wanted.float())
    torch._dynamo.reset()


def test_training_mode_and_inference_mode(tiny):
    model = sparity.attach(tiny("llama"))
    expected = logits(model)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS, use_cache=False).logits.float(), expected)
    model.train()
    assert all(layer.training for layer in model.modules())
    assert torch.equal(logits(model), expected)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_a_cache_from_before_is_continued_on_the_engine(tiny, steps):
    model = tiny("llama")
    options = {"do_sample": False, "pad_token_id": 0}
    whole = model.generate(TOKENS[:1, :4], max_new_tokens=8, **options)
    first = model.generate(TOKENS[:1, :4], max_new_tokens=4, return_dict_in_generate=True, **options)
    sparity.attach(model, form="dense")
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, **options)
    assert near(logits(model), logits(tiny("llama")))
    assert second.shape == whole.shape
    assert native.unavailable() or len(steps) == 4


def test_dense_layers_of_an_attached_model_can_still_be_packed(tiny):
    model = sparity.attach(tiny("llama"), form="dense")
    expected = logits(model)
    layer = model.model.layers[0].mlp.up_proj
    with sparity.attached(model, form="bitmask"):
        assert model.model.layers[0].mlp.up_proj.packed.format == "bitmask"
        assert near(logits(model), expected)
    assert model.model.layers[0].mlp.up_proj is layer
    assert type(layer) is DenseLinear
    assert torch.equal(logits(model), expected)
