"""Which experts are skipped, and what the others weigh: by hand, and as the published code has it."""

import copy
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import build, tiny_configs
from sparity.dynamic.expert_skipping.calibrating import found_thresholds, shares_of_largest
from sparity.dynamic.expert_skipping.skipping import experts_of_sites, kept_experts, skip_of, skipping, weights_of_kept
from sparity.errors import NumericalError
from sparity.models.attached_runtime import input_sites

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
TOKENS = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(1))


def model_of(family="mixtral", implementation="eager", **options):
    config = copy.deepcopy(tiny_configs()[family])
    for name, value in options.items():
        setattr(config, name, value)
    model = build(config)
    model.set_experts_implementation(implementation)
    return model


@pytest.fixture(scope="module")
def mixtral():
    return model_of()


def published(block, hidden, beta):
    """The published code's forward of a Mixtral block with two experts per token, `hidden` [tokens, hidden]."""
    logits = hidden @ block.gate.weight.T
    weights, chosen = torch.topk(torch.softmax(logits, dim=1), 2, dim=-1)
    skipped = weights[:, 1] < beta * weights[:, 0]
    weights[skipped, 1] = 0
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for place in range(1 if skipped[token] else 2):
            gate, up = block.experts.gate_up_proj[chosen[token, place]].chunk(2)
            inner = torch.nn.functional.silu(gate @ hidden[token]) * (up @ hidden[token])
            out[token] += weights[token, place] * (block.experts.down_proj[chosen[token, place]] @ inner)
    return out, skipped


def test_by_hand():
    weights = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.5, 0.5], [0.75, 0.25]])
    kept = kept_experts(weights, 0.5)
    assert kept.tolist() == [[True, False], [True, True], [True, True], [True, False]]
    expected = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.5, 0.5], [1.0, 0.0]])
    torch.testing.assert_close(weights_of_kept(weights, kept), expected)
    several = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.39, 0.2, 0.01]])
    kept = kept_experts(several, 0.5)
    assert kept.tolist() == [[True, True, True, False], [True, True, True, False]]  # 0.2 is no less than half of 0.4
    assert shares_of_largest(several[:1]).tolist() == pytest.approx([0.75, 0.5, 0.25])
    torch.testing.assert_close(weights_of_kept(several, kept)[0], torch.tensor([4, 3, 2, 0]) / 9)


def test_a_token_whose_weights_are_nan_keeps_its_experts():
    weights = torch.tensor([[0.9, torch.nan], [0.9, 0.1]])
    assert kept_experts(weights, 0.5).tolist() == [[True, True], [True, False]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), threshold=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_first_stays_more_is_skipped_above_and_the_sum_is_kept(seed, threshold, dtype):
    drawn = 0.01 + torch.rand(8, 4, generator=torch.Generator().manual_seed(seed))
    found = drawn.sort(-1, descending=True).values.to(dtype)
    kept = kept_experts(found, threshold)
    assert bool(kept[:, 0].all())
    assert bool((kept | ~kept_experts(found, 1.0)).all())
    assert bool((kept[:, 1:] <= kept[:, :-1]).all())  # what stays weighs more than what does not
    shared = weights_of_kept(found, kept)
    assert shared.dtype == dtype
    torch.testing.assert_close(shared.float().sum(-1), found.float().sum(-1), rtol=0.02, atol=0)
    whole = kept.all(-1)
    assert torch.equal(shared[whole], found[whole])
    assert not bool(shared[~kept].any())


