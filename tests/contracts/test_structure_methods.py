"""The laws of a method of structured pruning, for every one that the registry finds."""

import dataclasses

import pytest
import torch
from structure_models import (
    OF_EXPERTS,
    OPTIONS,
    TOKENS,
    logits,
    model_for,
    with_channels_in_order,
    with_experts_in_order,
    with_groups_in_order,
)

import sparity
from sparity import registry
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.whole import stock_problem
from sparity.static.structure.methods.base import Method

KIND = "structure.method"
NAMES = registry.names(KIND)
BY_PLACE = ("sheared", "compresso")  # what their masks draw belongs to places
SCORES_DECIDE = ("magnitude", "minitron", "shortgpt", "frequency", "reap")
SIZES = {"mlp_channels": 64, "kv_groups": 2, "query_heads": 4, "hidden_size": 32, "experts": 4}


def options(name):
    return {"rotation": "global"} if name == "slicegpt" else dict(OPTIONS.get(name, {}))


@pytest.fixture(scope="module")
def models():
    return {name: model_for(name) for name in NAMES}


@pytest.fixture(scope="module")
def scores(models):
    return {name: sparity.structure_scores(models[name], TOKENS, method=name, **options(name)) for name in NAMES}


every = pytest.mark.parametrize("name", NAMES)


@every
def test_scores_are_float32_per_block_deterministic_and_change_nothing(name, models, scores):
    before = {key: value.clone() for key, value in models[name].state_dict().items()}
    again = sparity.structure_scores(models[name], TOKENS, method=name, **options(name))
    assert scores[name]
    for dimension, found in scores[name].items():
        size = SIZES.get(dimension.partition(".")[0])
        assert found.shape == ((4,) if size is None else (4, size)), dimension
        assert found.dtype == torch.float32
        assert not found.isnan().any()
        assert torch.equal(found, again[dimension])
    assert all(torch.equal(before[key], value) for key, value in models[name].state_dict().items())


@every
def test_what_is_removed_is_what_was_asked_for_and_stock_models_say_it(name, models):
    model, sizes = models[name], []
    for sparsity in (0.0, 0.25, 0.5):
        smaller = sparity.restructure(model, TOKENS, method=name, sparsity=sparsity, **options(name))
        again = sparity.restructure(model, TOKENS, method=name, sparsity=sparsity, **options(name))
        assert stock_problem(smaller) is None
        assert torch.equal(logits(smaller), logits(again))
        sizes.append(smaller.num_parameters())
        if not sparsity:
            assert torch.equal(logits(smaller), logits(model))
            continue
        planned = built(name).sizes(Decoder.open(model), sparsity)
        config = smaller.config.to_dict()
        said = {
            "depth": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "mlp_channels": config["intermediate_size"],
            "kv_groups": config["num_key_value_heads"],
            "experts": config.get("num_local_experts"),
        }
        assert planned == {dimension: said[dimension] for dimension in planned}
        assert not torch.equal(logits(smaller), logits(model))
    assert sizes[2] < sizes[0]
    assert sizes[2] <= sizes[1]


@pytest.mark.parametrize("name", SCORES_DECIDE)
def test_the_higher_scores_are_kept(name, models, scores):
    from sparity.static.structure.subject import Subject

    method = built(name)
    kept = method.choose(Subject(models[name], TOKENS), 0.5)
    for dimension, units in kept.items():
        found = scores[name][dimension]
        rows = found[None] if found.ndim == 1 else found
        for row, chosen in zip(rows, [units] if found.ndim == 1 else units, strict=True):
            gone = [index for index in range(len(row)) if index not in chosen]
            assert len(chosen) == len(gone)
            assert row[chosen].min() >= row[gone].max()


@every
def test_scores_follow_their_parts_into_another_order(name, models, scores):
    model = models[name]
    moved = []
    if name in OF_EXPERTS:
        order = torch.tensor([2, 0, 3, 1])
        moved = [("experts", order, with_experts_in_order(model, order))]
    elif name not in BY_PLACE and (name != "two_ssp" or "mlp_channels" in scores[name]):
        channels = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        moved = [
            ("mlp_channels", channels, with_channels_in_order(model, channels)),
            ("kv_groups", torch.tensor([1, 0]), with_groups_in_order(model, [1, 0])),
        ]
    for dimension, order, other in moved:
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)
        found = sparity.structure_scores(other, TOKENS, method=name, **options(name))
        for key, values in found.items():
            expected = scores[name][key]
            expected = expected[:, order] if key == dimension else expected
            if key == "query_heads" and dimension == "kv_groups":
                expected = expected.view(4, 2, 2)[:, order].flatten(1)
            torch.testing.assert_close(values, expected, rtol=2e-3, atol=1e-4)


@every
def test_wrong_input_is_refused_in_a_sentence(name, models):
    model, given = models[name], options(name)
    for sparsity in (1.0, -0.1, float("nan"), True, "half"):
        with pytest.raises(InvalidInput, match=r"must lie in \[0, 1\)"):
            sparity.restructure(model, TOKENS, method=name, sparsity=sparsity, **given)
    with pytest.raises(InvalidInput, match='has no option "no_such"'):
        sparity.structure_scores(model, TOKENS, method=name, no_such=1)
    for tokens in (torch.rand(2, 3), torch.zeros(2, 2, 2, dtype=torch.int64), torch.tensor([[97]])):
        with pytest.raises(InvalidInput, match=r"token"):
            sparity.structure_scores(model, tokens, method=name, **given)
    if registry.get(KIND, name).needs_text:
        with pytest.raises(InvalidInput, match="reads text: give token ids"):
            sparity.structure_scores(model, None, method=name, **given)
    if name in OF_EXPERTS:
        with pytest.raises(InvalidInput, match="experts"):
            sparity.restructure(models["magnitude"], TOKENS, method=name, sparsity=0.5, **given)
        with pytest.raises(InvalidInput, match="every token visits 2"):
            sparity.restructure(model, TOKENS, method=name, sparsity=0.75, **given)


@every
def test_it_is_a_frozen_dataclass_that_names_its_paper(name):
    import importlib

    plugin = registry.get(KIND, name)
    assert issubclass(plugin, Method)
    assert dataclasses.is_dataclass(plugin)
    assert "arXiv:" in importlib.import_module(plugin.__module__).__doc__


def built(name):
    return registry.create(KIND, name, options(name))
