"""Models on the engine: the same outputs up to rounding, everything undone, and what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparity
from families import tiny_configs
from sparity.checkpoints.source import CheckpointSource
from sparity.engine.decoding.model import declines
from sparity.engine.kernels import native
from sparity.engine.modules.experts import PackedExperts
from sparity.engine.modules.linear import DenseLinear, PackedLinear
from sparity.errors import InvalidInput
from sparity.formats import build_format

NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
TOKENS = torch.arange(24).reshape(2, 12) % 97


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits.float()


def error(found, wanted):
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("family", sorted(tiny_configs()))
def test_outputs_are_the_models_and_everything_is_undone(tiny, family):
    model = tiny(family)
    exact = logits(copy.deepcopy(model).float())
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    plain = logits(model)
    with sparity.attached(model) as attached:
        assert attached is model
        assert any(isinstance(module, PackedLinear) for module in model.modules())
        assert error(logits(model), exact) <= 2 * error(plain, exact) + 1e-3
        generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert generated.shape == (2, 16)
    assert [type(module) for module in model.modules()] == classes
    after = dict(model.named_parameters())
    assert all(
        after[name] is parameter and torch.equal(parameter, value) for name, (parameter, value) in before.items()
    )
    assert "save_pretrained" not in vars(model)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("form", ["dense", "columns", "bitmask", "csr"])
def test_every_layer_can_be_held_in_one_format(tiny, form):
    model = tiny("llama")
    exact, plain = logits(copy.deepcopy(model).float()), logits(model)
    sparity.attach(model, form=form)
    projections = [module for name, module in model.named_modules() if name.endswith("_proj")]
    if form == "dense":
        assert {type(module) for module in projections} == {DenseLinear}
    else:
        assert {module.packed.format for module in projections} == {form}
    assert error(logits(model), exact) <= 2 * error(plain, exact) + 1e-3


@pytest.mark.parametrize("values", ["same", "int8"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_packed_and_come_back(tiny, family, values):
    model = tiny(family)
    fused = {name: parameter for name, parameter in model.named_parameters() if ".experts." in name}
    before = {name: parameter.clone() for name, parameter in fused.items()}
    with sparity.attached(model, values=values):
        experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
        assert len(experts) == len(fused) // 2
        assert {matrix.quantized for module in experts for _, matrix in module.matrices()} == {values == "int8"}
        if values == "same":
            assert all(parameter.numel() == 0 for parameter in fused.values())
            assert sum(module.nbytes for module in experts) < sum(kept.nbytes for kept in before.values())
        assert float((logits(model)).abs().max()) > 0
    for name, parameter in fused.items():
        assert model.get_parameter(name) is parameter
        assert torch.equal(parameter, before[name])


def test_experts_are_saved_packed_under_their_stored_names(tiny, tmp_path):
    model = sparity.attach(tiny("mixtral"))
    model.save_pretrained(tmp_path / "saved")
    stored = CheckpointSource(tmp_path / "saved").matrices
    assert {f"model.layers.2.block_sparse_moe.experts.3.{role}.weight" for role in ("w1", "w2", "w3")} <= stored.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))


def test_dense_experts_stay_as_they_are(tiny):
    model = tiny("mixtral")
    experts = model.model.layers[0].mlp.experts
    sparity.attach(model, form="dense")
    assert model.model.layers[0].mlp.experts is experts
    with torch.no_grad():
        experts.gate_up_proj.fill_(1.0)
        experts.down_proj.fill_(1.0)
    assert sparity.attach(model).model.layers[0].mlp.experts is experts
    assert isinstance(model.model.layers[1].mlp.experts, PackedExperts)


def test_an_expert_that_a_format_cannot_hold_is_named_and_undone(tiny):
    model = tiny("mixtral")
    experts, kept = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.experts.down_proj.clone()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.zero_()
    words = r"layers\.0\.block_sparse_moe\.experts\.0\.w1: two_of_four"
    with pytest.raises(InvalidInput, match=words), sparity.attached(model, form="two_of_four"):
        pass
    assert model.model.layers[0].mlp.experts is experts
    assert torch.equal(experts.down_proj, kept)


def test_the_fastest_format_of_each_layer(tiny, monkeypatch):
    chosen = iter(["bitmask", "dense"] * 100)
    monkeypatch.setattr(
        "sparity.engine.attach.fastest_format", lambda *_: SimpleNamespace(format=build_format(next(chosen)))
    )
    model = sparity.attach(tiny("llama"), form="fastest")
    kinds = [type(module) for name, module in model.named_modules() if name.endswith("_proj")]
    assert kinds == [PackedLinear, DenseLinear] * 10 + [PackedLinear]


def test_int8_changes_outputs_a_little_and_comes_back(tiny):
    model = tiny("llama")
    plain = logits(model)
    with sparity.attached(model, values="int8"):
        assert model.model.layers[0].mlp.up_proj.packed.quantized
        changed = logits(model)
    assert 0 < error(changed, plain) < 0.2 * float(plain.abs().max())
    assert torch.equal(logits(model), plain)


def test_a_failure_half_way_is_undone(tiny):
    model = tiny("llama")
    plain = logits(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:] = 0  # 2:4 holds this one, and not the next
    words = r"layers\.0\.self_attn\.k_proj: two_of_four"
    with pytest.raises(InvalidInput, match=words), sparity.attached(model, form="two_of_four"):
        pass
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (64, 32)
    assert not torch.equal(logits(model), plain)


def test_what_cannot_be_attached(tiny):
    model = tiny("llama")
    with pytest.raises(InvalidInput, match="bfloat16 on the CPU, not float32 on cpu"):
        sparity.attach(copy.deepcopy(model).float())
    with pytest.raises(InvalidInput, match="takes a causal language model of transformers, not Linear"):
        sparity.attach(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match='no format "bitmusk"; did you mean "bitmask"'):
        sparity.attach(model, form="bitmusk")


def test_an_attached_model_is_saved_packed(tiny, tmp_path):
    model = sparity.attach(tiny("llama"))
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded.model.layers[0].mlp.up_proj, PackedLinear)
    assert torch.equal(logits(loaded), logits(model))
    assert declines(loaded) == declines(model)


def test_a_copy_stands_by_itself(tiny, steps):
    model = sparity.attach(tiny("llama"))
    copied = copy.deepcopy(model)
    expected = logits(copied)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    assert torch.equal(logits(copied), expected)
    assert copied.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    generated = copied.generate(TOKENS[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 15)
    assert native.unavailable() or steps == [1, 1]


def test_a_tied_head_stays_tied_and_in_memory_once(tiny):
    config = copy.deepcopy(tiny("llama").config)
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    plain = logits(model)
    sparity.attach(model, form="dense")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert error(logits(model), plain) <= 0.05 * float(plain.abs().max())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_gradients_reach_what_lies_before(tiny):
    model = tiny("llama")
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    wanted = model.model.norm.weight.grad.clone(), model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    sparity.attach(model)
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for found, slope in zip((model.model.norm.weight.grad, model.model.embed_tokens.weight.grad), wanted, strict=True):
        torch.testing.assert_close(found.float(), slope.float(), rtol=0.2, atol=0.05 * float(slope.abs().max()))


def test_attaching_twice_changes_nothing_more(tiny):
    model = sparity.attach(tiny("llama"))
    layers = [id(module) for module in model.modules()]
    expected = logits(model)
    assert sparity.attach(model) is model
    assert [id(module) for module in model.modules()] == layers
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("family", "place"), [("llama", "mlp.up_proj"), ("gpt2", "mlp.c_fc"), ("mixtral", "mlp.experts")]
)
def test_hooks_stay_where_they_were(tiny, family, place):
    model, seen = tiny(family), []
    layer = (model.transformer.h if family == "gpt2" else model.model.layers)[0].get_submodule(place)
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    with sparity.attached(model):
        logits(model)
        assert len(seen) == 1
        logits(copy.deepcopy(model))
        assert len(seen) == 2
        handle.remove()
        logits(model)
        assert len(seen) == 2
        packed = next(module for module in model.modules() if isinstance(module, PackedLinear | PackedExperts))
        handle = packed.register_forward_pre_hook(lambda *_: seen.append(1))
    logits(model)
    assert len(seen) == 3


@pytest.mark.parametrize(("family", "place"), [("llama", "mlp.up_proj"), ("mixtral", "mlp.experts")])
def test_a_layer_whose_forward_was_replaced_is_left_as_it_is(tiny, family, place):
    model = tiny(family)
    original = model.model.layers[0].get_submodule(place)
    original.forward = lambda x, *_: torch.full_like(x, float("nan"))
    sparity.attach(model)
    assert model.model.layers[0].get_submodule(place) is original
    assert any(isinstance(module, PackedLinear) for module in model.modules())
