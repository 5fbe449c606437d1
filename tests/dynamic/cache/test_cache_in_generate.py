"""Generation with a policy: beams, sampling, drafts, pieces of prompts, and the memory that is freed."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

import sparity
from sparity.errors import InvalidInput

IDS = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(1))
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def snapkv(model, keep=0.4, **options):
    return sparity.cache(model, "snapkv", keep, **{"window": 4, "sinks": 2, "recent": 2, **options})


def forced(model, ids, new):
    """Log-probabilities `[rows, new]` of the last tokens of `ids`, read one by one after the rest."""
    past = DynamicCache(config=model.config)
    logits = model(ids[:, :-new], past_key_values=past).logits[:, -1]
    found = []
    for place in range(ids.shape[1] - new, ids.shape[1]):
        found.append(logits.log_softmax(-1).gather(1, ids[:, place : place + 1]))
        logits = model(ids[:, place : place + 1], past_key_values=past).logits[:, -1]
    return torch.cat(found, 1)


@torch.no_grad()
def test_greedy_tokens_are_those_of_single_calls(model):
    with snapkv(model):
        output = model.generate(IDS, max_new_tokens=6, return_dict_in_generate=True, output_logits=True, **GREEDY)
        scores = forced(model, output.sequences, 6)
    own = torch.stack([logits.log_softmax(-1).amax(-1) for logits in output.logits], 1)
    assert torch.allclose(own, scores, atol=1e-5)
    layer = output.past_key_values.layers[0]
    assert output.past_key_values.get_seq_length() == 35
    assert layer.store.lengths.tolist() == [12 + 5] * 4  # 40 % of the prompt, and what was decoded


@torch.no_grad()
@pytest.mark.parametrize("policy", ["snapkv", "adakv", "h2o"])
def test_beams_score_what_their_tokens_score_one_by_one(model, policy):
    options = {"window": 4} if policy != "h2o" else {}
    with sparity.cache(model, policy, 0.4, sinks=2, recent=2, **options):
        output = model.generate(
            IDS,
            num_beams=3,
            num_return_sequences=2,
            max_new_tokens=6,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
            **GREEDY,
        )
        scores = forced(model, output.sequences, 6).sum(1)
    assert torch.allclose(output.sequences_scores, scores, atol=1e-4)


@torch.no_grad()
def test_sampling_draws_what_the_whole_cache_draws_when_it_fits(model):
    def drawn():
        torch.manual_seed(0)
        return model.generate(IDS, do_sample=True, max_new_tokens=8, num_return_sequences=2, pad_token_id=0)

    dense = drawn()
    with snapkv(model, keep=100):
        assert torch.equal(drawn(), dense)
    with snapkv(model):
        assert not torch.equal(drawn(), dense)
        assert torch.equal(drawn(), drawn())


@torch.no_grad()
def test_drafts_give_the_same_tokens_where_only_prompts_are_evicted(model):
    with snapkv(model):
        plain = model.generate(IDS[:1], max_new_tokens=12, **GREEDY)
        drafted = model.generate(IDS[:1], max_new_tokens=12, prompt_lookup_num_tokens=2, **GREEDY)
    assert torch.equal(drafted, plain)
    with sparity.cache(model, "h2o", 0.4), pytest.raises(InvalidInput, match="generate without drafts"):
        model.generate(IDS[:1], max_new_tokens=12, prompt_lookup_num_tokens=2, **GREEDY)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["snapkv", "adakv", "knorm"])
def test_tokens_that_are_taken_back_were_never_there(model, policy):
    options = {"window": 4} if policy != "knorm" else {}
    with sparity.cache(model, policy, 0.4, sinks=2, recent=2, decode=False, **options):
        past = model(IDS).past_key_values
        expected = model(IDS[:, 5:6], past_key_values=copy.deepcopy(past)).logits
        model(IDS[:, :3], past_key_values=past)
        past.crop(-3)
        assert past.get_seq_length() == 30
        assert torch.equal(model(IDS[:, 5:6], past_key_values=past).logits, expected)
        with pytest.raises(InvalidInput, match="has evicted others since"):
            past.crop(-2)
        with pytest.raises(ValueError, match="as a negative number"):
            past.crop(2)


@torch.no_grad()
def test_rows_that_are_reordered_repeated_and_selected_go_on_as_themselves(model):
    token = torch.tensor([[5], [9]])
    with sparity.cache(model, "adakv", 0.4, window=4, sinks=2, recent=2):
        past = model(IDS).past_key_values
        expected = model(token, past_key_values=copy.deepcopy(past)).logits
        turned = copy.deepcopy(past)
        turned.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(model(token.flip(0), past_key_values=turned).logits, expected.flip(0))
        twice = copy.deepcopy(past)
        twice.batch_repeat_interleave(2)
        found = model(token.repeat_interleave(2, 0), past_key_values=twice).logits
        assert torch.allclose(found[::2], expected, atol=1e-5)
        assert torch.allclose(found[1::2], expected, atol=1e-5)
        one = copy.deepcopy(past)
        one.batch_select_indices(torch.tensor([1]))
        assert torch.allclose(model(token[1:], past_key_values=one).logits, expected[1:], atol=1e-5)


@torch.no_grad()
def test_chunked_prefill_holds_the_budget_and_a_chunk(model, monkeypatch):
    from sparity.dynamic.cache.layer import PolicyLayer

    most, read = [], PolicyLayer.read

    def spied(self, *arguments):
        most.append(int(self.store.lengths.max()))
        return read(self, *arguments)

    monkeypatch.setattr(PolicyLayer, "read", spied)
    long = IDS.repeat(1, 2)[:1]
    with snapkv(model, keep=12):
        model.generate(long, max_new_tokens=2, prefill_chunk_size=10, **GREEDY)
    assert max(most) == 12 + 10


@torch.no_grad()
def test_memory_is_freed_head_by_head(model):
    whole = model(IDS.repeat(1, 2)).past_key_values.layers[0]
    with sparity.cache(model, "adakv", 0.25, window=4, sinks=2, recent=2):
        past = model(IDS.repeat(1, 2)).past_key_values
    for layer in past.layers:
        lengths = layer.store.lengths.view(2, 2)
        assert lengths.sum(1).tolist() == [30, 30]  # two heads with 15 of 60 tokens on average
        rooms = int(layer.store.room.sum()) * (2 * 8 * 4 + 4)
        assert layer.nbytes == rooms
        assert rooms <= (60 + 4 * 16) * 68  # what is held, and room for 16 more of each
    assert whole.keys.nbytes + whole.values.nbytes == 4 * 60 * 64
    held = weakref.ref(past.layers[0].store.keys)
    with sparity.cache(model, "streaming_llm", 0.25):
        del past, layer
    gc.collect()
    assert held() is None


@torch.no_grad()
def test_a_large_cache_is_at_most_a_tenth_over_its_budget(model):
    from sparity.dynamic.cache.store import Store

    states = torch.zeros(1, 4, 16384, 64, dtype=torch.bfloat16)
    store = Store(states, states)
    store.keep([torch.arange(16384) < count for count in (1000, 8000, 4000, 3384)])
    nominal = 4 * 4096 * 64 * 2 * 2
    assert nominal < store.nbytes <= 1.1 * nominal
