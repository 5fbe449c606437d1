"""DuoAttention without training: how heads are told apart, what those that stream keep, and where it is refused."""

import copy

import pytest
import torch
from learned import learned_of
from test_kvzip import attention_calls

import sparity
from sparity.dynamic.cache.centres import Centres, centres_of
from sparity.dynamic.cache.learned import Study
from sparity.dynamic.cache.policies.duoattention import reach
from sparity.dynamic.cache.rotary import Rotary
from sparity.errors import UnsupportedModel
from sparity.models import Decoder

IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
DUO = {"sinks": 3, "window": 9}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def test_how_early_attention_comes_by_hand():
    still = Rotary(torch.zeros(1))  # nothing turns: all places are paid the same, 1/4 each
    centre = torch.tensor([[[1.0, 0.0]]])
    flat = reach(Centres(centre, centre, torch.ones(1, 1, 1), 1.0), still, 4)
    assert flat.tolist() == pytest.approx([(0.25 + 0.5 + 0.75 + 1) / 4])
    # a half turn per place: keys an even number of places back are paid e^2 times as much as the others
    turning = Rotary(torch.tensor([torch.pi]))
    found = reach(Centres(centre, centre, torch.ones(1, 1, 1), 1.0), turning, 3)
    high, low = torch.e, 1 / torch.e
    shares = torch.tensor([high, low, high]) / (2 * high + low)
    assert found.tolist() == pytest.approx([float(shares.cumsum(0).mean())])


@torch.no_grad()
def test_centres_are_means_of_what_is_projected_before_positions_turn_it(model):
    found, _ = centres_of(Study(Decoder.open(model), [True] * 3, IDS))
    for index, (module, named) in enumerate(attention_calls(model, IDS)):
        hidden = named["hidden_states"]
        queries = module.q_proj(hidden).view(2, 40, 4, 8)
        assert torch.allclose(found[index].queries, queries.mean(1), atol=1e-5)
        assert torch.allclose(found[index].keys, module.k_proj(hidden).view(2, 40, 2, 8).mean(1), atol=1e-5)
        sizes = (queries[..., :4] ** 2 + queries[..., 4:] ** 2).sqrt()
        assert torch.allclose(found[index].spans, sizes.mean(1), atol=1e-5)
        assert found[index].scaling == module.scaling


def test_the_share_of_heads_that_reach_furthest_back_keeps_everything(model):
    found, rotary = centres_of(Study(Decoder.open(model), [True] * 3, IDS))
    scores = torch.stack([reach(each, rotary, 500) for each in found])
    for share, many in ((0.5, 3), (0.25, 2), (1.0, 6)):
        learned = sparity.calibrate_cache(model, IDS, policy={"duoattention": {"heads": share}})
        heads = torch.stack([each["retrieval"] for each in learned])
        assert torch.equal(heads, scores >= scores.flatten().sort().values[-many])


@torch.no_grad()
def test_heads_that_stream_keep_the_ends_while_decoding_too(model):
    learned = learned_of(model, "duoattention")["learned"]
    with sparity.cache(model, {"duoattention": DUO}, 12, sinks=2, recent=2, learned=learned):
        past = model(IDS).past_key_values
        for place in range(4):
            model(IDS[:, place : place + 1], past_key_values=past)
    kinds = [bool(each) for layer in learned for each in layer["retrieval"]]
    assert any(kinds)
    assert not all(kinds)
    for index, layer in enumerate(past.layers):
        for row in range(2):
            for head in range(2):
                places = layer.store.segment(row, head)[2].tolist()
                whole = learned[index]["retrieval"][head]
                assert places == (list(range(44)) if whole else [0, 1, 2, *range(35, 44)])


def test_models_whose_positions_turn_nothing_are_refused(family_models):
    for policy in ("duoattention", "triattention"):
        with pytest.raises(UnsupportedModel, match="has no rotary positions: what its queries pay"):
            sparity.calibrate_cache(family_models["opt"], IDS, policy=policy)
