"""LagKV, expected attention, Quest and the random control: each formula written plainly."""

import itertools
import math

import pytest
import torch

import sparity


def states(seed=0, tokens=24, heads=4, kv_heads=2, width=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, count, tokens, width, generator=generator) for count in (heads, kv_heads, kv_heads)]


def score(policy, given, **options):
    return sparity.score_cache(*given, policy=policy, **options)[0]


def kept(mask):
    return [row.nonzero().flatten().tolist() for row in mask.reshape(-1, mask.shape[-1])]


@pytest.mark.parametrize("ranks", [True, False])
def test_lagkv_measures_each_stretch_by_the_next(ranks):
    queries, keys, values = states(seed=4, tokens=2 + 3 * 5 + 3)
    found = score("lagkv", [queries, keys, values], sinks=2, lag=5, ranks=ranks)
    for head in range(2):
        plain = [1.0] * 2
        for start in (2, 7):
            parts = []
            for states_ in (keys, values):
                here, there = states_[0, head, start : start + 5], states_[0, head, start + 5 : start + 10]
                low, high = there.min(0).values, there.max(0).values
                parts.append(((here - low) / (high - low)).std(dim=1).softmax(0))
            both = ((parts[0] + parts[1]) / 2).tolist()
            plain += [sorted(both).index(x) / 5 for x in both] if ranks else both
        assert found[head].tolist() == pytest.approx(plain + [1.0] * 8, abs=1e-6)


def test_lagkv_of_a_short_text_goes_by_its_order():
    assert score("lagkv", states(tokens=8), sinks=2, lag=4)[0].tolist() == pytest.approx(
        [1, 1, 0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]
    )


def turn(vector, position, base):
    """A vector turned by a position, pair by pair."""
    half, out = len(vector) // 2, vector.clone()
    for i in range(half):
        angle = position * base ** (-i / half)
        out[i] = vector[i] * math.cos(angle) - vector[half + i] * math.sin(angle)
        out[half + i] = vector[half + i] * math.cos(angle) + vector[i] * math.sin(angle)
    return out


@pytest.mark.parametrize("base", [10000.0, 0.0])
@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention_from_queries_turned_back(base, covariance):
    raw, keys, values = states(seed=6, tokens=12, heads=2)
    raw, keys = raw.double(), keys.double()
    queries = raw.clone()
    for head, place in itertools.product(range(2), range(12 if base else 0)):
        queries[0, head, place] = turn(raw[0, head, place], place, base)
    found = score(
        "expected_attention", [queries, keys, values], sinks=2, future=7, base=base, covariance=covariance, epsilon=0.02
    )
    rotation = torch.eye(6, dtype=torch.double)
    if base:
        columns = [mean_of([turn(unit, 12 + i, base) for i in range(7)]) for unit in rotation]
        rotation = torch.stack(columns, 1)
    for head in range(2):
        counted = raw[0, head, 2:]
        mu = rotation @ counted.mean(0)
        sigma = rotation @ torch.cov(counted.T, correction=0) @ rotation.T if covariance else torch.zeros(6, 6).double()
        logits = torch.stack([k @ mu / math.sqrt(6) + k @ sigma @ k / 12 for k in keys[0, head, 2:]])
        plain = (logits.softmax(0) + 0.02) * values[0, head, 2:].norm(dim=1)
        expected = [plain.max().item()] * 2 + plain.tolist()
        assert found[head].tolist() == pytest.approx(expected, rel=1e-4)


def mean_of(vectors):
    return torch.stack(vectors).mean(0)


def test_quest_reads_the_pages_with_the_highest_bound():
    queries, keys, values = states(seed=7, tokens=18)
    found = score("quest", [queries, keys, values], page=4)
    for head in range(2):
        for page in range(5):
            inside = keys[0, head, 4 * page : 4 * page + 4]
            low, high = inside.min(0).values, inside.max(0).values
            bound = max(
                sum(
                    float(max(q * a, q * b))
                    for q, a, b in zip(queries[0, 2 * head + member, -1], low, high, strict=True)
                )
                for member in range(2)
            )
            assert found[head, 4 * page : 4 * page + 4].tolist() == pytest.approx([bound / math.sqrt(6)] * len(inside))
    mask = sparity.select_cache(queries, keys, values, policy="quest", keep=9, page=4, pages=1)
    for head in range(2):
        best = sorted(range(5), key=lambda page: float(found[head, 4 * page]), reverse=True)[:2]
        assert kept(mask)[head] == [token for page in sorted(best) for token in range(4 * page, min(4 * page + 4, 18))]
    least = sparity.select_cache(queries, keys, values, policy="quest", keep=4, page=4)
    assert int(least[0, 0].sum()) in (10, 12)  # three pages, perhaps with the short one


def test_quests_bound_is_never_below_a_product():
    queries, keys, values = states(seed=8, tokens=32, heads=2)
    bound = score("quest", [queries, keys, values], page=8)
    products = (queries[0, :, -1:] @ keys[0].transpose(1, 2))[:, 0] / math.sqrt(6)
    assert bool((bound >= products - 1e-6).all())


def test_random_draws_by_its_seed_and_a_longer_text_begins_alike():
    given = states()
    first = score("random", given)
    assert not torch.equal(first, score("random", given, seed=1))
    assert torch.equal(score("random", [x[:, :, :10] for x in given]), first[:, :10])
    assert not torch.equal(first[0], first[1])
