"""MiniCache: what two layers share, in NumPy's words, in bytes and in whole models."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masked_dense import called, calls_of
from merged_layers import between, dense_calls, merged, minicache
from sparity.dynamic.cache.functions import policy_of
from sparity.dynamic.cache.joining import join, open_to
from sparity.dynamic.cache.merged_store import MergedStore
from sparity.dynamic.cache.slerp import angles, slerp
from sparity.dynamic.cache.store import Store
from sparity.errors import UnsupportedModel

SIZES = (20, 1, 33, 1, 3, 1)  # a prompt, a decoded token, a second prompt, decoding and a short turn
FAMILIES = ("llama", "qwen3", "phi3", "opt", "gpt2", "gpt_neox")
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def states(seed, tokens=24, rows=2, heads=2, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, tokens, width, generator=generator).to(dtype) for _ in range(4)]


def joined(given, policy, real=None, protected=(0, 0)):
    """Both layers' stores of keys and values `given`, merged."""
    stores = Store(*given[:2]), Store(*given[2:])
    real = torch.ones(given[0].shape[0], given[0].shape[2], dtype=torch.bool) if real is None else real
    return join(*stores, policy, open_to(stores[0], real, protected), protected[1])


def test_a_right_angle_by_hand():
    given = [torch.tensor(x)[None, None] for x in ([[3.0, 0.0]], [[0.0, 1.0]], [[0.0, 5.0]], [[2.0, 0.0]])]
    first, second = joined(given, policy_of({"minicache": {"interpolation": 1 / 3}}))
    root = math.sqrt(3) / 2  # the direction lies 30 degrees from the earlier layer's
    assert torch.allclose(first.segment(0, 0)[0], torch.tensor([[3 * root, 1.5]]))
    assert torch.allclose(second.segment(0, 0)[0], torch.tensor([[5 * root, 2.5]]))
    assert torch.allclose(first.segment(0, 0)[1], torch.tensor([[0.5, root]]))
    assert torch.allclose(second.segment(0, 0)[1], torch.tensor([[1.0, 2 * root]]))
    assert first.directions is second.directions


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1), angle=st.floats(1e-6, 3.1))
def test_directions_are_those_of_the_formula_at_any_angle(seed, share, angle):
    generator = np.random.default_rng(seed)
    first, other = generator.normal(size=(2, 6))
    other -= first * (first @ other) / (first @ first)
    second = math.cos(angle) * first / np.linalg.norm(first) + math.sin(angle) * other / np.linalg.norm(other)
    pair = torch.tensor(first).float(), 7 * torch.tensor(second).float()
    assert float(angles(*pair)) == pytest.approx(angle, rel=1e-4, abs=1e-6)
    expected = between(first, second, share)[1]
    assert np.allclose(slerp(*pair, share).numpy(), expected, atol=2e-5)


def test_equal_opposite_and_zero_vectors():
    one, zero = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    assert torch.allclose(slerp(one, 2 * one, 0.6), one / 5)
    assert torch.allclose(slerp(zero, one, 0.6), one / 5)
    assert torch.equal(slerp(zero, zero, 0.6), zero)
    policy = policy_of("minicache")
    assert policy.distinct(one, -2 * one).tolist() == [True]  # no direction lies between
    assert policy.distinct(one.repeat(3, 1), one.repeat(3, 1)).tolist() == [False] * 3
    assert policy.distinct(one[:0], one[:0]).tolist() == []


