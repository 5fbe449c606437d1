"""MiniCache in whole models: generation, padding, memory, what is refused, and what is saved."""

import copy

import pytest
import torch

import sparity
from masked_dense import called, calls_of
from merged_layers import ENDS, IDS, minicache
from sparity.dynamic.cache.functions import policy_of
from sparity.dynamic.cache.merged_store import MergedStore
from sparity.errors import InvalidInput, UnsupportedModel
from sparity.quality.recall import bytes_of

SIZES = (20, 1, 33, 1, 3, 1)  # a prompt, a decoded token, a second prompt, decoding and a short turn
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


@pytest.mark.parametrize("options", [{"retain": 1.0}, {"recent": 99}, {"sinks": 99}])
def test_tokens_that_all_stay_give_the_bits_of_the_whole_cache(options, family_models):
    for family in ("llama", "gpt2"):
        model, calls = family_models[family], calls_of((0, 5), *SIZES)
        with minicache(model, **options):
            found = called(model, calls)
        assert all(torch.equal(*pair) for pair in zip(found, called(model, calls), strict=True))


def test_a_padded_row_and_a_row_alone_are_merged_alike(model):
    calls = calls_of((0, 7), *SIZES)
    alone = [{"input_ids": call["input_ids"][1:]} for call in calls]
    alone[0] = {"input_ids": calls[0]["input_ids"][1:, 7:]}
    with minicache(model):
        both, single = called(model, calls), called(model, alone)
    for together, own in zip(both[1:], single[1:], strict=True):
        assert torch.allclose(together[1:], own, atol=3e-5 * float(own.abs().max()))


@torch.no_grad()
def test_memory_is_freed_and_counted_once(model):
    with sparity.cache(model, "keep_all"):
        whole = model(IDS.repeat(1, 10)).past_key_values
    with minicache(model, retain=0.0):
        past = model(IDS.repeat(1, 10)).past_key_values
    kept = sum(layer.nbytes for layer in past.layers)
    assert kept == bytes_of(past)
    heads, middle = 4, 400 - 6
    room = 6 + 16  # the ends, and room
    pair = heads * (middle * (2 * 8 * 4 + 4 + 4 * 4) + 2 * room * (2 * 8 * 4 + 4))
    assert past.layers[1].nbytes + past.layers[2].nbytes == pair
    assert past.layers[0].nbytes == whole.layers[0].nbytes
    assert kept < 0.76 * bytes_of(whole)
    storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for layer in past.layers[1:]
                for slots in (layer.store.plain, layer.store.norms, layer.store.directions)
                for buffer in slots.buffers.values()}  # fmt: skip
    assert sum(storages.values()) == pair


@torch.no_grad()
def test_beams_rows_copies_and_tokens_that_are_taken_back(model):
    with minicache(model):
        past = model(IDS).past_key_values
        token = torch.tensor([[5], [9]])
        expected = model(token, past_key_values=copy.deepcopy(past)).logits
        turned = copy.deepcopy(past)
        turned.reorder_cache(torch.tensor([1, 0]))
        assert turned.layers[1].store.directions is turned.layers[2].store.directions
        assert turned.layers[1].store.directions is not past.layers[1].store.directions
        assert torch.equal(model(token.flip(0), past_key_values=turned).logits, expected.flip(0))
        twice = copy.deepcopy(past)
        twice.batch_repeat_interleave(2)
        found = model(token.repeat_interleave(2, 0), past_key_values=twice).logits
        assert torch.allclose(found[::2], expected, atol=1e-5)
        one = copy.deepcopy(past)
        one.batch_select_indices(torch.tensor([1]))
        assert torch.allclose(model(token[1:], past_key_values=one).logits, expected[1:], atol=1e-5)
        model(IDS[:, :3], past_key_values=past)
        past.crop(-3)
        assert torch.equal(model(token, past_key_values=past).logits, expected)
        with pytest.raises(InvalidInput, match="has merged others since"):
            past.crop(-2)
        assert [layer.length for layer in past.layers] == [41] * 3  # also of layers that are not merged
        before = past.layers[1].store.norms.lengths
        model(IDS[:, :35], past_key_values=past)  # the next prompt merges what was not judged yet
        assert past.layers[1].store.settled == past.layers[2].store.settled == 76
        assert bool((past.layers[1].store.norms.lengths > before).all())


