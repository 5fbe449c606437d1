"""The paged store and what Quest reads of it, alone and with evictions and quantisation."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparity
from masked_dense import called, calls_of
from sparity.dynamic.cache.attention import attend
from sparity.dynamic.cache.functions import policy_of
from sparity.dynamic.cache.in_place import pages_of
from sparity.dynamic.cache.pages import PagedStore
from sparity.dynamic.cache.quantised_store import QuantisedStore
from sparity.dynamic.cache.reading import pages_read
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.store import Store
from sparity.engine.kernels.attention.cpu import Chosen
from sparity.errors import InvalidInput

SIZES = (24, 10, 1, 1, 1, 5, 1)
IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
QUEST = {"quest": {"page": 4, "pages": 1, "dense": 0}}
KIVI = {"kivi": {"bits": 8, "group": 4, "residual": 4}}
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def states(seed, tokens, rows=2, heads=2, width=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, tokens, width, generator=generator) for _ in range(2)]


def check_facts(store, page):
    """Least, greatest and mean of every page are those of the keys that it holds."""
    for row in range(store.rows):
        for head in range(store.heads):
            keys = store.segment(row, head)[0]
            pages = [keys[first : first + page] for first in range(0, len(keys), page)]
            low, high, mean = store.facts(row, head)
            assert torch.equal(low, torch.stack([part.amin(0) for part in pages]))
            assert torch.equal(high, torch.stack([part.amax(0) for part in pages]))
            assert torch.allclose(mean, torch.stack([part.mean(0) for part in pages]), atol=1e-6)
            assert store.ends(row, head).tolist() == [
                min(end, len(keys)) for end in range(page, len(keys) + page, page)
            ]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), page=st.integers(1, 6), tokens=st.integers(1, 20), data=st.data())
def test_pages_know_what_they_hold_after_anything(seed, page, tokens, data):
    keys, values = states(seed, tokens)
    store, plain = PagedStore(keys, values, 0, False, page), Store(keys, values)
    check_facts(store, page)
    for step in range(data.draw(st.integers(1, 4))):
        new = states(seed + step, data.draw(st.integers(1, 9)))
        for each in (store, plain):
            each.append(*new, 20 + 9 * step)
        check_facts(store, page)
        if data.draw(st.booleans()):
            generator = torch.Generator().manual_seed(seed)
            masks = [torch.rand(int(n), generator=generator) < 0.6 for n in plain.lengths]
            for mask in masks:
                mask[0] = True
            for each in (store, plain):
                each.keep(masks)
                each.select_rows(torch.tensor([1, 0]))
        check_facts(store, page)
        for row in range(2):
            for head in range(2):
                assert all(
                    torch.equal(*p) for p in zip(store.segment(row, head), plain.segment(row, head), strict=True)
                )


def test_facts_and_pages_by_hand():
    keys = torch.tensor([[1.0, -1.0], [3.0, 0.0], [0.0, 5.0], [0.0, -5.0], [2.0, 2.0]])[None, None]
    store = PagedStore(keys, keys, 0, False, 2)
    low, high, mean = store.facts()
    assert low[0, 0].tolist() == [[1, -1], [0, -5], [2, 2]]
    assert high[0, 0].tolist() == [[3, 0], [0, 5], [2, 2]]
    assert mean[0, 0].tolist() == [[2, -0.5], [0, 0], [2, 2]]
    query = torch.tensor([1.0, -2.0]).view(1, 1, 1, 2)  # bounds 3 + 2, 0 + 10, 2 - 4; means 3, 0, -2
    for by, expected in (("bound", [1]), ("mean", [0])):
        reader = policy_of({"quest": {"page": 2, "pages": 1, "by": by}})
        assert pages_read(store, reader, query, [2], (0, 0))[0, 0].tolist() == expected
        assert pages_read(store, reader, query, [4], (0, 1))[0, 0].tolist() == [*expected, 2]


@pytest.mark.parametrize("by", ["bound", "mean"])
@pytest.mark.parametrize("ragged", [False, True])
def test_attention_to_pages_is_attention_to_their_tokens(ragged, by):
    keys, values = states(0, 30)
    store = PagedStore(keys, values, 0, False, 4)
    held = [torch.arange(30) % (3 + head if ragged else 3) > 0 for head in range(4)]
    store.keep(held)
    query = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(3))
    reader, sight = policy_of({"quest": {"page": 4, "pages": 1, "by": by}}), Sight(None, 2, 1, 30)
    chosen = pages_read(store, reader, query, [13, 13], (1, 2))
    found = attend(query, store, sight, 0.5, chosen)
    each = pages_of(chosen) if isinstance(chosen, Chosen) else chosen if ragged else chosen.flatten(0, 1)
    for row in range(2):
        for head in range(2):
            own = held[2 * row + head].nonzero().flatten()
            parts = own.split(4)
            heads = query[row, 2 * head : 2 * head + 2, 0]  # those that share the keys
            bounds = []
            for part in parts:
                page = keys[row, head, part]
                bound = torch.maximum(heads[:, None] * page.amin(0), heads[:, None] * page.amax(0)).sum(-1).amax()
                bounds.append(bound if by == "bound" else (heads @ page.mean(0)).amax())
            order = torch.stack(bounds).tolist()
            sure = {0, len(parts) - 1} | ({len(parts) - 2} if len(parts[-1]) == 1 else set())
            best = sorted(range(len(parts)), key=lambda i: (i in sure, order[i]), reverse=True)[:3]
            assert each[2 * row + head].tolist() == sorted(best)
            tokens = torch.cat([parts[i] for i in sorted(best)])
            for member in range(2):
                weights = (keys[row, head, tokens] @ heads[member] * 0.5).softmax(0)
                assert torch.allclose(found[row, 0, 2 * head + member], weights @ values[row, head, tokens], atol=1e-6)


def test_groups_of_a_quantised_store_are_its_pages():
    keys, values = states(1, 30)
    store = QuantisedStore(keys, values, 0, False, 8, 4, 5)
    store.quantise(store.due(30), 30)
    store.keep([torch.arange(30) % 5 != 1 for _ in range(4)])
    low, high, mean = store.facts(1, 1)
    codes = store.segment(1, 1)
    assert mean is None
    assert store.ends(1, 1).tolist() == [3, 6, 9, 13, 16, 19]  # of 24 quantised tokens 1, 6, 11, 16 and 21 are gone
    start = 0
    for number, end in enumerate(store.ends(1, 1).tolist()):
        part = codes[0][start:end]
        assert bool((part >= low[number] - 1e-6).all())
        assert bool((part <= high[number] + 1e-6).all())
        found = store.segment(1, 1, torch.tensor([number]))
        expected = [torch.cat([x[start:end], x[19:]]) for x in codes]
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        start = end
    query = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(3))
    reader = policy_of({"quest": {"page": 4, "pages": 1}})
    chosen = pages_read(store, reader, query, [13, 13], (2, 2))
    bounds = torch.maximum(query[1, 1, 0] * low, query[1, 1, 0] * high).sum(-1)
    bounds[0] = torch.inf  # it holds the first two tokens
    assert store.always(1, 1) == 5
    assert chosen[3].tolist() == sorted(bounds.topk(2).indices.tolist())


@pytest.mark.parametrize("policy", ["keep_all", "snapkv", "adakv", "h2o"])
@pytest.mark.parametrize("store", [None, KIVI])
def test_evicted_quantised_and_read_by_pages(policy, store, model):
    own = {"window": 4} if policy in ("snapkv", "adakv") else {}
    common = {"sinks": 2, "recent": 2, **own}
    calls = calls_of((0, 7), *SIZES)
    with sparity.cache(model, policy, 0.6, store=store, **common):
        everything = called(model, calls)
    with sparity.cache(model, policy, 0.6, store=store, read=QUEST, read_keep=1.0, **common):
        assert all(torch.equal(*pair) for pair in zip(called(model, calls), everything, strict=True))
    with sparity.cache(model, policy, 0.6, store=store, read=QUEST, read_keep=0.2, **common):
        found = called(model, calls)
        alone = [{"input_ids": call["input_ids"][1:]} for call in calls]
        alone[0] = {"input_ids": calls[0]["input_ids"][1:, 7:]}
        for together, single in zip(found[1:], called(model, alone)[1:], strict=True):
            assert torch.allclose(together[1:], single, atol=3e-5 * float(single.abs().max()))
        answer = model.generate(IDS, max_new_tokens=4, num_beams=2, **GREEDY)
    assert answer.shape == (2, 44)
    assert not torch.allclose(found[2], everything[2], atol=1e-4)


def test_everything_that_fits_gives_the_bits_of_the_whole_cache(model):
    calls = calls_of((0, 5), *SIZES)
    dense = called(model, calls)
    store = {"kivi": {"group": 16, "residual": 64}}
    with sparity.cache(model, "snapkv", 1.0, store=store, read={"quest": {"dense": 0}}, read_keep=64):
        assert all(torch.equal(*pair) for pair in zip(called(model, calls), dense, strict=True))


@torch.no_grad()
def test_a_quarter_in_four_bits_takes_a_twelfth_of_the_bytes(model):
    keys = torch.randn(1, 4, 16384, 64, dtype=torch.bfloat16)
    store = QuantisedStore(keys, keys, 0, False, 4, 64, 64)
    store.keep([torch.arange(16384) % 4 == 0 for _ in range(4)])
    store.quantise(store.due(16384), 16384)
    assert store.nbytes <= 2 * keys.nbytes / 12


def test_requests_that_cannot_be_met_are_refused(model):
    for arguments, options, words in (
        (("quest",), {"read": "quest"}, "leave `read` out"),
        (("snapkv",), {"read": "kivi"}, 'read "kivi" does not say what is read'),
        (("kivi",), {"read": "quest"}, "give quest page=32"),
        (("snapkv",), {"store": KIVI, "read": {"quest": {"page": 4, "by": "mean"}}}, "by=bound"),
        (("streaming_llm",), {"turn": True, "read": "quest"}, "counts positions in the cache"),
        (("snapkv",), {"read": "quest", "read_keep": 0}, "must be a share"),
    ):
        with pytest.raises(InvalidInput, match=words), sparity.cache(model, *arguments, **options):
            pass
