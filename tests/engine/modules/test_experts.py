"""Packed experts: what transformers' own loop over the experts gives, and what they hold."""

import copy

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from families import tiny_configs
from sparity.engine.kernels import native
from sparity.engine.modules import experts as engine_experts
from sparity.engine.modules.experts import PackedExperts
from sparity.formats import build_format
from sparity.models.experts import expert_matrices

KINDS = {"mixtral": MixtralExperts, "qwen3_moe": Qwen3MoeExperts}
NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
COUNT = 4


def fused(family="mixtral", dtype=torch.bfloat16, hidden=32):
    """transformers' experts, half of the weights +0, computed by its plain loop."""
    config = copy.deepcopy(tiny_configs()[family])
    config.hidden_size, config._experts_implementation = hidden, "eager"
    torch.manual_seed(0)
    module = KINDS[family](config).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.2)[torch.rand(parameter.shape) < 0.5] = 0
    return module.to(dtype).eval()


def pack(module, form="bitmask", values="same"):
    names = tuple(tuple(f"{expert}.{role}" for role in ("gate", "up", "down")) for expert in range(COUNT))
    packed = PackedExperts.like(module, names)
    one = build_format(form)
    packed.give(tuple(one.pack(m, values) for m in expert_matrices(module, expert)) for expert in range(COUNT))
    return packed


def routed(tokens, dtype=torch.bfloat16, hidden=32, experts=COUNT):
    """Hidden states, experts and weights; each token goes to two of the first `experts`."""
    torch.manual_seed(1)
    weights, index = torch.rand(tokens, experts).topk(2)
    return torch.randn(tokens, hidden, dtype=dtype), index, weights


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_the_same_as_transformers_in_float32(family, tokens):
    module = fused(family, torch.float32)
    inputs = routed(tokens, torch.float32)
    torch.testing.assert_close(pack(module)(*inputs), module(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["bitmask", "columns", "dense", "csr"])
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_as_near_to_exact_as_transformers_in_bfloat16(form, tokens):
    module = fused()
    x, index, weights = routed(tokens)
    exact = copy.deepcopy(module).double()(x.double(), index, weights.double())
    found, theirs = (made(x, index, weights) for made in (pack(module, form), module))
    assert found.dtype == torch.bfloat16
    error, allowed = ((made.double() - exact).abs().max() for made in (found, theirs))
    assert error <= 1.5 * allowed


def test_experts_without_tokens_add_nothing():
    module = fused()
    x, index, weights = routed(9, experts=2)
    packed = pack(module)
    packed._prepared[2:] = [None, None]  # a call of these would fail
    assert set(index.flatten().tolist()) == {0, 1}
    torch.testing.assert_close(packed(x, index, weights), module(x, index, weights), rtol=0.05, atol=0.02)
    assert packed(x[:0], index[:0], weights[:0]).shape == (0, 32)


@NATIVE
def test_gate_and_up_in_one_call_give_the_same_bits(monkeypatch):
    packed, (x, index, weights) = pack(fused()), routed(6)
    calls, original = [], engine_experts.gemv_many
    monkeypatch.setattr(engine_experts, "gemv_many", lambda *given: calls.append(len(given[0])) or original(*given))
    together = packed(x, index, weights)
    assert calls == [2] * len(index.unique())
    calls.clear()
    apart = packed(x.requires_grad_(), index, weights)
    assert calls == []
    assert torch.equal(together, apart)


def test_gradients_reach_tokens_and_routing_weights():
    module = fused(dtype=torch.float32)
    slopes = []
    for made in (module, pack(module)):
        x, index, weights = routed(9, torch.float32)
        made(x.requires_grad_(), index, weights.requires_grad_()).square().sum().backward()
        slopes.append((x.grad, weights.grad))
    for found, wanted in zip(slopes[1], slopes[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_it_holds_comes_back_bit_for_bit():
    module = fused()
    module.gate_up_proj[1, 2, 3], module.down_proj[3, 0, 0] = -0.0, float("nan")
    packed = pack(module)
    assert not list(packed.parameters())
    dense = packed.dense()
    assert dense.keys() == dict(module.named_parameters()).keys()
    for name, weight in dense.items():
        assert torch.equal(weight.view(torch.int16), module.get_parameter(name).view(torch.int16))
    assert [name for name, _ in packed.matrices()][:4] == ["0.gate", "0.up", "0.down", "1.gate"]


def test_a_copy_reads_the_same_weights():
    packed = pack(fused()).train()
    copied = copy.deepcopy(packed)
    inputs = routed(5)
    assert copied is not packed
    assert copied.training
    assert torch.equal(copied(*inputs), packed(*inputs))
    assert all(mine is theirs for (_, mine), (_, theirs) in zip(copied.matrices(), packed.matrices(), strict=True))
    assert f"experts=4, bitmask, {packed.nbytes:,} bytes" in repr(copied)
