"""Shares of the cache for each block: the cheapest that the mean allows, measured, used, saved and refused."""

import copy
from itertools import product

import pytest
import torch
from learned import learned_of

import sparity
from masked_dense import called
from sparity.dynamic.cache.stage import CacheStage
from sparity.errors import InvalidInput

IDS = torch.randint(3, 90, (2, 44), generator=torch.Generator().manual_seed(1))
STREAM = {"policy": "streaming_llm", "sinks": 1, "recent": 1}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def measured(model, keep, ids, ahead):
    """KL from the whole cache over the last tokens, by shares of each block."""
    calls = [{"input_ids": ids[:, :-ahead]}, {"input_ids": ids[:, -ahead:]}]
    dense = called(model, calls)[1].log_softmax(-1)
    with sparity.cache(model, "streaming_llm", keep, sinks=1, recent=1, decode=False):
        sparse = called(model, calls)[1].log_softmax(-1)
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


def test_shares_are_those_whose_measured_costs_add_up_to_the_least(model):
    found = sparity.cache_budgets(model, IDS, keep=0.4, ahead=8, levels=(2, 4, 6), **STREAM)
    shares = [0.2, 0.4, 0.6]
    costs = [
        [measured(model, [share if block == index else 1.0 for block in range(3)], IDS, 8) for share in shares]
        for index in range(3)
    ]
    allowed = [taken for taken in product(range(3), repeat=3) if sum(shares[i] for i in taken) <= 1.2 + 1e-9]
    best = min(allowed, key=lambda taken: sum(row[i] for row, i in zip(costs, taken, strict=True)))
    assert found == pytest.approx([shares[i] for i in best])
    assert len({round(cost, 6) for row in costs for cost in row}) == 9  # blocks and shares differ


def test_each_block_keeps_its_share_in_a_context_and_when_it_was_saved(model, tmp_path):
    keep = [0.3, 0.5, 1.0]
    with sparity.cache(model, "streaming_llm", keep, sinks=1, recent=1):
        past = model(IDS).past_key_values
    assert [layer.store.lengths.tolist() for layer in past.layers] == [[13] * 4, [22] * 4, [44] * 4]
    options = {**STREAM, "keep": keep}
    result = sparity.run(
        {"stages": [{"cache": options}], "measure": {"speed": None}}, model=model, output=tmp_path / "out"
    )
    past = sparity.load(result.path)(IDS).past_key_values
    assert [int(layer.store.lengths[0]) for layer in past.layers] == [13, 22, 44]
    assert CacheStage.model_validate(options).words == "streaming_llm, 30 % to 100 % of the cache"


def test_what_a_policy_learned_is_used_while_costs_are_measured(model):
    options = {
        "policy": {"kvzap": {"window": 2}},
        "sinks": 1,
        "recent": 1,
        "keep": 0.4,
        "ahead": 8,
        "levels": (2, 4, 6),
    }
    learned = learned_of(model, "kvzap")["learned"]
    found = sparity.cache_budgets(model, IDS, learned=learned, **options)
    assert sum(found) <= 3 * 0.4 + 1e-9
    assert {round(share, 6) for share in found} <= {0.2, 0.4, 0.6}


def test_blocks_with_a_sliding_window_count_for_nothing(family_models):
    found = sparity.cache_budgets(family_models["gemma2"], IDS, keep=0.5, ahead=8, levels=(2, 4), **STREAM)
    assert found[0] == found[2] == 1.0
    assert found[1] in (0.25, 0.5)


def test_what_cannot_be_met_is_refused(model, family_models, tmp_path):
    for options, words in (
        ({"policy": "pyramidkv"}, "does not keep the share"),
        ({"policy": "quest"}, "does not keep the share"),
        ({"policy": "kvzip"}, "does not keep the share"),
        ({"policy": {"kvzap": {"window": 2}}}, "kvzap learns from text"),
        ({"keep": 1.0}, r"must lie in \(0, 1\)"),
        ({"levels": (1, 2)}, "be whole numbers with 4"),
        ({"ahead": 43}, "texts of more than 44 tokens"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.cache_budgets(model, IDS, **{**STREAM, "keep": 0.4, **options})
    for keep, policy, words in (
        ([0.5, 0.5], "snapkv", "keep has 2 shares, and the model 3 layers: of another model"),
        ([0.5, 0.5, 0], "snapkv", "must be a share"),
        ([0.5, 0.5, 0.5], "quest", "reads one share in all layers"),
    ):
        with pytest.raises(InvalidInput, match=words), sparity.cache(model, policy, keep):
            pass
    recipe = {"stages": [{"cache": {"keep": [0.5, 0.5]}}], "measure": {"speed": None}}
    with pytest.raises(InvalidInput, match="keep has 2 shares"):
        sparity.run(recipe, model=family_models["llama"], output=tmp_path / "out")
