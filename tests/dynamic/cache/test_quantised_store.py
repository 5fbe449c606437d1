"""The quantised store: what it holds, in which bits, and what attention reads of it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparity
from masked_dense import called, calls_of, masked_logits, recording
from sparity.dynamic.cache.quantised_store import QuantisedStore
from sparity.dynamic.cache.store import Store
from sparity.errors import InvalidInput

KIVI = {"bits": 4, "group": 4, "residual": 8}
SIZES = (24, 10, 1, 1, 1, 5, 1)
IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def states(seed=0, tokens=20, rows=2, heads=2, width=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, tokens, width, generator=generator) for _ in range(2)]


def stored(tokens=20, bits=4, group=4, residual=6, mass=False, seed=0):
    keys, values = states(seed, tokens)
    store = QuantisedStore(keys, values, 0, mass, bits, group, residual)
    store.quantise(store.due(tokens), tokens)
    return store, keys, values


def rounded(x, bits, dim):
    """KIVI's formula along one dimension, written plainly."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return ((x - low) / torch.where(step > 0, step, 1)).round() * step + low


def read_of(keys, values, count, bits=4, group=4):
    """Keys and values `[tokens, width]` of one head whose first `count` tokens are quantised."""
    keys, values = keys.clone(), values.clone()
    for first in range(0, count, group):
        keys[first : first + group] = rounded(keys[first : first + group], bits, 0)
    for first in range(0, values.shape[-1], group):
        values[:count, first : first + group] = rounded(values[:count, first : first + group], bits, -1)
    return keys, values


def test_two_bits_by_hand():
    keys = torch.tensor([[0.0, 5.0], [3.0, 5.0], [1.4, 9.0], [7.0, 8.0], [2.0, 2.0]]).repeat(1, 2)[None, None]
    store = QuantisedStore(keys, keys, 0, False, 2, 2, 1)
    assert store.due(5).tolist() == [4]
    store.quantise(store.due(5), 5)
    found = store.segment(0, 0)
    # keys: tokens 0-1 and 2-3, channel by channel: 0..3 in steps of 1, 5 alone; 1.4..7 and 8..9
    expected = [[0.0, 5.0], [3.0, 5.0], [1.4, 9.0], [7.0, 8.0], [2.0, 2.0]]
    assert torch.allclose(found[0], torch.tensor(expected).repeat(1, 2))
    # values: each token's channels two by two, its least and its greatest are kept
    assert torch.allclose(found[1], torch.tensor(expected).repeat(1, 2))
    assert found[2].tolist() == [0, 1, 2, 3, 4]
    assert store.packed.buffers["keys"][:4].tolist() == [[0b00000000], [0b00110011], [0b11001100 & 0xFF], [0b00110011]]


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 40),
    residual=st.integers(0, 12),
    bits=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 5),
)
def test_whole_groups_are_quantised_by_the_formula_and_the_rest_is_as_it_was(tokens, residual, bits, seed):
    store, keys, values = stored(tokens, bits, residual=residual, seed=seed)
    count = max(tokens - residual, 0) // 4 * 4
    assert store.packed.lengths.tolist() == [count] * 4
    for row in range(2):
        for head in range(2):
            found = store.segment(row, head)
            expected = read_of(keys[row, head], values[row, head], count, bits)
            assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found[:2], expected, strict=True))
            assert torch.equal(found[0][count:], keys[row, head, count:])
            assert found[2].tolist() == list(range(tokens))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), data=st.data())