@settings(max_examples=20, deadline=None)
@given(beta=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_the_published_forward(mixtral, beta, seed):
    block, experts = mixtral.model.layers[1].mlp, experts_of_sites(input_sites(mixtral))
    hidden = torch.randn(12, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), skipping(experts, dict.fromkeys(experts, beta)):
        expected, _ = published(block, hidden, beta)
        torch.testing.assert_close(block(hidden[None])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_products_of_skipped_experts_are_not_computed(implementation):
    model = model_of(implementation=implementation)
    block, experts = model.model.layers[0].mlp, experts_of_sites(input_sites(model))
    hidden, seen = torch.randn(30, 32, generator=torch.Generator().manual_seed(5)), []
    with torch.no_grad(), skipping(experts, dict.fromkeys(experts, 0.5)):
        handle = block.experts.register_forward_pre_hook(lambda module, given: seen.append(given))
        found = block(hidden[None])[0]
        handle.remove()
    expected, skipped = published(block, hidden, 0.5)
    assert 0 < int(skipped.sum()) < 30
    ((rows, chosen, weights),) = seen
    assert rows.shape == (60 - int(skipped.sum()), 32)
    assert chosen.shape == weights.shape == (len(rows), 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("normalised", "factor"), [(True, None), (False, 1.0)])
def test_weights_are_divided_by_their_sum_where_the_router_does_so(normalised, factor):
    model = model_of("qwen3_moe", norm_topk_prob=normalised, num_experts_per_tok=3)
    block, experts = model.model.layers[0].mlp, experts_of_sites(input_sites(model))
    assert list(experts) == ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]  # block 1 is dense
    hidden, seen = torch.randn(30, 32, generator=torch.Generator().manual_seed(5)), []
    _, before, _ = block.gate(hidden)
    with torch.no_grad(), skipping(experts, dict.fromkeys(experts, 0.4)):
        handle = block.experts.register_forward_pre_hook(lambda module, given: seen.append(given[2][:, 0]))
        block(hidden[None])
        handle.remove()
        kept = kept_experts(before, 0.4)
        summed = torch.zeros(30).index_add(0, kept.nonzero()[:, 0], seen[0])
    assert not bool(kept.all())
    if factor is None:
        torch.testing.assert_close(summed, torch.ones(30))
    else:
        torch.testing.assert_close(seen[0], before[kept])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_threshold_of_zero_is_the_model_bit_for_bit_and_so_is_a_closed_context(implementation):
    model = model_of(implementation=implementation)
    experts = experts_of_sites(input_sites(model))
    with torch.no_grad():
        dense = model(TOKENS).logits
        with skipping(experts, dict.fromkeys(experts, 0.0)):
            assert torch.equal(model(TOKENS).logits, dense)
        with skipping(experts, dict.fromkeys(experts, 0.9)):
            assert not torch.equal(model(TOKENS).logits, dense)
        assert torch.equal(model(TOKENS).logits, dense)
    assert all(skip_of(module) is None for module in experts.values())


@pytest.mark.parametrize("sparsity", [0.5, 0.2])
def test_thresholds_are_the_quantiles_of_each_block(sparsity):
    model = model_of()
    experts = experts_of_sites(input_sites(model))
    found = found_thresholds(model.train(), experts, TOKENS, sparsity)
    assert model.training
    with torch.no_grad():
        states = model.eval().model(TOKENS, output_hidden_states=True).hidden_states
    for name, block, state in zip(experts, model.model.layers, states, strict=False):
        with torch.no_grad():
            after = block.input_layernorm(state)
            rotary = model.model.rotary_emb(after, torch.arange(20)[None])
            mixed = state + block.self_attn(after, position_embeddings=rotary, attention_mask=None)[0]
            logits = block.post_attention_layernorm(mixed) @ block.mlp.gate.weight.T
        top = logits.double().softmax(-1).sort(-1, descending=True).values
        ratios = (top[..., 1] / top[..., 0]).flatten().numpy()
        assert found[name] == pytest.approx(np.quantile(ratios, sparsity), rel=1e-4)
        assert 0 < found[name] < 1
    assert found_thresholds(model, experts, TOKENS, 0.0) == dict.fromkeys(experts, 0.0)


def test_half_of_the_second_experts_of_the_calibration_text_are_skipped(mixtral):
    model, seen = mixtral, []
    experts = experts_of_sites(input_sites(model))
    thresholds = found_thresholds(model, experts, TOKENS, 0.5)
    first = model.model.layers[0].mlp.experts  # what earlier blocks skip changes nothing of its inputs
    with torch.no_grad(), skipping(experts, thresholds):
        handle = first.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
        for sample in TOKENS.split(1):
            model(sample)
        handle.remove()
    assert sum(seen) == TOKENS.numel() * 3 // 2


def test_weights_that_are_no_numbers_give_no_threshold():
    model = model_of()
    experts = experts_of_sites(input_sites(model))
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.block_sparse_moe\.experts: the router's weights hold"):
        found_thresholds(model, experts, TOKENS, 0.5)


def test_a_copy_skips_by_itself_and_threads_do_not_meet():
    model = model_of(implementation="grouped_mm")
    experts = experts_of_sites(input_sites(model))
    with torch.no_grad(), skipping(experts, dict.fromkeys(experts, 0.7)):
        copied = copy.deepcopy(model)
        expected = [model(TOKENS[:, :length]).logits for length in (4, 20)]
        assert torch.equal(copied(TOKENS).logits, expected[1])
        assert skip_of(copied.model.layers[0].mlp.experts) is not skip_of(model.model.layers[0].mlp.experts)
        wrong = []

        def call(length, wanted):
            with torch.no_grad():
                wrong.extend(1 for _ in range(10) if not torch.equal(model(TOKENS[:, :length]).logits, wanted))

        threads = [threading.Thread(target=call, args=each) for each in zip((4, 20), expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert not torch.equal(copied(TOKENS).logits, model(TOKENS).logits)


def test_gradients_reach_what_stays():
    model = model_of()
    experts = experts_of_sites(input_sites(model))
    with skipping(experts, dict.fromkeys(experts, 1.0)):
        model(TOKENS).logits.square().mean().backward()
    assert bool(model.model.layers[0].mlp.experts.down_proj.grad.abs().sum() > 0)