def test_the_upper_part_of_the_range_of_angles_stays():
    turns = torch.tensor([0.1, 0.2, 0.85, 0.86, 1.0])  # radians; range 0.9
    first = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
    second = torch.stack([turns.cos(), turns.sin()], 1)
    for retain, expected in ((0.0, "-----"), (0.05, "----x"), (0.16, "---xx"), (0.5, "--xxx"), (0.95, "-xxxx")):
        found = policy_of({"minicache": {"retain": retain}}).distinct(first, second)
        assert "".join("x" if each else "-" for each in found) == expected


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    retain=st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.9]),  # no bound within float32's rounding of an angle
    share=st.floats(0, 1),
    pad=st.integers(0, 6),
    ends=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_what_is_read_is_the_numpy_reference(seed, retain, share, pad, ends):
    given = states(seed)
    real = torch.stack([torch.arange(24) >= 0, torch.arange(24) >= pad])
    policy = policy_of({"minicache": {"retain": retain, "interpolation": share}})
    stores = joined(given, policy, real, ends)
    for row in range(2):
        candidates = range((pad if row else 0) + ends[0], 24 - ends[1])
        for head in range(2):
            arrays = [x[row, head].double().numpy() for x in given]
            expected, gone = merged(arrays[:2], arrays[2:], candidates, retain, share)
            for store, own in zip(stores, expected, strict=True):
                keys, values, places = store.segment(row, head)
                assert places.tolist() == list(range(24))
                assert np.allclose(keys.numpy(), own[0], atol=2e-5)
                assert np.allclose(values.numpy(), own[1], atol=2e-5)
                assert sorted(store.restored(store.norms.cut(row, head))[2].tolist()) == gone
                untouched = [place for place in range(24) if place not in gone]
                assert torch.equal(keys[untouched], torch.tensor(arrays[0 if store.earlier else 2]).float()[untouched])


def test_bytes_are_one_direction_four_norms_and_what_stays():
    given = states(0, 4096, 1, 4, 64, torch.bfloat16)
    whole = sum(Store(*pair).nbytes for pair in (given[:2], given[2:]))
    first, second = joined(given, policy_of({"minicache": {"retain": 0.0}}))
    count = 4 * 4096
    assert first.directions.nbytes == count * (2 * 64 * 2 + 4)
    assert first.norms.nbytes == second.norms.nbytes == count * 2 * 4
    assert first.nbytes + second.nbytes == first.directions.nbytes + 2 * count * 8 + 2 * first.plain.nbytes
    assert first.plain.nbytes == 4 * 16 * (2 * 64 * 2 + 4)  # room for tokens to come
    assert first.nbytes + second.nbytes < 0.54 * whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pads", [(0,), (0, 5)])
def test_calls_read_what_the_reference_leaves(family, pads, family_models):
    model, calls = family_models[family], calls_of(pads, *SIZES)
    with minicache(model):
        found = called(model, calls)
    expected, dense = dense_calls(model, calls, [(1, 2)], 0.3, 2, 4, pads), called(model, calls)
    assert torch.equal(found[0], dense[0])  # a prompt is read before it is merged
    for number, (here, there, call) in enumerate(zip(found, expected, calls, strict=True)):
        rows = call["attention_mask"][:, -call["input_ids"].shape[1] :].bool()
        assert torch.allclose(here[rows], there[rows], atol=3e-5 * float(there.abs().max()))
        assert number == 0 or not torch.allclose(here[rows], dense[number][rows], atol=1e-3)


@pytest.mark.parametrize("start", [0.0, 0.34])
def test_other_pairs_are_merged_from_another_start(start, model):
    calls = calls_of((0, 0), *SIZES)
    with minicache(model, start=start), torch.no_grad():
        past = model(**calls[0]).past_key_values
        found = called(model, calls)
    pair = (int(3 * start), int(3 * start) + 1)
    assert [isinstance(layer.store, MergedStore) for layer in past.layers] == [index in pair for index in range(3)]
    for here, there in zip(found, dense_calls(model, calls, [pair], 0.3, 2, 4, (0, 0)), strict=True):
        assert torch.allclose(here, there, atol=3e-5 * float(there.abs().max()))


def test_layers_whose_heads_differ_are_refused():
    given = states(0)
    with pytest.raises(UnsupportedModel, match=r"are \[2, 8, 8\] and \[1, 8, 8\]"):
        joined([*given[:2], *(x[:, :1] for x in given[2:])], policy_of("minicache"))
