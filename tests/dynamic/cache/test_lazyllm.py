"""LazyLLM: the published algorithm token by token, whole models against masks, and how often anything is computed."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lazyllm_dense import masked_logits, recording
from lazyllm_plain import Plain
from padded_rows import padded_and_alone

import sparity
from masked_dense import called, calls_of
from sparity.dynamic.cache.auxiliary import HIDDEN, Auxiliary
from sparity.dynamic.cache.reviving import Revival
from sparity.errors import InvalidInput, UnsupportedModel

NAME = "lazyllm"
FAMILIES = ("llama", "qwen3", "phi3", "opt", "gpt2", "gpt_neox")
SIZES = (24, 1, 1, 33, 1, 1)  # a prompt, decoding, a second turn, decoding
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IDS = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(1))
AT, SINKS, RECENT = (0.34, 0.67), 1, 2  # of three layers, before the second and before the third


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])  # three layers


def lazy(model, keep=0.25, name=NAME, **options):
    return sparity.cache(model, name, keep, **{"at": AT, "sinks": SINKS, "recent": RECENT, **options})


@torch.no_grad()
@settings(max_examples=8, deadline=None)
@given(
    keep=st.sampled_from([0.1, 0.25, 0.5, 9]),
    sizes=st.lists(st.sampled_from([1, 1, 1, 6, 20]), min_size=2, max_size=6),
    seed=st.integers(0, 9),
)
def test_logits_are_those_of_the_published_algorithm_which_computes_each_token_once_per_layer(keep, sizes, seed, model):
    calls, slots = calls_of((0,), 12, *sizes, seed=seed), Counter()
    plain = Plain(model, keep, AT, SINKS, RECENT)
    expected = [plain.call(call["input_ids"][0]) for call in calls]
    hooks = [
        block.mlp.register_forward_hook(lambda _, given, __, index=index: slots.update({index: given[0].shape[1]}))
        for index, block in enumerate(model.model.layers)
    ]
    with lazy(model, keep):
        past = sparity_cache(model, calls, expected)
    for hook in hooks:
        hook.remove()
    assert max(plain.computed.values()) == 1
    for index, layer in enumerate(past.layers):
        places = layer.store.segment(0, 0)[2].tolist()
        assert len({*places}) == len(places) == slots[index] <= plain.length
        assert {*places} == {*plain.cached[index]}
        waiting = layer.auxiliary.slots.buffers["places"][layer.auxiliary.slots.cut(0, 0)] if index else torch.empty(0)
        assert {*waiting.tolist()} == {*plain.auxiliary[index]}


def sparity_cache(model, calls, expected):
    """The cache after some calls, whose logits must be the expected ones."""
    past = None
    for call, logits in zip(calls, expected, strict=True):
        output = model(**call, past_key_values=past)
        past = output.past_key_values
        assert torch.allclose(output.logits[0, -1], logits, atol=1e-4)
    return past


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_call_is_dense_attention_under_the_mask(family, attention, family_models, monkeypatch):
    model = copy.deepcopy(family_models[family])
    model.set_attn_implementation(attention)
    for pads in ((0,), (0, 9)):
        calls = calls_of(pads, *SIZES)
        with recording(monkeypatch) as seen, lazy(model):
            found = called(model, calls)
        expected, end = masked_logits(model, calls, seen), 0
        assert sum(held.sum() for index, _, held, _ in seen if index == 2) > sum(SIZES) / 4  # some were revived
        for call, here in zip(calls, found, strict=True):
            end += call["input_ids"].shape[1]
            assert torch.allclose(here[:, -1], expected[:, end - 1], atol=1e-4)


@torch.no_grad()
def test_nothing_dropped_gives_the_bits_of_the_model(model):
    for pads in ((0, 0), (0, 9)):
        calls = calls_of(pads, *SIZES)
        dense = called(model, calls)
        for options in ({"keep": 1.0}, {"keep": sum(SIZES)}, {"sinks": 40, "recent": 40}):
            with lazy(model, **options):
                assert all(torch.equal(*pair) for pair in zip(called(model, calls), dense, strict=True))
        with lazy(model, name="lazyllm_static"):
            static = called(model, calls[:1])
        with lazy(model):  # a prompt loses what it loses without reviving
            assert torch.equal(called(model, calls[:1])[0], static[0])
    dense = model(IDS, use_cache=False).logits
    with lazy(model):  # a text that is scored without a cache is read whole
        assert torch.equal(model(IDS, use_cache=False).logits, dense)


@torch.no_grad()
def test_tokens_of_a_later_call_that_go_no_deeper_leave_with_the_states_with_which_they_went(model):
    states = {}
    with lazy(model):
        past = model(IDS).past_key_values
        hook = model.model.layers[0].register_forward_hook(lambda module, given, out: states.update(first=out))
        found = model(IDS.flip(1), past_key_values=past).logits
        hook.remove()
    early = model.lm_head(model.model.norm(states["first"]))
    for row in range(2):
        gone = [place - 30 for place in waiting(past.layers[1])[row] if place >= 30]
        assert len(gone) > 4
        assert torch.equal(found[row, gone], early[row, gone])


def waiting(layer):
    """Of each row the places of tokens that stopped before a layer."""
    slots = layer.auxiliary.slots
    return [slots.buffers["places"][slots.cut(row, 0)].tolist() for row in range(slots.rows)]


@torch.no_grad()
def test_a_padded_row_is_the_row_alone(model):
    with lazy(model):
        both, one = padded_and_alone(model, IDS, 13, max_new_tokens=9, **GREEDY)
    for index in (1, 2):
        together, single = both.past_key_values.layers[index], one.past_key_values.layers[index]
        assert sorted(place - 13 for place in waiting(together)[1]) == sorted(waiting(single)[0])
        held = together.store.segment(1, 0)[2], single.store.segment(0, 0)[2]
        assert sorted((held[0] - 13).tolist()) == sorted(held[1].tolist())


@torch.no_grad()
def test_copies_beams_and_turns_go_on_and_nothing_is_taken_back(model):
    with lazy(model, 1.0):
        dense = model.generate(IDS, num_beams=2, max_new_tokens=4, **GREEDY)
    assert torch.equal(dense, model.generate(IDS, num_beams=2, max_new_tokens=4, **GREEDY))
    with lazy(model):
        assert model.generate(IDS, num_beams=2, max_new_tokens=4, **GREEDY).shape == (2, 34)
        past = model(IDS).past_key_values
        layer = past.layers[1]
        assert layer.auxiliary.counts == [12, 12]
        assert layer.nbytes == layer.store.nbytes + layer.auxiliary.slots.nbytes
        again = copy.deepcopy(past)
        answers = [[model(IDS[:, :1], past_key_values=each).logits for _ in range(4)] for each in (past, again)]
        assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))
        past.reorder_cache(torch.tensor([1, 1]))
        found = model(IDS[1:, :1].expand(2, -1), past_key_values=past).logits
        assert torch.allclose(found[0], found[1], atol=1e-6)
        with pytest.raises(InvalidInput, match=f"the policy {NAME} has evicted others since"):
            past.crop(-1)
    with pytest.raises(InvalidInput, match="no longer attached"):
        model(IDS[:, :1], past_key_values=past)


@torch.no_grad()
def test_a_call_that_failed_leaves_nothing_in_the_model(model):
    def fail(*_):
        raise RuntimeError("stop")

    with lazy(model):
        past = model(IDS).past_key_values
        hook = model.model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(IDS[:, :1], past_key_values=past)
        hook.remove()
        found = model(IDS, use_cache=False).logits
    assert torch.equal(found, model(IDS, use_cache=False).logits)


def test_what_cannot_be_done_is_refused(model, family_models):
    for options, words in (
        ({"at": (0.5, 0.2)}, "in ascending order"),
        ({"store": "kivi"}, "says itself what each layer holds"),
        ({"read": "quest"}, "leave `store` and `read` out"),
        ({"keep": [0.5, 0.5, 0.5]}, "give `keep` as a number"),
        ({"decode": False}, "chooses anew at every call: leave `every` and `decode` out"),
        ({"every": 4}, "chooses anew at every call"),
    ):
        with pytest.raises(InvalidInput, match=words), lazy(model, **options):
            pass
    with pytest.raises(UnsupportedModel, match="has a sliding window"), lazy(family_models["gemma2"]):
        pass


@torch.no_grad()
def test_masks_that_later_tokens_would_not_heed_are_refused(model):
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, -3:] = 0
    with lazy(model), pytest.raises(InvalidInput, match="padding on the right"):
        model(IDS, attention_mask=mask)
    square = torch.ones(30, 30, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    for odd in (square, torch.zeros(2, 1, 30, 30).masked_fill(~square, torch.finfo(torch.float32).min)):
        with lazy(model):
            whole = model(IDS, attention_mask=odd).logits
            assert torch.allclose(whole[:, -1], model(IDS).logits[:, -1], atol=1e-5)
        odd[1, 0, 20, 3] = 0 if odd.dtype == torch.bool else -1.0
        with lazy(model), pytest.raises(UnsupportedModel, match="says more than what is padding"):
            model(IDS, attention_mask=odd)
    mask = torch.ones(2, 31, dtype=torch.int64)
    mask[1, :4] = 0
    with lazy(model, recent=28):  # so that what was padding is chosen
        past = model(IDS, attention_mask=mask[:, :30]).past_key_values
        with pytest.raises(InvalidInput, match="shows tokens that it hid before"):
            model(IDS[:, :1], past_key_values=past, attention_mask=torch.ones_like(mask))


def test_an_aux_cache_by_hand():
    aux = Auxiliary()
    assert aux.wake(torch.ones(2, 5, dtype=torch.bool)) == [{}, {}]
    assert (aux.nbytes, aux.counts) == (0, [])
    states = {HIDDEN: torch.arange(12.0).view(2, 3, 2), "position_ids.0": torch.tensor([[4, 5, 6], [4, 5, 6]])}
    stopping = torch.tensor([[True, False, True], [False, True, False]])
    aux.stop(torch.tensor([[0, 1, 2], [0, 1, 2]]), stopping, states)
    assert aux.counts == [2, 1]
    first, second = aux.wake(torch.tensor([[False, True, True], [True, False, True]]))
    assert first["places"].tolist() == [2]
    assert first[HIDDEN].tolist() == [[4, 5]]
    assert first["position_ids.0"].tolist() == [6]
    assert second["places"].tolist() == []
    assert aux.counts == [1, 1]
    aux.select_rows(torch.tensor([1, 1, 0]))
    assert [each["places"].tolist() for each in aux.wake(torch.ones(3, 3, dtype=torch.bool))] == [[1], [1], [0]]
    with pytest.raises(UnsupportedModel, match=r"are given position_ids.0 of some tokens"):
        aux.stop(
            torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.bool), {HIDDEN: torch.ones(3, 1, 2)}
        )


def test_what_tokens_cannot_be_put_into_is_refused():
    revival = Revival(start=2)
    revival.choose(torch.tensor([[True, False, True]]), torch.ones(1, 3, dtype=torch.bool))
    hidden = torch.ones(1, 1, 4)
    given = {"position_ids": torch.tensor([[2]]), "attention_mask": torch.ones(1, 1, 1, 3), "scale": torch.ones(4)}
    states, others = revival.enter(hidden, given, Auxiliary())
    assert torch.equal(states, hidden)
    assert others["attention_mask"] is None
    assert others["position_ids"].tolist() == [[2]]
    assert others["scale"].tolist() == [1] * 4
    with pytest.raises(UnsupportedModel, match=r"are given bias \[2, 1, 3, 3\]"):
        revival.enter(hidden, {"bias": torch.ones(2, 1, 3, 3)}, Auxiliary())


@torch.no_grad()
def test_it_is_saved_with_a_model_and_revives_when_loaded(family_models, tmp_path):
    recipe = {"stages": [{"cache": {"policy": NAME, "keep": 0.2, "sinks": 1, "recent": 2}}], "measure": {"speed": None}}
    model, calls = family_models["llama"], calls_of((0,), *SIZES)
    loaded = sparity.load(sparity.run(recipe, model=model, output=tmp_path / "out", device="cpu").path)
    with lazy(model, 0.2, at=(0.3, 0.5, 0.7)):
        expected = called(model, calls)
    assert all(torch.equal(*pair) for pair in zip(called(loaded, calls), expected, strict=True))
