"""The laws of a policy for the key-value cache, for every one that the registry finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learned import told

import sparity
from sparity import registry
from sparity.dynamic.cache.functions import policy_of
from sparity.errors import InvalidInput, NumericalError

KIND = "cache.policy"
NAMES = registry.names(KIND)
COUNTS = [name for name in NAMES if registry.get(KIND, name).counts]
UNIFORM = [name for name in COUNTS if not registry.get(KIND, name).ragged]
SMALL = {  # options that fit 40 tokens
    "snapkv": {"window": 4},
    "pyramidkv": {"window": 4},
    "adakv": {"window": 4},
    "criticalkv": {"window": 4},
    "defensivekv": {"window": 4},
    "lagkv": {"lag": 8},
    "quest": {"page": 4},
    "kivi": {"residual": 8},
    "razorattention": {"window": 6, "compensate": False},
    "expected_attention": {"future": 16},
    "kvzap": {"window": 4},
    "duoattention": {"sinks": 2, "window": 6},
    "triattention": {"window": 4},
    "pqcache": {"bits": 3},
}
every_policy = pytest.mark.parametrize("name", NAMES)


def layer(seed=0, tokens=40, batch=2, heads=4, kv_heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, tokens, 8), (batch, kv_heads, tokens, 8), (batch, kv_heads, tokens, 8)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def select(name, states, keep=0.5, **options):
    return sparity.select_cache(*states, policy=name, keep=keep, **SMALL.get(name, {}), **told(name, states), **options)


def score(name, states):
    return sparity.score_cache(*states, policy=name, **SMALL.get(name, {}), **told(name, states))


@every_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_and_scores_have_the_shape_of_the_cache_are_deterministic_and_change_nothing(name, dtype):
    states = layer(dtype=dtype)
    before = [x.clone() for x in states]
    mask = select(name, states)
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 2, 40)
    assert torch.equal(mask, select(name, states))
    scores = score(name, states)
    assert scores.dtype == torch.float32
    assert scores.shape == mask.shape
    assert bool(scores.isfinite().all())
    assert all(torch.equal(*pair) for pair in zip(before, states, strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "drop_all"])
def test_everything_stays_when_everything_may(name):
    states = layer()
    assert bool(select(name, states, keep=1).all())
    assert bool(select(name, states, keep=1.0).all())
    assert bool(select(name, states, keep=40).all())
    assert bool(select(name, states, keep=1000).all())


def test_the_controls_ignore_the_share():
    assert bool(select("keep_all", layer(), keep=0.1).all())
    assert not bool(select("drop_all", layer(), keep=1).any())
    assert int(select("drop_all", layer(), sinks=3, recent=2).sum()) == 5 * 4


@pytest.mark.parametrize("name", COUNTS)
@settings(max_examples=12, deadline=None)
@given(keep=st.floats(0.3, 1), tokens=st.integers(20, 50), seed=st.integers(0, 20))
def test_exactly_the_tokens_that_were_asked_for_stay(name, keep, tokens, seed):
    kept = select(name, layer(seed, tokens), keep).sum(-1)
    wanted = int(tokens * keep + 1e-9)
    if name in UNIFORM:
        assert kept.tolist() == [[wanted, wanted], [wanted, wanted]]
    else:  # heads share what a layer has
        assert kept.sum(-1).tolist() == [2 * wanted, 2 * wanted]
    assert torch.equal(select(name, layer(seed, tokens), wanted).sum(-1), kept)


@pytest.mark.parametrize("name", COUNTS)
def test_protected_tokens_always_stay_and_are_counted(name):
    states = layer()
    own = policy_of({name: SMALL.get(name, {})}).protected(16)
    mask = select(name, states, 16)
    assert bool(mask[..., : own[0]].all())
    assert bool(mask[..., 40 - own[1] :].all())
    options = {
        key: count
        for key, count in (("sinks", 5), ("recent", 6))
        if key not in {*registry.get(KIND, name).__dataclass_fields__}
    }
    mask = select(name, states, 16, **options)
    assert bool(mask[..., : options.get("sinks", 0)].all())
    assert bool(mask[..., 40 - options.get("recent", 0) :].all())
    assert int(mask.sum()) == 16 * 4


@pytest.mark.parametrize("name", [name for name in UNIFORM if name != "criticalkv"])  # whose first stage goes by others
def test_tokens_that_stay_score_no_lower_than_those_that_go(name):
    states = layer()
    mask, scores = select(name, states), score(name, states)
    if name == "h2o":  # whose last tokens stay whatever they score
        mask, scores = mask[..., :30], scores[..., :30]
    lowest, highest = scores.masked_fill(~mask, torch.inf).amin(-1), scores.masked_fill(mask, -torch.inf).amax(-1)
    assert bool((lowest >= highest).all())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_heads_and_rows_are_treated_alike(name):
    states = layer(batch=3, heads=6, kv_heads=3)
    mask = select(name, states)
    order = [2, 0, 1]
    rows = [x[order] for x in states]
    assert torch.equal(select(name, rows), mask[order])
    heads = [states[0].view(3, 3, 2, 40, 8)[:, order].flatten(1, 2), *(x[:, order] for x in states[1:])]
    assert torch.equal(select(name, heads), mask[:, order])
    swapped = [states[0].view(3, 3, 2, 40, 8).flip(2).flatten(1, 2), *states[1:]]
    assert torch.equal(select(name, swapped), mask)


@every_policy
def test_query_heads_that_are_the_same_choose_as_one(name):
    queries, keys, values = layer(heads=2, kv_heads=2)
    assert torch.equal(
        select(name, [queries.repeat_interleave(3, 1), keys, values]), select(name, [queries, keys, values])
    )


@every_policy
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused(name, place, number):
    states = layer()
    states[place][0, 0, 3, 2] = number
    with pytest.raises(NumericalError, match=f"{('queries', 'keys', 'values')[place]} hold NaN"):
        select(name, states)
    with pytest.raises(NumericalError, match="hold NaN"):
        sparity.score_cache(*states, policy=name)


@every_policy
def test_an_unknown_option_is_refused_with_what_there_is(name):
    with pytest.raises(InvalidInput, match=f'policy "{name}" has no option "windows"'):
        select(name, layer(), windows=3)


@pytest.mark.parametrize("name", [name for name in COUNTS if sum(policy_of(name).protected(2))])
def test_fewer_tokens_than_are_protected_are_refused(name):
    options = {"sinks": 4} if name in ("h2o", "tova", "lazyllm_static", "lazyllm") else {}  # their own may be one
    with pytest.raises(InvalidInput, match=r"fewer than the .* that always stay: raise `keep`"):
        select(name, layer(), 3, **options)


@every_policy
def test_the_last_queries_suffice_where_only_they_are_read(name):
    queries, keys, values = layer()
    if name in ("h2o", "expected_attention", "kvzip", "kvzap"):
        assert not torch.equal(score(name, [queries[:, :, -8:], keys, values]), score(name, [queries, keys, values]))
        return
    assert torch.equal(select(name, [queries[:, :, -8:], keys, values]), select(name, [queries, keys, values]))


def test_shapes_shares_and_names_that_do_not_fit_are_refused():
    queries, keys, values = layer()
    for states, options, words in (
        ((queries[0], keys, values), {}, r"queries must be floating-point \[batch, heads, tokens, width\]"),
        ((queries[:, :3], keys, values), {}, "a whole number of query heads for each KV head"),
        ((queries, keys, values[:, :, 1:]), {}, "must have the same tokens"),
        ((queries, keys[:, :, 1:], values[:, :, 1:]), {}, "40 queries and only 39 keys"),
        ((queries[..., :0], keys[..., :0], values), {}, "hold nothing"),
        ((queries, keys, values), {"keep": 0}, "must be a share"),
        ((queries, keys, values), {"keep": 1.5}, "must be a share"),
        ((queries, keys, values), {"keep": True}, "must be a share"),
        ((queries, keys, values), {"policy": "snapvk"}, 'no policy "snapvk"; did you mean "snapkv"'),
        ((queries, keys, values), {"policy": 3}, "policy must be a name"),
        ((queries, keys, values), {"kernel": 4}, "must be odd"),
        ((queries, keys, values), {"window": 0}, "must be 1 or more"),
        ((queries, keys, values), {"policy": "adakv", "floor": 2.0}, r"must lie in \[0, 1\]"),
        ((queries, keys, values), {"sinks": -1}, "must be a whole number, 0 or more"),
        ((queries, keys, values), {"output_weight": keys}, "output_weight must be"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.select_cache(*states, **{"policy": "snapkv", "keep": 0.9, **options})


def test_names_are_read_whatever_their_case_hyphens_and_underscores():
    states = layer()
    for name, other in (("adakv", "Ada-KV"), ("streaming_llm", "StreamingLLM"), ("knorm", "K-norm"), ("h2o", "H2O")):
        assert torch.equal(
            select(name, states), sparity.select_cache(*states, policy=other, keep=0.5, **SMALL.get(name, {}))
        )