@torch.no_grad()
def test_generation_with_beams_and_drafts(model):
    with minicache(model):
        output = model.generate(IDS, num_beams=3, max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
        layers = output.past_key_values.layers
        assert layers[1].store.directions is layers[2].store.directions
        assert layers[1].store.rows == 6
        plain = model.generate(IDS[:1], max_new_tokens=12, **GREEDY)
        drafted = model.generate(IDS[:1], max_new_tokens=12, prompt_lookup_num_tokens=2, **GREEDY)
        assert torch.equal(drafted, plain)
        pieces = model.generate(IDS[:1].repeat(1, 2), max_new_tokens=4, prefill_chunk_size=36, **GREEDY)
        assert pieces.shape == (1, 84)


@torch.no_grad()
def test_inference_mode_and_bfloat16(model):
    with minicache(model):
        with torch.inference_mode():
            past = model(IDS).past_key_values
        outside = model(IDS[:, :35], past_key_values=past).logits
        past = model(IDS).past_key_values
        assert torch.equal(model(IDS[:, :35], past_key_values=past).logits, outside)
    half = copy.deepcopy(model).bfloat16()
    with minicache(half):
        past = half(IDS).past_key_values
        assert past.layers[1].store.directions.buffers["keys"].dtype == torch.bfloat16
        assert past.layers[1].store.norms.buffers["keys"].dtype == torch.float32
        logits = half(IDS[:, :1], past_key_values=past).logits
    assert logits.dtype == torch.bfloat16


@torch.no_grad()
def test_compiled_attention_and_pytorch_read_the_same(model, monkeypatch):
    from sparity.dynamic.cache import attention

    with minicache(model):
        past = model(IDS).past_key_values
        here = model(IDS[:, :2], past_key_values=copy.deepcopy(past)).logits
        monkeypatch.setattr(attention, "attend_in_place", lambda *_, **__: None)
        there = model(IDS[:, :2], past_key_values=past).logits
    assert torch.allclose(here, there, atol=1e-5)


def test_what_cannot_be_merged_is_refused(model, family_models):
    for options, words in (
        ({"retain": 1.5}, r'option "retain": 1.5 must lie in \[0, 1\]'),
        ({"interpolation": -0.1}, r"must lie in \[0, 1\]"),
        ({"start": 2}, r"must lie in \[0, 1\]"),
        ({"store": "kivi"}, "minicache says how tokens are stored and reads all: leave `store` and `read` out"),
        ({"read": "quest"}, "leave `store` and `read` out"),
        ({"decode": True}, "cannot evict while decoding: leave `decode` out"),
    ):
        with pytest.raises(InvalidInput, match=words), minicache(model, **options):
            pass
    no_two = "no two neighbours see the whole text: lower `start`"
    with pytest.raises(UnsupportedModel, match=no_two), minicache(model, start=1):
        pass
    with (
        pytest.raises(UnsupportedModel, match="from layer 1 of 3 on no two neighbours"),
        minicache(family_models["gemma2"]),
    ):
        pass
    mask = torch.ones_like(IDS)
    mask[0, 35:] = 0
    with minicache(model), pytest.raises(InvalidInput, match="padding on the right"):
        model(IDS, attention_mask=mask)
    with minicache(model), torch.no_grad():
        past = model(IDS).past_key_values
    with pytest.raises(InvalidInput, match="evicted, quantised or merged, and the policy is no longer attached"):
        model(IDS[:, :1], past_key_values=past)
    assert [layer.length for layer in past.layers] == [40] * 3
    store = past.layers[1].store
    masks = [torch.ones(int(count), dtype=torch.bool) for count in store.lengths]
    with pytest.raises(InvalidInput, match="none goes for one of them"):
        store.keep(masks)
    with pytest.raises(InvalidInput, match="no other policy chooses"):
        store.set_mass(0, masks)


def test_pairs_skip_layers_that_see_a_window():
    pairs = policy_of({"minicache": {"start": 0.0}}).pairs
    assert pairs([True] * 5) == {1: 0, 3: 2}
    assert pairs([False, True, True, False, True, True]) == {2: 1, 5: 4}
    assert policy_of("minicache").pairs([True] * 30) == {16 + 2 * i: 15 + 2 * i for i in range(7)}


@torch.no_grad()
def test_it_is_saved_with_a_model_and_merges_when_loaded(family_models, tmp_path):
    recipe = {"stages": [{"cache": {"policy": {"minicache": {"retain": 0.3}}, **ENDS}}], "measure": {"speed": None}}
    model = family_models["llama"]
    loaded = sparity.load(sparity.run(recipe, model=model, output=tmp_path / "out", device="cpu").path)
    past = loaded(IDS).past_key_values
    assert [isinstance(layer.store, MergedStore) for layer in past.layers] == [False, True, True]
    with minicache(model):
        expected = model(IDS).past_key_values
        assert torch.equal(
            model(IDS[:, :1], past_key_values=expected).logits, loaded(IDS[:, :1], past_key_values=past).logits
        )
    assert bytes_of(past) == bytes_of(expected)
    with pytest.raises(UnsupportedModel, match="no two neighbours"):
        sparity.run(recipe, model=family_models["gemma2"], output=tmp_path / "none", device="cpu")


def test_a_plan_says_what_is_merged():
    from sparity.dynamic.cache.stage import CacheStage

    stage = CacheStage.model_validate({"policy": "minicache"})
    assert (stage.words, stage.how) == ("minicache, layers merged two by two behind the first 50 %", "minicache")