def test_what_stays_keeps_its_bits_through_evictions_rows_and_later_tokens(seed, data):
    store, *_ = stored(24, residual=4, mass=True, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    store.set_mass(0, torch.rand(2, 24, generator=generator))
    held = {(row, head): [x.clone() for x in store.segment(row, head)] for row in range(2) for head in range(2)}
    mass = {(row, head): store.mass_of(row, head).clone() for row in range(2) for head in range(2)}
    for step in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            order = torch.randint(0, 2, (2,), generator=generator)
            store.select_rows(order)
            held = {(row, head): held[int(order[row]), head] for row in range(2) for head in range(2)}
            mass = {(row, head): mass[int(order[row]), head] for row in range(2) for head in range(2)}
        masks = {each: torch.rand(len(x[2]), generator=generator) < 0.7 for each, x in held.items()}
        for each in masks:
            masks[each][-1] = True
        store.keep(list(masks.values()))
        held = {each: [part[masks[each]] for part in x] for each, x in held.items()}
        mass = {each: x[masks[each]] for each, x in mass.items()}
        new = states(seed + step, 1)
        store.append(*new, 24 + step)
        place = torch.tensor([24 + step], dtype=torch.int32)
        for row, head in held:
            parts = (new[0][row, head], new[1][row, head], place)
            held[row, head] = [torch.cat(pair) for pair in zip(held[row, head], parts, strict=True)]
            mass[row, head] = torch.cat([mass[row, head], torch.zeros(1)])
        for each, parts in held.items():
            assert all(torch.equal(*pair) for pair in zip(store.segment(*each), parts, strict=True))
            assert torch.equal(store.mass_of(*each), mass[each])
        assert torch.stack(
            [store.groups.buffers["count"][store.groups.cut(*each)].sum() for each in held]
        ).tolist() == [int((parts[2] < 20).sum()) for parts in held.values()]
        assert int(store.groups.buffers["count"][store.groups.all()].min()) > 0


def test_bytes_are_those_of_codes_steps_and_the_last_tokens():
    keys = torch.randn(1, 4, 4096, 64, dtype=torch.bfloat16)
    whole = Store(keys, keys).nbytes
    for bits, most in ((8, 0.62), (4, 0.36), (2, 0.24)):
        store = QuantisedStore(keys, keys, 0, False, bits, 32, 64)
        store.quantise(store.due(4096), 4096)
        assert store.nbytes == store.packed.nbytes + store.groups.nbytes + store.recent.nbytes
        assert store.nbytes < most * whole
    empty = [torch.zeros(int(count), dtype=torch.bool) for count in store.lengths]
    store.keep(empty)
    assert int(store.groups.lengths.sum()) == 0
    assert store.nbytes < 0.01 * whole


@pytest.mark.parametrize("pads", [(0,), (0, 7)])
@pytest.mark.parametrize("policy", ["kivi", "snapkv", "adakv"])
def test_attention_reads_what_the_formula_leaves(policy, pads, model, monkeypatch):
    calls = calls_of(pads, *SIZES)
    options = KIVI if policy == "kivi" else {"window": 12}  # the second piece is read, and nothing of it evicted

    def altered(row, held, new, keys, values):
        hidden = sum(place < pads[row] for place in held)
        count = max(len(held) - hidden - new - 8, 0) // 4 * 4
        found = read_of(keys[hidden:], values[hidden:], count)
        return [torch.cat([x[:hidden], y]) for x, y in zip((keys, values), found, strict=True)]

    store = None if policy == "kivi" else {"kivi": KIVI}
    with recording(monkeypatch) as seen, sparity.cache(model, policy, 0.7, store=store, sinks=2, recent=2, **options):
        found = called(model, calls)
    expected, dense = masked_logits(model, calls, seen, altered), called(model, calls)
    real = [call["attention_mask"][:, -call["input_ids"].shape[1] :].bool() for call in calls]
    for here, there, rows in zip(found, expected, real, strict=True):
        assert torch.allclose(here[rows], there[rows], atol=3e-5 * float(there.abs().max()))
    assert not torch.allclose(found[-1], dense[-1], atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", "opt", "qwen3"])
def test_the_last_tokens_that_cover_the_text_give_the_bits_of_the_whole_cache(family, family_models):
    model, calls = family_models[family], calls_of((0, 3), *SIZES)
    dense = called(model, calls)
    with sparity.cache(model, "kivi", group=4, residual=44):
        assert all(torch.equal(*pair) for pair in zip(called(model, calls), dense, strict=True))
    with sparity.cache(model, "kivi", **KIVI):
        assert not torch.equal(called(model, calls)[-1], dense[-1])


def test_a_padded_row_and_a_prompt_in_pieces_are_stored_alike(model):
    calls = calls_of((0, 7), *SIZES)
    with sparity.cache(model, "kivi", **KIVI):
        both = called(model, calls)
        alone = [{"input_ids": call["input_ids"][1:]} for call in calls]
        alone[0] = {"input_ids": calls[0]["input_ids"][1:, 7:]}
        for together, single in zip(both[1:], called(model, alone)[1:], strict=True):
            assert torch.allclose(together[1:], single, atol=3e-5 * float(single.abs().max()))
        with torch.no_grad():
            whole, pieces = model(IDS).past_key_values, model(IDS[:, :33]).past_key_values
            model(IDS[:, 33:], past_key_values=pieces)
            model(IDS[:, :1], past_key_values=pieces)  # what fell out of the last tokens is quantised before a call
    for one, other in zip(whole.layers[:1], pieces.layers[:1], strict=True):
        assert one.store.packed.lengths.tolist() == other.store.packed.lengths.tolist() == [32] * 4
        assert torch.allclose(one.store.segment(0, 0)[0], other.store.segment(0, 0)[0][:40], atol=1e-5)


@torch.no_grad()
def test_beams_drafts_and_tokens_that_are_taken_back(model):
    with sparity.cache(model, "kivi", **KIVI):
        output = model.generate(IDS, num_beams=3, max_new_tokens=12, return_dict_in_generate=True, **GREEDY)
        assert output.past_key_values.layers[0].store.packed.lengths.tolist() == [40] * 12
        past = model(IDS).past_key_values
        expected = model(IDS[:, 5:6], past_key_values=copy.deepcopy(past)).logits
        model(IDS[:, :5], past_key_values=past)
        past.crop(-5)
        assert torch.equal(model(IDS[:, 5:6], past_key_values=past).logits, expected)
        with pytest.raises(InvalidInput, match="has quantised others since"):
            past.crop(-2)
        drafted = model.generate(IDS[:1], max_new_tokens=12, prompt_lookup_num_tokens=2, **GREEDY)
        assert drafted.shape == (1, 52)


@torch.no_grad()
@pytest.mark.parametrize("read", [None, {"quest": {"page": 4, "pages": 1, "dense": 0}}])
def test_inference_mode_may_begin_and_end_a_cache(read, model):
    with sparity.cache(model, "h2o", 0.6, store={"kivi": KIVI}, read=read, sinks=2, recent=2):
        with torch.inference_mode():
            past = model(IDS).past_key_values
        outside = [model(IDS[:, place : place + 1], past_key_values=past).logits for place in range(6)]
        past = model(IDS).past_key_values
        for place, logits in enumerate(outside):
            assert torch.equal(model(IDS[:, place : place + 1], past_key_values=past).logits, logits)
    assert int(past.layers[0].store.packed.lengths.min()) > 0


def test_options_that_do_not_fit_are_refused(model):
    for options, words in (
        ({"bits": 3}, "must be 2, 4 or 8"),
        ({"group": 0}, "must be 1 or more"),
        ({"residual": -1}, "must be 0 or more"),
        ({"store": "kivi"}, "leave `store` out"),
    ):
        with pytest.raises(InvalidInput, match=words), sparity.cache(model, "kivi", **options):
            pass
    with pytest.raises(InvalidInput, match='store "snapkv" is none'), sparity.cache(model, "h2o", store="snapkv"):
        pass
    with sparity.cache(model, "kivi", group=3), pytest.raises(InvalidInput, match="as a divisor of 8"):
        model(IDS)
    with sparity.cache(model, "kivi", **KIVI):
        past = model(IDS).past_key_values
    with pytest.raises(InvalidInput, match="evicted, quantised or merged, and the policy is no longer attached"):
        model(IDS[:, :1], past_key_values=past)
    mask = torch.ones_like(IDS)
    mask[0, 35:] = 0
    with sparity.cache(model, "kivi", **KIVI), pytest.raises(InvalidInput, match="padding on the right"):
        model(IDS, attention_mask=mask)
