"""Exact mode with a cache: drafts read some pages, checks everything, and the tokens are the dense model's."""

import copy

import pytest
import torch

import sparity
from sparity.dynamic.speculate.exact import generate_exact
from sparity.errors import InvalidInput

QUEST = {"page": 4, "pages": 1, "dense": 0}


@pytest.fixture(scope="module")
def models(family_models):
    return {name: copy.deepcopy(family_models[name]) for name in ("llama", "gemma2", "gpt2")}


def prompts(count, length=30):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 90, (length + place,), generator=generator) for place in range(count)]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_are_those_of_the_whole_cache(family, models):
    model, drafted, accepted = models[family], 0, 0
    for ids in prompts(5):
        dense = model.generate(ids[None], max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
        with sparity.cache(model, "quest", 0.2, sinks=1, recent=1, **QUEST):
            sparse = model.generate(ids[None], max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
            answer = generate_exact(model, ids, max_new_tokens=20, draft=4, eos_token_id=[-1])
        assert torch.equal(answer.ids, dense)
        assert sparse.shape == dense.shape
        drafted, accepted = drafted + answer.drafted, accepted + answer.accepted
    assert 0 < accepted <= drafted


@torch.no_grad()
def test_drafts_read_pages_and_checks_everything(models):
    model, (ids,) = models["llama"], prompts(1)
    with sparity.cache(model, "quest", 0.2, sinks=1, recent=1, **QUEST):
        wrong = generate_exact(model, ids, max_new_tokens=40, draft=3, eos_token_id=[-1])
        past = model(ids[None]).past_key_values
        sparse = model(ids[None, :1], past_key_values=copy.deepcopy(past)).logits
        with model.sparity_cache_run.dense():
            dense = model(ids[None, :1], past_key_values=past).logits
    assert wrong.accepted < wrong.drafted  # some drafts are refused, so drafts are sparse
    assert not torch.equal(sparse, dense)
    again = model(ids[None]).past_key_values
    assert torch.equal(model(ids[None, :1], past_key_values=again).logits, dense)
    assert not hasattr(model, "sparity_cache_run")
    with sparity.cache(model, "quest", 1.0, **QUEST):
        every = generate_exact(model, ids, max_new_tokens=40, draft=3, eos_token_id=[-1])
    assert every.acceptance == 1
    assert torch.equal(every.ids, wrong.ids)


def test_a_cache_that_does_not_hold_everything_cannot_check(models):
    model, (ids,) = models["llama"], prompts(1)
    for policy, more in (("snapkv", {}), ("snapkv", {"read": "quest"}), ("keep_all", {})):
        with sparity.cache(model, policy, **more), pytest.raises(InvalidInput, match="checks with everything"):
            generate_exact(model, ids, max_new_tokens=4)
    with sparity.cache(models["gemma2"], "quest"), pytest.raises(InvalidInput, match="layers with a sliding window"):
        generate_exact(models["gemma2"], ids, max_new_tokens=4)
    with pytest.raises(InvalidInput, match="drafts with skipped activations"):
        generate_exact(model, ids, max_new_tokens=4)
