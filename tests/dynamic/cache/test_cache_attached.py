"""A policy put on a model and taken off: what stays as it was, what it takes, and what is refused."""

import copy

import pytest
import torch
from transformers import BloomConfig, StaticCache

import sparity
from families import build, tiny_configs
from masked_dense import calls_of
from sparity.errors import InvalidInput, UnsupportedModel

IDS = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(1))
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def snapkv(model, keep=0.4, **options):
    return sparity.cache(model, "snapkv", keep, **{"window": 4, "sinks": 2, "recent": 2, **options})


@torch.no_grad()
def test_the_model_is_what_it_was_afterwards(model):
    before, state = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = model.generate(IDS, max_new_tokens=5, **GREEDY)
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    with snapkv(model):
        model.generate(IDS, max_new_tokens=5, **GREEDY)
    with pytest.raises(RuntimeError, match="stop"), snapkv(model):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == before
    assert sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()) == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.generate(IDS, max_new_tokens=5, **GREEDY), dense)


@torch.no_grad()
def test_a_cache_with_gaps_is_of_use_only_where_attention_knows_it(model):
    with snapkv(model):
        past = model(IDS).past_key_values
    with pytest.raises(InvalidInput, match="use it within sparity"):
        model(IDS[:, :1], past_key_values=past)
    with snapkv(model), pytest.raises(InvalidInput, match="filled under another policy"):
        model(IDS[:, :1], past_key_values=past)
    with snapkv(model, keep=50):
        past = model(IDS).past_key_values
    dense = model(IDS).past_key_values
    token = IDS[:, :1]  # nothing is missing: an ordinary cache
    assert torch.equal(model(token, past_key_values=past).logits, model(token, past_key_values=dense).logits)


@torch.no_grad()
def test_a_cache_that_was_filled_before_is_taken_over(model):
    past = model(IDS[:, :20]).past_key_values
    with snapkv(model, keep=10):
        model(IDS[:, 20:], past_key_values=past)
    assert past.layers[0].store.lengths.tolist() == [10] * 4


@torch.no_grad()
def test_without_a_cache_nothing_is_evicted(model):
    dense = model(IDS, use_cache=False).logits
    with snapkv(model):
        output = model(IDS, use_cache=False)
    assert torch.equal(output.logits, dense)
    assert output.past_key_values is None


def test_gradients_of_one_call_are_those_of_the_model(model):
    def gradient():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    dense = gradient()
    with snapkv(model):
        assert torch.equal(gradient(), dense)


@torch.no_grad()
def test_inference_mode_may_begin_and_end_a_cache(model):
    with snapkv(model):
        with torch.inference_mode():
            past = model(IDS).past_key_values
        outside = model(IDS[:, :1], past_key_values=past).logits
        again = model(IDS).past_key_values
        assert torch.equal(model(IDS[:, :1], past_key_values=again).logits, outside)


@torch.no_grad()
def test_padding_on_the_right_is_refused_where_it_matters(model):
    mask = torch.ones_like(IDS)
    mask[0, 25:] = 0
    with snapkv(model), pytest.raises(InvalidInput, match=r"padding on the right.*pad on the left"):
        model(IDS, attention_mask=mask)


def test_other_caches_are_refused(model):
    with snapkv(model), torch.no_grad():
        with pytest.raises(InvalidInput, match="not in a StaticCache: leave `cache_implementation` out"):
            model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=64))
        with pytest.raises(InvalidInput, match="not in a StaticCache"):
            model.generate(IDS, max_new_tokens=2, cache_implementation="static", **GREEDY)


