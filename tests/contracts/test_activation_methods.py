"""The laws of a method of activation sparsity, for every one that the registry finds."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

import sparity
from sparity import registry
from sparity.dynamic.activations.methods.base import RuleMethod
from sparity.dynamic.activations.places import places_of
from sparity.dynamic.activations.sequence_masks import SequenceMethod
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Decoder

KIND = "activations.method"
NAMES = registry.names(KIND)
CASES = [(name, {}) for name in NAMES] + [
    (name, {"reference": True})
    for name in NAMES
    if "reference" in {field.name for field in dataclasses.fields(registry.get(KIND, name))}
]
RULES = [name for name in NAMES if issubclass(registry.get(KIND, name), RuleMethod)]
OF_A_MODEL = {"statistical_topk": {"reference": False}}  # options that are the default at the places of a model
CASES += list(OF_A_MODEL.items())
CHANNELS = 48
ABSOLUTE = ("cats", {"reference": True})  # its bins are the same whatever the scale


def activations(seed=0, tokens=40, dtype=torch.float32):
    """Two samples of tokens of different sizes and their partner, and a weight; no number is zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, CHANNELS, generator=generator)
    x *= torch.rand(2, tokens, 1, generator=generator) + 0.5
    weight = torch.randn(24, CHANNELS, generator=generator) * (1 + torch.rand(CHANNELS, generator=generator))
    return x.to(dtype), weight, torch.randn(x.shape, generator=generator).to(dtype)


def fitted(case, x, weight, partner, sparsity=0.5):
    name, options = case
    return sparity.fit_activations(x, weight, method=name, sparsity=sparsity, partner=partner, **options)


def words(case):
    return case[0] + "".join(f" {name}={value}" for name, value in case[1].items())


every_case = pytest.mark.parametrize("case", CASES, ids=words)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_is_bool_like_x_deterministic_and_changes_nothing(case, dtype):
    x, weight, partner = activations(dtype=dtype)
    before = x.clone(), weight.clone(), partner.clone()
    first, second = (fitted(case, x, weight, partner) for _ in range(2))
    mask = first.keep(x)
    assert mask.dtype == torch.bool
    assert mask.shape == x.shape
    assert torch.equal(mask, second.keep(x))
    assert torch.equal(mask, torch.stack([first.keep(sample) for sample in x]))
    assert all(torch.equal(*pair) for pair in zip(before, (x, weight, partner), strict=True))
    assert first.realised == pytest.approx(
        1 - float(mask.double().mean()), abs=1e-3 if dtype == torch.float32 else 0.02
    )


@every_case
def test_nan_counts_and_the_other_tokens_do_not_notice(case):
    x, weight, partner = activations()
    found = fitted(case, x, weight, partner)
    mask = found.keep(x)
    broken = x.clone()
    broken[0, 3, 5] = torch.nan
    with_nan = found.keep(broken)
    assert with_nan[0, 3, 5]
    others = torch.ones(x.shape[:2], dtype=torch.bool)
    others[0, slice(None) if issubclass(registry.get(KIND, case[0]), SequenceMethod) else 3] = False
    assert torch.equal(with_nan[others], mask[others])


@every_case
def test_at_sparsity_0_every_channel_counts_and_more_sparsity_keeps_fewer(case):
    x, weight, partner = activations()
    kept = [int(fitted(case, x, weight, partner, share).keep(x).sum()) for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9)]
    assert kept[0] == x.numel()
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)


@every_case
def test_what_was_fitted_survives_a_file(case):
    x, weight, partner = activations()
    found = fitted(case, x, weight, partner)
    again = load(save(dict(found.tensors)))
    assert {name: tensor.dtype for name, tensor in again.items()} == {n: t.dtype for n, t in found.tensors.items()}
    assert torch.equal(found.method.mask(again, x), found.keep(x))


@pytest.mark.parametrize("case", [case for case in CASES if case != ABSOLUTE], ids=words)
@settings(max_examples=8, deadline=None)
@given(exponent=st.integers(-20, 20), seed=st.integers(0, 5))
def test_the_unit_of_the_activations_does_not_matter(case, exponent, seed):
    x, weight, partner = activations(seed)
    scaled = x * 2.0**exponent
    assert torch.equal(fitted(case, scaled, weight, partner).keep(scaled), fitted(case, x, weight, partner).keep(x))


@every_case
@settings(max_examples=15, deadline=None)
@given(sparsity=st.floats(0.02, 0.95), seed=st.integers(0, 50))
def test_about_the_share_that_was_asked_for_is_skipped(case, sparsity, seed):
    x, weight, partner = activations(seed, tokens=64)
    found = fitted(case, x, weight, partner, sparsity)
    name, options = case
    assumed = options.get("reference", name == "statistical_topk") and name in ("teal", "statistical_topk")
    assert found.realised == pytest.approx(sparsity, abs=0.06 if assumed else 1.5 / CHANNELS)


@pytest.mark.parametrize("name", RULES)
def test_data_that_does_not_fit_is_refused(name):
    x, weight, partner = activations()
    found = fitted((name, OF_A_MODEL.get(name, {})), x, weight, partner)
    good = dict(found.tensors)
    for change, words in (
        ({"threshold": good["threshold"] * torch.nan}, "holds nan, which is no threshold"),
        ({"threshold": torch.ones(CHANNELS + 1)}, rf"is float32 \[{CHANNELS + 1}\]"),
        ({"threshold": torch.ones((), dtype=torch.float64)}, "is float64"),
        ({"treshold": torch.tensor(1.0)}, "unknown treshold"),
    ):
        with pytest.raises(CorruptFile, match=words) as error:
            found.method.mask({**good, **change}, x)
        assert "fetch or make the folder again" in str(error.value)
    with pytest.raises(CorruptFile, match="lacks threshold"):
        found.method.mask({key: tensor for key, tensor in good.items() if key != "threshold"}, x)


@pytest.mark.parametrize("name", NAMES)
def test_the_data_of_a_place_with_other_channels_is_refused_and_nothing_is_left_behind(name, family_models):
    model = family_models["llama"]
    method = registry.build(KIND, name)
    decoder = Decoder.open(model)
    place = places_of(decoder.skeleton, decoder.sites(0), method.where)[0]
    hooks = len(place.module._forward_hooks), len(place.module._forward_pre_hooks)
    wrong = {"threshold": torch.ones(place.columns + 1)}
    with pytest.raises(CorruptFile, match=place.name), method.attach(place, wrong, SparseTokens()):
        pass
    assert (len(place.module._forward_hooks), len(place.module._forward_pre_hooks)) == hooks


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused_with_what_there_is(name):
    with pytest.raises(InvalidInput, match=f'method "{name}" has no option "sparsness"'):
        registry.build(KIND, {name: {"sparsness": 0.5}})
