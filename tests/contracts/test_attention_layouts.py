"""The laws of a layout of attention's blocks, for every one that the registry finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparity
from sparity import registry
from sparity.errors import InvalidInput, NumericalError

KIND = "attention.layout"
NAMES = registry.names(KIND)
SMALL = {
    "local": {"window": 20},
    "global": {"tokens": 10},
    "random": {"count": 1},
    "a_shape": {"sinks": 8, "window": 16},
    "vertical_slash": {"vertical": 4, "slash": 6, "last": 8, "sinks": 2, "near": 3},
    "flexprefill": {"least": 8, "gamma": 0.6},
    "xattention": {"stride": 4, "threshold": 0.6},
    "spargeattn": {"similarity": -1.0, "threshold": 0.6},
}
every_layout = pytest.mark.parametrize("name", NAMES)


def states(seed=0, new=64, tokens=64, batch=2, heads=4, kv_heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, heads, new, 8, generator=generator)
    return (3 * queries).to(dtype), torch.randn(batch, kv_heads, tokens, 8, generator=generator).to(dtype)


def blocks(name, pair, block=8, **options):
    return sparity.attention_blocks(*pair, method=name, block=block, **{**SMALL.get(name, {}), **options})


def pairs(new, tokens, sides):
    """Which blocks hold a pair that may attend, and which a query's own token, counted one by one."""
    rows, columns = -(-new // sides[0]), -(-tokens // sides[1])
    some, own = torch.zeros(rows, columns, dtype=torch.bool), torch.zeros(rows, columns, dtype=torch.bool)
    for query in range(new):
        place = query + tokens - new
        some[query // sides[0], : place // sides[1] + 1] = True
        own[query // sides[0], place // sides[1]] = True
    return some, own


@every_layout
@settings(max_examples=15, deadline=None)
@given(new=st.integers(3, 50), before=st.integers(0, 40), sides=st.sampled_from([(8, 8), (16, 8), (8, 16)]))
def test_nothing_from_the_future_is_computed_and_every_query_meets_its_own_token(name, new, before, sides):
    pair = states(new, new, new + before, batch=1)
    some, own = pairs(new, new + before, sides)
    mask = blocks(name, pair, sides)
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 4, *some.shape)
    assert not bool((mask & ~some).any())
    assert bool((mask | ~own).all())


@every_layout
def test_a_mask_is_sparse_deterministic_of_any_type_and_changes_nothing(name):
    some, _ = pairs(64, 64, (8, 8))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pair = states(dtype=dtype)
        before = [x.clone() for x in pair]
        mask = blocks(name, pair)
        assert torch.equal(mask, blocks(name, pair))
        assert bool((mask.sum((-1, -2)) < some.sum()).all())
        assert all(torch.equal(*each) for each in zip(before, pair, strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_heads_and_rows_are_treated_alike(name):
    queries, keys = states(batch=3, heads=6, kv_heads=3)
    mask, order = blocks(name, (queries, keys)), [2, 0, 1]
    assert torch.equal(blocks(name, (queries[order], keys[order])), mask[order])
    grouped = queries.view(3, 3, 2, 64, 8)[:, order].flatten(1, 2), keys[:, order]
    assert torch.equal(blocks(name, grouped), mask.view(3, 3, 2, 8, 8)[:, order].flatten(1, 2))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local", {"window": 64}),
        ("global", {"tokens": 64}),
        ("random", {"count": 8}),
        ("strided", {"every": 1}),
        ("a_shape", {"window": 64}),
        ("vertical_slash", {"vertical": 64}),
        ("vertical_slash", {"slash": 64}),
        ("flexprefill", {"least": 64}),
        ("xattention", {"threshold": 1.0}),
        ("spargeattn", {"similarity": 1.0}),
    ],
)
def test_with_nothing_left_out_the_mask_is_the_causal_one(name, options):
    some, _ = pairs(64, 64, (8, 8))
    assert torch.equal(blocks(name, states(), **options), some.expand(2, 4, 8, 8))


@every_layout
def test_numbers_that_are_none_and_unknown_options_are_refused(name):
    queries, keys = states()
    for place in range(2):
        broken = [queries.clone(), keys.clone()]
        broken[place][0, 0, 3, 2] = torch.nan
        with pytest.raises(NumericalError, match=f"{('queries', 'keys')[place]} hold NaN"):
            blocks(name, broken)
    with pytest.raises(InvalidInput, match=f'layout "{name}" has no option "windows"'):
        blocks(name, (queries, keys), windows=3)


def test_what_does_not_fit_is_refused():
    queries, keys = states()
    for pair, options, words in (
        ((queries[0], keys), {}, "queries must be floating-point"),
        ((queries, keys[:, :, 1:]), {}, "64 queries and only 63 keys"),
        ((queries, keys), {"block": 0}, "must be a number of tokens, or two"),
        ((queries, keys), {"block": (8, 8, 8)}, "must be a number of tokens, or two"),
        ((queries, keys), {"block": True}, "must be a number of tokens, or two"),
        ((queries, keys), {"method": "locl"}, 'no layout "locl"; did you mean "local"'),
        ((queries, keys), {"method": None}, "method must be a name"),
        ((queries, keys), {"window": 0}, "is too small"),
        ((queries, keys), {"method": "xattention", "block": 12}, "no multiples of the stride 8"),
        ((queries, keys), {"method": "xattention", "threshold": 1.5}, r"must lie in \[0, 1\]"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.attention_blocks(*pair, **{"method": "local", "block": 8, **options})