def test_requests_that_cannot_be_met_are_refused(model):
    for arguments, options, words in (
        (("snapkv", 0.0), {}, "must be a share"),
        (("snapkv", 2.5), {}, "must be a share"),
        (("snapkv", True), {}, "must be a share"),
        (("snapkv", 20), {}, "is to keep 20 tokens, and 36 always stay"),
        (("h2o", 10), {"recent": 10}, "is to keep 10 tokens, and 14 always stay"),
        (("snapkv", 0.5), {"decode": True}, "cannot evict while decoding"),
        (("snapkv", 0.5), {"sinks": -1}, "sinks -1 must be a whole number, 0 or more"),
        (("snapkv", 0.5), {"every": 0}, "every 0 must be a whole number, 1 or more"),
        (("snapkv", 0.5), {"windows": 3}, 'policy "snapkv" has no option "windows"'),
        (("snpkv", 0.5), {}, 'no policy "snpkv"; did you mean "snapkv"'),
        (({"snapkv": {}}, 0.5), {"window": 3}, "not both"),
        (({"h2o": {"mean": True}}, 0.5), {}, "a run keeps sums"),
    ):
        with pytest.raises(InvalidInput, match=words), sparity.cache(model, *arguments, **options):
            pass
    assert model.config._attn_implementation == "sdpa"
    with snapkv(model), pytest.raises(InvalidInput, match="a policy is at work in this model already"), snapkv(model):
        pass


def test_models_without_a_cache_of_the_whole_text_or_without_the_interface_are_refused(family_models):
    bloom = build(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    for refused, words in (
        (family_models["mistral"], 'no layer of this "mistral" sees the whole text'),
        (bloom, 'attention of "bloom" does not go through transformers\' interface'),
    ):
        with pytest.raises(UnsupportedModel, match=words), snapkv(refused):
            pass


@torch.no_grad()
def test_eviction_while_decoding_may_wait_for_several_tokens(model):
    sizes = []
    with sparity.cache(model, "streaming_llm", 12, sinks=2, recent=2, every=4):
        past = model(IDS).past_key_values
        for place in range(9):
            model(IDS[:, place : place + 1], past_key_values=past)
            sizes.append(int(past.layers[0].store.lengths[0]))
    assert sizes == [13, 14, 15, 12, 13, 14, 15, 12, 13]
    assert past.layers[0].store.segment(0, 0)[2].tolist()[:4] == [0, 1, 2, 3]  # the policy's own four sinks


@torch.no_grad()
def test_layers_with_a_sliding_window_keep_their_own_cache(family_models):
    with snapkv(family_models["gemma2"]):
        past = family_models["gemma2"](IDS).past_key_values
    assert [type(layer).__name__ for layer in past.layers] == [
        "DynamicSlidingWindowLayer",
        "PolicyLayer",
        "DynamicSlidingWindowLayer",
    ]
    assert past.layers[1].store.lengths.tolist() == [12] * 4


@torch.no_grad()
def test_eager_attention_and_embeddings_as_inputs(family_models):
    model = build(tiny_configs()["llama"])
    model.set_attn_implementation("eager")
    calls = calls_of((0, 4), 30, 1)
    dense = model(**calls[0])
    with snapkv(model):
        past = model(**calls[0]).past_key_values
        found = model(**calls[1], past_key_values=past).logits
        embeddings = model.get_input_embeddings()(calls[0]["input_ids"])
        again = model(inputs_embeds=embeddings, attention_mask=calls[0]["attention_mask"],
                      position_ids=calls[0]["position_ids"])  # fmt: skip
        assert torch.equal(again.logits, dense.logits)
    model.set_attn_implementation("sdpa")
    with snapkv(model):
        past = model(**calls[0]).past_key_values
        assert torch.allclose(model(**calls[1], past_key_values=past).logits, found, atol=1e-5)


@torch.no_grad()
def test_the_base_model_alone_takes_a_policy_too(model):
    base = model.model
    with snapkv(base):
        past = base(IDS).past_key_values
    assert past.layers[0].store.lengths.tolist() == [12] * 4


@torch.no_grad()
def test_on_the_engine_a_policy_runs_through_the_models_own_code():
    model = sparity.load("zoo:llama", dtype="bfloat16")
    ids = torch.arange(1, 91)[None]
    with snapkv(model, keep=0.5):
        plain = model.generate(ids, min_new_tokens=6, max_new_tokens=6, **GREEDY)
    with sparity.attached(model, form="bitmask"), snapkv(model, keep=0.5):
        output = model.generate(ids, min_new_tokens=6, max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
    assert output.past_key_values.layers[0].store.lengths.tolist() == [45 + 5] * 3
    assert output.sequences.shape == plain.shape
