"""LazyLLM without reviving: which tokens go where, what is no longer computed, and whole models against masks."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from padded_rows import padded_and_alone
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import sparity
from masked_dense import called, calls_of, masked_logits, recording
from sparity.dynamic.cache.functions import policy_of
from sparity.dynamic.cache.prompt import Prompt
from sparity.errors import InvalidInput, UnsupportedModel

NAME = "lazyllm_static"
FAMILIES = ("llama", "qwen3", "phi3", "opt", "gpt2", "gpt_neox")
SIZES = (24, 1, 1, 33, 1)  # a prompt, decoding, a second turn, decoding
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IDS = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])  # three layers


def lazy(model, keep=0.25, **options):
    return sparity.cache(model, NAME, keep, **{"at": (0.34, 0.67), "sinks": 1, "recent": 2, **options})


def held(past):
    return [layer.store.lengths.tolist() for layer in past.layers]


def test_a_choice_by_hand():
    # one token asks, with two heads; its logits are the keys times 1 and times 0
    queries = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    keys = torch.tensor([0.0, 2.0, 1.0, 3.0, 0.0]).view(1, 1, 5, 1)
    found = sparity.select_cache(queries, keys, keys, policy=NAME, keep=3, scaling=1.0)
    assert found.tolist() == [[[False, True, False, True, True]]]  # the two it heeds most, and itself
    weights = (keys[0, 0, :, 0].softmax(0) + torch.full((5,), 0.2)) / 2
    scores = sparity.score_cache(queries, keys, keys, policy=NAME, scaling=1.0)[0, 0]
    assert torch.allclose(scores[:4], weights[:4])
    assert float(scores[4]) == float(scores[3])


def test_budgets_by_hand_fall_in_equal_steps_at_the_depths_that_were_given():
    policy = policy_of(NAME)
    assert [policy.budget(100, 0.25, layer, 10) for layer in range(10)] == [100] * 3 + [75] * 2 + [50] * 2 + [25] * 3
    assert [policy.budget(100, 40, layer, 10) for layer in (2, 3, 5, 7)] == [100, 80, 60, 40]
    assert [policy.budget(11, 0.1, layer, 10) for layer in (2, 3, 5, 7)] == [11, 7, 4, 1]  # 10 go: 4, 3, 3
    assert policy.budget(100, 0.25) == 25
    at_once = policy_of({NAME: {"at": (0.0,)}})
    assert [at_once.budget(8, 0.5, layer, 3) for layer in range(3)] == [8, 4, 4]  # the first layer is what is asked


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 400), keep=st.floats(0.01, 1), steps=st.integers(1, 5), least=st.integers(0, 30))
def test_a_longer_row_drops_no_fewer_tokens_at_any_step(tokens, keep, steps, least):
    policy = policy_of({NAME: {"at": tuple((1 + step) / 8 for step in range(steps))}})

    def dropped(length):
        left = [min(max(policy.budget(length, keep, layer, 8), least), length) for layer in range(8)]
        return [before - after for before, after in pairwise(left)]

    short, long = dropped(tokens), dropped(tokens + 1)
    assert all(0 <= a <= b for a, b in zip(short, long, strict=True))
    assert policy.budget(tokens, keep, 7, 8) == int(tokens * keep + 1e-9)


@torch.no_grad()
def test_what_goes_is_what_the_layer_before_says_and_later_layers_compute_the_rest(model):
    sizes, states, places = [], {}, []
    hooks = [
        block.self_attn.register_forward_pre_hook(
            lambda module, _, named: states.update({module.layer_idx: (module, named)}), with_kwargs=True
        )
        for block in model.model.layers
    ]
    hooks += [
        block.mlp.register_forward_hook(lambda module, given, out: sizes.append(given[0].shape[1]))
        for block in model.model.layers
    ]
    try:
        with lazy(model):
            past = model(IDS).past_key_values
    finally:
        for hook in hooks:
            hook.remove()
    assert sizes == [30, 18, 7]  # 23 go, 12 and 11
    assert past.get_seq_length() == 30
    for index, budget in ((0, 18), (1, 7)):
        module, named = states[index]
        hidden, (cosine, sine) = named["hidden_states"], named["position_embeddings"]
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        queries, keys, values = (
            each(hidden).view(shape).transpose(1, 2) for each in (module.q_proj, module.k_proj, module.v_proj)
        )
        turned = apply_rotary_pos_emb(queries, keys, cosine, sine)
        kept = sparity.select_cache(*turned, values, policy=NAME, keep=budget, sinks=1, recent=2)[:, 0]
        before = places[-1] if places else torch.arange(30).expand(2, -1)
        places.append(torch.stack([row[mask] for row, mask in zip(before, kept, strict=True)]))
        store = past.layers[index + 1].store
        for row in range(2):
            for head in range(store.heads):
                assert store.segment(row, head)[2].tolist() == places[-1][row].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompt_decoding_and_second_turn_are_dense_attention_under_a_mask(
    family, attention, family_models, monkeypatch
):
    model = copy.deepcopy(family_models[family])
    model.set_attn_implementation(attention)
    for pads in ((0, 0), (0, 9)):
        calls = calls_of(pads, *SIZES)
        with recording(monkeypatch) as seen, lazy(model):
            found = called(model, calls)
        expected = masked_logits(model, calls, seen)
        counts = [len(rows[1][0]) for _, rows in seen[: model.config.num_hidden_layers]]
        assert counts[0] == 24
        assert counts[-1] == (24 - pads[1]) // 4
        assert torch.allclose(found[0][:, -1], expected[0][:, -1], atol=1e-4)
        for here, there in zip(found[1:], expected[1:], strict=True):
            assert torch.allclose(here, there, atol=1e-4)


@torch.no_grad()
def test_nothing_dropped_gives_the_bits_of_the_model(model):
    for pads in ((0, 0), (0, 9)):
        calls = calls_of(pads, *SIZES)
        dense = called(model, calls)
        for keep in (1.0, 24):
            with lazy(model, keep):
                assert all(torch.equal(*pair) for pair in zip(called(model, calls), dense, strict=True))
        with lazy(model, sinks=20, recent=4):  # a short prompt is protected whole
            assert torch.equal(called(model, calls[:1])[0], dense[0])
    dense = model(IDS, use_cache=False).logits
    with lazy(model):  # a text that is scored without a cache is read whole
        assert torch.equal(model(IDS, use_cache=False).logits, dense)


@torch.no_grad()
def test_dropped_tokens_leave_with_the_states_with_which_they_went(model):
    states = {}
    hook = model.model.layers[0].register_forward_hook(lambda module, given, out: states.update(first=out))
    try:
        with lazy(model):
            output = model(IDS)
    finally:
        hook.remove()
    past, dense = output.past_key_values, model(IDS).logits
    early = model.lm_head(model.model.norm(states["first"]))
    for row in range(2):
        second, third = ({*past.layers[index].store.segment(2 * row // 2, 0)[2].tolist()} for index in (1, 2))
        gone = sorted({*range(30)} - second)
        assert torch.equal(output.logits[row, gone], early[row, gone])
        assert third < second
    assert output.logits.shape == dense.shape
    assert torch.equal(model(IDS).logits, dense)  # outside the context nothing is left


@torch.no_grad()
def test_a_padded_row_is_the_row_alone(model):
    with lazy(model):
        both, one = padded_and_alone(model, IDS, 13, max_new_tokens=6, **GREEDY)
    for index in (1, 2):
        store, single = both.past_key_values.layers[index].store, one.past_key_values.layers[index].store
        assert [place - 13 for place in store.segment(1, 0)[2].tolist()] == single.segment(0, 0)[2].tolist()


@torch.no_grad()
def test_beams_and_turns_go_on_and_what_is_gone_cannot_be_taken_back(model):
    with lazy(model, 1.0):
        dense = model.generate(IDS, num_beams=2, max_new_tokens=4, **GREEDY)
    assert torch.equal(dense, model.generate(IDS, num_beams=2, max_new_tokens=4, **GREEDY))
    with lazy(model):
        assert model.generate(IDS, num_beams=2, max_new_tokens=4, **GREEDY).shape == (2, 34)
        past = model(IDS).past_key_values
        assert held(past) == [[30] * 4, [18] * 4, [7] * 4]
        model(IDS, past_key_values=past)  # a later turn is read whole, and nothing of it goes
        assert held(past) == [[60] * 4, [48] * 4, [37] * 4]
        past.crop(-30)
        assert held(past) == [[30] * 4, [18] * 4, [7] * 4]
        with pytest.raises(InvalidInput, match=f"the policy {NAME} has evicted others since"):
            past.crop(-1)
        assert held(past) == [[30] * 4, [18] * 4, [7] * 4]  # no layer has lost more than another
    with pytest.raises(InvalidInput, match="no longer attached"):
        model(IDS[:, :1], past_key_values=past)


@torch.no_grad()
def test_a_call_that_failed_leaves_nothing_behind(model):
    def fail(*_):
        raise RuntimeError("stop")

    with lazy(model):
        hook = model.model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(IDS)
        hook.remove()
        past = DynamicCache()
        model(IDS[:, :20], past_key_values=past)
        assert held(past) == [[20] * 4, [12] * 4, [5] * 4]
        found = model(IDS, use_cache=False).logits
    assert torch.equal(found, model(IDS, use_cache=False).logits)


def test_gradients_flow_through_the_tokens_that_go_on(model):
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with lazy(model):
        output = model(inputs_embeds=embedded)
        output.logits[:, -1].sum().backward()
    assert bool((embedded.grad.abs().sum(-1) > 0).all())


def test_what_cannot_be_done_is_refused(model, family_models):
    for options, words in (
        ({"at": ()}, "one or more shares"),
        ({"at": (0.5, 0.2)}, "in ascending order"),
        ({"at": (0.5, 1.5)}, r"shares in \[0, 1\]"),
        ({"store": "kivi"}, "says itself what each layer holds"),
        ({"read": "quest"}, "leave `store` and `read` out"),
        ({"keep": [0.5, 0.5, 0.5]}, "give `keep` as a number"),
        ({"decode": True}, "cannot evict while decoding"),
    ):
        with pytest.raises(InvalidInput, match=words), lazy(model, **options):
            pass
    with pytest.raises(UnsupportedModel, match="has a sliding window"), lazy(family_models["gemma2"]):
        pass
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, -3:] = 0
    with lazy(model), pytest.raises(InvalidInput, match="padding on the right"):
        model(IDS, attention_mask=mask)


def test_what_tokens_cannot_be_taken_out_of_is_refused():
    prompt = Prompt()
    prompt.choose(torch.tensor([[True, False, True]]), torch.ones(1, 3, dtype=torch.bool))
    assert prompt.enter(torch.arange(6.0).view(1, 3, 2), {}, None)[0].tolist() == [[[0, 1], [4, 5]]]
    assert prompt.cut("position_ids", torch.tensor([[7, 8, 9]])).tolist() == [[7, 9]]
    assert prompt.cut("attention_mask", torch.arange(9).view(1, 1, 3, 3)).tolist() == [[[[0, 2], [6, 8]]]]
    assert prompt.cut("scale", torch.ones(4)).tolist() == [1] * 4
    with pytest.raises(UnsupportedModel, match=r"are given bias \[2, 3, 3\]"):
        prompt.cut("bias", torch.ones(2, 3, 3))


@torch.no_grad()
def test_it_is_saved_with_a_model_and_narrows_when_loaded(family_models, tmp_path):
    recipe = {"stages": [{"cache": {"policy": NAME, "keep": 0.2, "sinks": 1, "recent": 2}}], "measure": {"speed": None}}
    model = family_models["llama"]
    loaded = sparity.load(sparity.run(recipe, model=model, output=tmp_path / "out", device="cpu").path)
    with lazy(model, 0.2, at=(0.3, 0.5, 0.7)):
        expected = model(IDS)
    found = loaded(IDS)
    assert torch.equal(found.logits, expected.logits)
    assert held(found.past_key_values) == held(expected.past_key_values) == [[30] * 4, [14] * 4, [6] * 4]
