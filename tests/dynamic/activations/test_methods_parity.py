"""Methods of activation sparsity beside the published formulas, written here anew from papers and authors' code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

import sparity
from sparity.calibration import Statistics
from sparity.dynamic.activations.fitting import fit_place
from sparity.dynamic.activations.methods.base import Seen
from sparity.dynamic.activations.methods.rms import Rms
from sparity.dynamic.activations.methods.statistical_topk import StatisticalTopk
from sparity.dynamic.activations.methods.teal import Teal
from sparity.dynamic.activations.methods.wina import Wina
from sparity.dynamic.activations.places import places_of
from sparity.dynamic.activations.quantiles import interpolated_quantile
from sparity.errors import InvalidInput
from sparity.models.attached_runtime import input_sites

sparsities = st.floats(0.03, 0.95)
seeds = st.integers(0, 1000)
some = settings(max_examples=12, deadline=None)


def draw(seed, tokens=50, channels=37):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, channels, generator=generator) + 0.2
    weight = torch.randn(19, channels, generator=generator) * torch.rand(channels, generator=generator)
    return x, weight, torch.randn(x.shape, generator=generator)


def first_block(model, where):
    return [place for place in places_of(model, input_sites(model), where) if ".0." in place.name]


def agreement(mask, expected):
    return float((mask == expected).double().mean())


@some
@given(seeds, sparsities)
def test_teal_with_reference_is_the_authors_histogram(seed, sparsity):
    x = draw(seed)[0]
    flat = np.sort(x.numpy().ravel())
    tail = int(0.01 * len(flat))
    inner = torch.linspace(float(flat[tail]), float(flat[-tail]), 9999).numpy()
    edges = np.concatenate([flat[:1], inner, flat[-1:]]).astype(np.float64)
    counts = np.histogram(flat.astype(np.float64), edges)[0]
    centres, reached = (edges[:-1] + edges[1:]) / 2, counts.cumsum()
    wanted = (0.5 + sparsity / 2) * len(flat)
    found = np.searchsorted(reached, wanted)
    before = reached[found - 1]
    threshold = centres[found - 1] + (wanted - before) / (reached[found] - before) * (
        centres[found] - centres[found - 1]
    )
    fitted = sparity.fit_activations(x, method="teal", sparsity=sparsity, reference=True)
    assert float(fitted.threshold) == pytest.approx(threshold, rel=1e-4, abs=2e-3)  # a bin is about 5e-4 wide
    assert agreement(fitted.keep(x), x.abs() > threshold) > 0.998


@some
@given(seeds, sparsities)
def test_teal_is_the_quantile_of_the_magnitude(seed, sparsity):
    x = draw(seed)[0]
    mask = sparity.activation_mask(x, method="teal", sparsity=sparsity)
    assert torch.equal(mask, x.abs() > x.abs().flatten().kthvalue(math.ceil(sparsity * x.numel() - 1e-9)).values)
    statistics = Statistics.gather("of a model", {"histogram"})  # of all calibration tokens, its bins up to 1 % wide
    statistics.add(x)
    threshold = Teal().rule(Seen(statistics), sparsity).threshold
    assert agreement(mask, x.abs() > threshold) > 0.985


@some
@given(seeds, sparsities)
def test_cats_is_the_quantile_of_the_gates_magnitude_and_with_reference_the_authors_histogram(seed, sparsity):
    gate = torch.nn.functional.silu(draw(seed)[0])
    mask = sparity.activation_mask(gate, method="cats", sparsity=sparsity)
    assert torch.equal(mask, gate.abs() >= gate.abs().double().quantile(sparsity).float())
    edges = np.concatenate([[-np.inf], torch.linspace(-2, 2, 19_998).numpy(), [np.inf]])
    shares = np.histogram(gate.abs().numpy(), edges)[0].cumsum() / gate.numel()
    threshold = edges[int((shares <= sparsity).sum())]
    mask = sparity.activation_mask(gate, method="cats", sparsity=sparsity, reference=True)
    assert agreement(mask, gate.abs() >= threshold) > 0.999


@some
@given(seeds, sparsities)
def test_chess_is_the_quantile_of_the_product_with_the_mean_of_up(seed, sparsity):
    gate, _, up = draw(seed)
    means = up.abs().reshape(-1, up.shape[-1]).double().mean(0)
    scores = gate.abs().double() * means
    limit = scores.flatten().kthvalue(math.ceil(sparsity * scores.numel() - 1e-9)).values
    mask = sparity.activation_mask(gate, method="chess", sparsity=sparsity, partner=up)
    assert agreement(mask, scores > limit) >= 1 - 2 / scores.numel()


@some
@given(seeds, sparsities)
def test_scap_without_a_centre_and_with_the_median_is_the_authors_code(seed, sparsity):
    x = draw(seed)[0]
    for centre, middle in (("zero", 0.0), ("median", x.median().item())):
        shifted = (x - middle).abs()
        threshold = np.quantile(shifted.double().numpy().ravel(), sparsity)
        mask = sparity.activation_mask(x, method="scap", sparsity=sparsity, centre=centre)
        assert agreement(mask, ~(shifted.double() <= threshold)) >= 1 - 2 / x.numel()


@some
@given(seeds, sparsities)
def test_wina_is_the_top_k_of_magnitude_times_column_norm(seed, sparsity):
    x, weight, _ = draw(seed)
    kept = max(int(x.shape[-1] * (1 - sparsity)), 1)
    chosen = (x * weight.norm(dim=0)).abs().topk(kept).indices
    expected = torch.zeros_like(x).scatter(-1, chosen, 1).bool()
    mask = sparity.activation_mask(x, weight, method="wina", sparsity=sparsity, reference=True)
    assert torch.equal(mask, expected)


@some
@given(seeds, sparsities)
def test_the_plans_masks_are_at_or_above_the_quantile_of_each_token(seed, sparsity):
    h, weight, _ = draw(seed)
    for method, scores in (("plan_quantile", h.abs()), ("plan_importance", h.abs() * weight.norm(dim=0))):
        expected = scores >= scores.quantile(sparsity, dim=-1, keepdim=True)
        for x in (h, h[0]):
            mask = sparity.activation_mask(x, weight, method=method, sparsity=sparsity)
            assert torch.equal(mask, expected if x is h else expected[0])


def test_the_plans_quantile_works_in_bfloat16_and_of_more_numbers_than_torch_quantile_takes():
    h = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    mask = sparity.activation_mask(h.bfloat16(), method="plan_quantile", sparsity=0.4)
    assert (mask.sum(-1) == 64 - math.ceil(0.4 * 63)).all()
    with pytest.raises(RuntimeError):
        h.bfloat16().abs().quantile(0.4, dim=-1)
    many = torch.tensor([2.0]).expand((1 << 24) + 1)
    with pytest.raises(RuntimeError):
        many.quantile(0.4)
    assert float(interpolated_quantile(many, 0.4)) == 2.0


@some
@given(seeds, sparsities)
def test_rms_is_a_quantile_of_the_magnitude_over_the_tokens_rms(seed, sparsity):
    x = draw(seed)[0]
    x *= torch.rand(2, 50, 1, generator=torch.Generator().manual_seed(seed)) * 10
    ratio = x.abs().double() / x.double().pow(2).mean(-1, keepdim=True).sqrt()
    limit = ratio.flatten().kthvalue(math.ceil(sparsity * ratio.numel() - 1e-9)).values
    mask = sparity.activation_mask(x, method="rms", sparsity=sparsity)
    assert agreement(mask, ratio > limit) >= 1 - 3 / x.numel()


@some
@given(seeds, sparsities)
def test_statistical_top_k_is_mean_plus_deviations_and_with_reference_what_gemma_3n_keeps(seed, sparsity):
    gate = draw(seed)[0]
    size = gate.abs().double()
    scores = (size - size.mean(-1, keepdim=True)) / size.std(-1, correction=0, keepdim=True)
    limit = scores.flatten().kthvalue(math.ceil(sparsity * scores.numel() - 1e-9)).values
    mask = sparity.activation_mask(gate, method="statistical_topk", sparsity=sparsity, reference=False)
    assert agreement(mask, scores > limit) >= 1 - 3 / gate.numel()
    config = Gemma3nTextConfig(
        hidden_size=8,
        intermediate_size=gate.shape[-1],
        num_hidden_layers=1,
        activation_sparsity_pattern=[sparsity],
        layer_types=["full_attention"],
    )
    for dtype in (torch.float32, torch.bfloat16):
        typed = gate.to(dtype)
        kept = Gemma3nTextMLP(config)._gaussian_topk(typed) > 0
        for options in ({}, {"reference": True}):
            found = sparity.activation_mask(typed, method="statistical_topk", sparsity=sparsity, **options)
            assert torch.equal(found, kept)


def test_wina_with_reference_weighs_k_and_gate_only(family_models):
    generator = torch.Generator().manual_seed(0)
    weighed = {}
    for place in first_block(family_models["llama"], "all"):
        statistics = Statistics.gather(place.site.name, {"inputs"})
        statistics.add(torch.randn(20, place.columns, generator=generator))
        found = {flag: fit_place(Wina(reference=flag), place, statistics, 0.5)[0] for flag in (False, True)}
        norms = place.weight.float().norm(dim=0)
        assert torch.allclose(found[False]["threshold"] * norms, torch.ones(()))
        weighed[place.reads[0].role] = found[True]["threshold"].ndim == 1
    assert weighed == {role: role in ("k", "gate") for role in ("q", "k", "v", "o", "gate", "up", "down")}


def test_statistical_top_k_refuses_its_reference_in_a_model(family_models):
    place = first_block(family_models["llama"], "gate_output")[0]
    statistics = Statistics.gather(place.site.name, {"inputs"})
    statistics.add(torch.randn(20, place.reads[0].weight.shape[1], generator=torch.Generator().manual_seed(0)))
    with pytest.raises(InvalidInput, match="leave `reference` out, or use sparity"):
        fit_place(StatisticalTopk(reference=True), place, statistics, 0.5)


def test_rms_scales_the_inputs_of_o_and_down_only(family_models):
    scaled = {}
    for place in first_block(family_models["llama"], "all"):
        statistics = Statistics.gather(place.site.name, {"inputs"})
        statistics.add(torch.randn(20, place.columns, generator=torch.Generator().manual_seed(0)))
        scaled[place.reads[0].role] = "rms" in fit_place(Rms(), place, statistics, 0.5)[0]
    assert scaled == {role: role in ("o", "down") for role in ("q", "k", "v", "o", "gate", "up", "down")}
