"""Shares of the cache for each KV head: what is held, dense attention under its mask, the cheapest shares, refusals."""

import copy
from itertools import product

import pytest
import torch

import sparity
from masked_dense import called, calls_of, masked_logits, recording
from sparity.dynamic.cache.stage import CacheStage
from sparity.errors import CorruptFile, InvalidInput

IDS = torch.randint(3, 90, (2, 44), generator=torch.Generator().manual_seed(1))
KEEP = [[0.3, 0.6], [1.0, 0.2], 0.5]  # of three layers with two KV heads
SIZES = (24, 10, 1, 1, 5, 1)  # a prompt, a second piece, decoding, a short second turn, decoding
SNAPKV = {"policy": {"snapkv": {"window": 4}}, "sinks": 1, "recent": 1}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def held(past):
    return [[int(count) for count in layer.store.lengths[:2]] for layer in past.layers]


@torch.no_grad()
def test_each_head_holds_its_share_in_a_context_and_when_it_was_saved(model, tmp_path):
    counts = [[13, 26], [44, 8], [22, 22]]
    with sparity.cache(model, keep=KEEP, **SNAPKV):
        past = model(IDS).past_key_values
        assert held(past) == counts
        model(IDS, past_key_values=past)  # of all tokens so far
        assert held(past) == [[26, 52], [88, 17], [44, 44]]
    recipe = {"stages": [{"cache": {"keep": KEEP, **SNAPKV}}], "measure": {"speed": None}}
    loaded = sparity.load(sparity.run(recipe, model=model, output=tmp_path / "out").path)
    assert held(loaded(IDS).past_key_values) == counts
    assert CacheStage.model_validate({"keep": KEEP, **SNAPKV}).words == "snapkv, 20 % to 100 % of the cache"


@torch.no_grad()
def test_a_head_holds_what_it_would_if_all_had_its_budget(model):
    with sparity.cache(model, keep=KEEP, **SNAPKV):
        past = model(IDS).past_key_values
    for index, shares in enumerate(KEEP):
        for head in range(2):
            share = shares[head] if isinstance(shares, list) else shares
            with sparity.cache(model, keep=share, **SNAPKV):
                alike = model(IDS).past_key_values.layers[index].store
            for row in range(2):
                here, there = past.layers[index].store.segment(row, head), alike.segment(row, head)
                assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("name", ["snapkv", "criticalkv"])
def test_what_was_evicted_counts_as_if_it_were_masked(family, name, family_models, monkeypatch):
    model = family_models[family]
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    keep = [[0.3 + 0.15 * ((head + index) % 4) for head in range(heads)] for index in range(3)]
    for pads in ((0,), (0, 7)):
        calls = calls_of(pads, *SIZES)
        with recording(monkeypatch) as seen, sparity.cache(model, {name: {"window": 4}}, keep, sinks=2, recent=2):
            found = called(model, calls)
        expected = masked_logits(model, calls, seen)
        for call, here, there in zip(calls, found, expected, strict=True):
            real = call["attention_mask"][:, -call["input_ids"].shape[1] :].bool()
            assert torch.allclose(here[real], there[real], atol=2e-5 * float(there.abs().max()))


def test_whole_heads_give_the_bits_of_the_whole_cache(model):
    calls = calls_of((0, 5), *SIZES)
    with sparity.cache(model, keep=[[1.0, 1.0]] * 3, **SNAPKV):
        found = called(model, calls)
    assert all(torch.equal(*pair) for pair in zip(found, called(model, calls), strict=True))


def test_shares_are_those_whose_measured_costs_add_up_to_the_least(model):
    shares, ahead = [0.2, 0.4, 0.6], 3
    found = sparity.cache_budgets(model, IDS, by="head", **{**SNAPKV, "keep": 0.4, "ahead": ahead, "levels": (2, 4, 6)})
    calls = [{"input_ids": IDS[:, :-ahead]}, {"input_ids": IDS[:, -ahead:]}]
    dense, costs = called(model, calls)[1].log_softmax(-1), []
    for cell in range(6):
        costs.append([])
        for share in shares:
            keep = [[share if cell == 2 * layer + head else 1.0 for head in range(2)] for layer in range(3)]
            with sparity.cache(model, keep=keep, **SNAPKV):
                sparse = called(model, calls)[1].log_softmax(-1)
            costs[-1].append(float((dense.exp() * (dense - sparse)).sum(-1).mean()))
    allowed = [taken for taken in product(range(3), repeat=6) if sum(shares[i] for i in taken) <= 2.4 + 1e-9]
    least = min(sum(row[i] for row, i in zip(costs, taken, strict=True)) for taken in allowed)
    places = [min(range(3), key=lambda i: abs(shares[i] - share)) for layer in found for share in layer]
    assert sum(shares[i] for i in places) <= 2.4 + 1e-9
    assert sum(row[i] for row, i in zip(costs, places, strict=True)) == pytest.approx(least, rel=1e-3)
    assert len({round(cost, 7) for row in costs for cost in row}) == 18  # heads and shares differ


def test_what_cannot_be_met_is_refused(model):
    for policy, keep, words in (
        ("adakv", KEEP, "heads of adakv do not choose each by itself"),
        ("tova", KEEP, "heads of tova do not choose each by itself"),
        ("snapkv", [[0.5] * 3] * 3, "keep has 3 shares of layer 0, and the model 2 KV heads: of another model"),
        ("snapkv", [[0.5, 0]] * 3, "must be a share"),
        ("snapkv", [[0.5, 20]] * 3, "is to keep 20 tokens, and 36 always stay"),
    ):
        with pytest.raises(InvalidInput, match=words), sparity.cache(model, policy, keep):
            pass
    for options, words in (
        ({"by": "heads"}, "must be block, or head"),
        ({"policy": "adakv", "by": "head"}, "or head for policies in which each head chooses by itself"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.cache_budgets(model, IDS, **{**SNAPKV, "keep": 0.4, "ahead": 3, **options})
    name = "model.layers.0.self_attn.k_proj.keep"
    stage = CacheStage.model_validate(SNAPKV)
    for tensor in (torch.ones(2), torch.tensor([1.0, -1.0]).double(), torch.ones(1, 2).double()):
        with pytest.raises(CorruptFile, match="not a share or a number"):
            stage.attach(model, _sites(model), {**_shares(model), name: tensor})


def _sites(model):
    from sparity.models.attached_runtime import input_sites

    return input_sites(model)


def _shares(model):
    return {f"model.layers.{index}.self_attn.k_proj.keep": torch.tensor(0.5).double() for index in range(3)}
