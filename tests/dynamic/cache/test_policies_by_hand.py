"""Selections that were worked out by hand, and each policy's formula written plainly."""

import math

import pytest
import torch

import sparity
from sparity.dynamic.cache.functions import policy_of


def states(seed=0, tokens=24, heads=4, kv_heads=2, width=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, count, tokens, width, generator=generator) for count in (heads, kv_heads, kv_heads)]


def attention(queries, keys):
    """Causal weights, [heads][query][key], in plain loops."""
    group = queries.shape[1] // keys.shape[1]
    found = []
    for head in range(queries.shape[1]):
        rows = []
        for i, query in enumerate(queries[0, head]):
            logits = [float(query @ key) / math.sqrt(len(query)) for key in keys[0, head // group][: i + 1]]
            total = sum(math.exp(x) for x in logits)
            rows.append([math.exp(x) / total for x in logits] + [0.0] * (keys.shape[2] - i - 1))
        found.append(rows)
    return found


def score(policy, given, **options):
    return sparity.score_cache(*given, policy=policy, **options)[0]


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def of_heads(weights, head, reduce=mean):
    """The tables of the two query heads that share a KV head, taken together number by number."""
    return [
        [reduce(pair) for pair in zip(*rows, strict=True)]
        for rows in zip(weights[2 * head], weights[2 * head + 1], strict=True)
    ]


def kept(mask):
    return [row.nonzero().flatten().tolist() for row in mask.reshape(-1, mask.shape[-1])]


def line(numbers):
    return torch.tensor(numbers).view(1, 1, -1, 1)


def test_streaming_llm_keeps_the_first_and_the_last():
    mask = sparity.select_cache(*states(tokens=10), policy="streaming_llm", keep=5, sinks=2)
    assert kept(mask) == [[0, 1, 7, 8, 9]] * 2


def test_knorm_and_its_ties():
    keys = line([1.0, -3.0, 2.0, 2.0, -2.0])
    assert kept(sparity.select_cache(keys, keys, keys, policy="knorm", keep=3)) == [
        [0, 3, 4]
    ]  # of equal ones the later


def test_keydiff_keeps_what_points_elsewhere():
    keys = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.05]])[None, None]
    found = score("keydiff", [keys, keys, keys])[0]
    anchor = (keys[0, 0] / keys[0, 0].norm(dim=1, keepdim=True)).mean(0)
    plain = [-float(key @ anchor / key.norm() / anchor.norm()) for key in keys[0, 0]]
    assert found.tolist() == pytest.approx(plain, abs=1e-6)
    assert kept(sparity.select_cache(keys, keys, keys, policy="keydiff", keep=2)) == [[2, 3]]


def test_h2o_by_hand():
    # all keys are alike, so query i gives 1 / (i + 1) to each of the tokens up to its own
    queries = torch.zeros(1, 1, 4, 2)
    found = score("h2o", [queries, torch.ones(1, 1, 4, 2), queries + 1])[0]
    assert found.tolist() == pytest.approx([1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4])
    fair = score("h2o", [queries, torch.ones(1, 1, 4, 2), queries + 1], mean=True)[0]
    assert fair.tolist() == pytest.approx([25 / 48, 13 / 36, 7 / 24, 1 / 4])
    mask = sparity.select_cache(queries, torch.ones(1, 1, 4, 2), queries + 1, policy="h2o", keep=3)
    assert kept(mask) == [[0, 1, 3]]  # one of three is for the last tokens


def test_h2o_sums_what_every_query_pays():
    given = states()
    weights = attention(*given[:2])
    for head, found in enumerate(score("h2o", given)):
        table = of_heads(weights, head)
        assert found.tolist() == pytest.approx([sum(column) for column in zip(*table, strict=True)], abs=1e-5)


def test_h2o_of_many_queries_is_the_same_in_pieces():
    given = states(tokens=600)
    whole = score("h2o", given)
    weights = (given[0][0] @ given[1][0].repeat_interleave(2, 0).transpose(1, 2)) / math.sqrt(6)
    hidden = torch.ones(600, 600, dtype=torch.bool).triu(1)
    expected = weights.masked_fill(hidden, -torch.inf).softmax(-1).sum(1).view(2, 2, 600).mean(1)
    assert torch.allclose(whole, expected, atol=1e-4)


def test_tova_is_the_last_querys_view_for_all_heads():
    given = states()
    weights = attention(*given[:2])
    plain = [mean(weights[head][-1][token] for head in range(4)) for token in range(23)]
    found = score("tova", given)
    assert found[0].tolist() == pytest.approx([*plain, max(plain)], abs=1e-6)
    assert torch.equal(found[0], found[1])


def smooth(numbers, kernel, how):
    """Each the mean (zeros outside counted) or the largest of its neighbours."""
    half, out = kernel // 2, []
    for i in range(len(numbers)):
        near = numbers[max(i - half, 0) : i + half + 1]
        out.append(sum(near) / kernel if how == "avg" else max(near))
    return out


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_snapkv_pools_what_the_window_pays(pooling, group):
    given = states()
    weights = attention(*given[:2])
    found = score("snapkv", given, window=5, kernel=3, pooling=pooling, group=group)
    for head in range(2):
        pair = [
            [mean(weights[2 * head + member][row][token] for row in range(19, 24)) for token in range(19)]
            for member in range(2)
        ]
        together = [(mean if group == "mean" else max)(both) for both in zip(*pair, strict=True)]
        plain = smooth(together, 3, pooling)
        assert found[head].tolist() == pytest.approx(plain + [max(plain)] * 5, abs=1e-6)
    mask = sparity.select_cache(*given, policy="snapkv", keep=9, window=5, kernel=3, pooling=pooling, group=group)
    for head in range(2):
        top = sorted(range(19), key=lambda token: (float(found[head][token]), token), reverse=True)[:4]
        assert kept(mask)[head] == [*sorted(top), *range(19, 24)]


def test_a_window_that_covers_all_tokens_leaves_no_scores():
    assert score("snapkv", states(tokens=8), window=8).tolist() == [[0.0] * 8] * 2
    assert bool(sparity.select_cache(*states(tokens=8), policy="snapkv", keep=8, window=12).all())


def test_a_soft_cap_and_another_scaling_count():
    queries, keys, values = states()
    found = score("snapkv", [queries, keys, values], window=4, kernel=1, scaling=2.0, softcap=3.0)
    logits = 3 * torch.tanh(queries[0, :2, -4:] @ keys[0, 0].T * 2.0 / 3)
    hidden = torch.ones(4, 24, dtype=torch.bool).triu(21)
    plain = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean((0, 1))[:20]
    assert torch.allclose(found[0, :20], plain, atol=1e-6)


def test_pyramidkv_falls_from_layer_to_layer():
    policy = policy_of({"pyramidkv": {"window": 8, "beta": 4}})
    budgets = [policy.budget(1000, 108, layer, 5) for layer in range(5)]
    # 100 beside the window: a quarter, 25, in the last layer, 175 in the first, steps of 150 // 4 = 37
    assert budgets == [183, 146, 109, 72, 35]
    assert [policy.budget(1000, 0.7, layer, 5) for layer in range(5)] == [700] * 5  # no room: more than half is kept
    full = [policy.budget(220, 108, layer, 5) for layer in range(5)]
    assert full == [183, 146, 109, 72, 35]
    narrow = policy_of({"pyramidkv": {"window": 8, "beta": 20}})
    # 195 would not fit into the 192 beside the window: 192 in the first layer, 8 in the last, steps of 46
    assert [narrow.budget(200, 108, layer, 5) for layer in range(5)] == [200, 154, 108, 62, 16]
    mask = sparity.select_cache(*states(tokens=60), policy="pyramidkv", keep=20, window=4, layer=3, layers=4)
    assert mask.sum(-1).tolist() == [[4 + 32 - 3 * 10] * 2]


def test_adakv_gives_the_layers_tokens_to_the_heads_that_use_them():
    # head 0 looks at one token, head 1 at all alike
    keys = torch.zeros(1, 2, 20, 2)
    keys[0, 0, 3] = torch.tensor([8.0, 0.0])
    queries = torch.tensor([4.0, 0.0]).expand(1, 2, 20, 2)
    options = {"policy": "adakv", "window": 2, "kernel": 1}
    mask = sparity.select_cache(queries, keys, keys, keep=6, floor=0.5, **options)
    assert mask[0, 0].nonzero().flatten().tolist()[0] == 3
    assert mask.sum(-1).tolist() == [[3, 9]]
    mask = sparity.select_cache(queries, keys, keys, keep=6, floor=1.0, **options)
    assert mask.sum(-1).tolist() == [[6, 6]]


def test_adakv_is_a_topk_over_all_heads_after_the_floor():
    given = states(seed=3)
    found = score("adakv", given, window=4)
    mask = sparity.select_cache(*given, policy="adakv", keep=12, window=4)[0]
    chosen = {(head, token) for head in range(2) for token in range(20, 24)}
    for head in range(2):  # int(12 * 0.2) = 2, which the window fills
        assert bool(mask[head, 20:].all())
    rest = sorted(((float(found[head, token]), token, head) for head in range(2) for token in range(20)), reverse=True)
    chosen |= {(head, token) for _, token, head in rest[: 24 - 8]}
    assert {tuple(place) for place in mask.nonzero().tolist()} == chosen


def test_criticalkv_weighs_values_in_its_second_stage():
    queries, keys, values = states(seed=5)
    weight = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(1))
    attended = score("snapkv", [queries, keys, values], window=4)
    found = score("criticalkv", [queries, keys, values], window=4, output_weight=weight)
    for head in range(2):
        sizes = [
            mean(float((values[0, head, token] @ weight[2 * head + member]).abs().sum()) for member in range(2))
            for token in range(24)
        ]
        plain = [(float(a) + 1e-4) * size for a, size in zip(attended[head], sizes, strict=True)]
        assert found[head].tolist() == pytest.approx(plain, rel=1e-5)
    mask = sparity.select_cache(queries, keys, values, policy="criticalkv", keep=14, window=4, output_weight=weight)[0]
    for head in range(2):  # the window and 3 more are half of the budget
        first = sorted(range(20), key=lambda token: float(attended[head, token]), reverse=True)[:3]
        left = sorted(set(range(20)) - set(first), key=lambda token: float(found[head, token]), reverse=True)[:7]
        assert kept(mask)[head] == sorted([*first, *left, *range(20, 24)])
    bare = score("criticalkv", [queries, keys, values], window=4)
    assert torch.allclose(bare, (attended + 1e-4) * values[0].abs().sum(-1))


def test_defensivekv_takes_the_worst_case():
    given = states(seed=2)
    weights = attention(*given[:2])
    found = score("defensivekv", given, window=4, kernel=3)
    for head in range(2):
        rows = [weights[2 * head + member][row][:20] for member in range(2) for row in range(20, 24)]
        pooled = [[x * sum(row) / sum(smooth(row, 3, "avg")) for x in smooth(row, 3, "avg")] for row in rows]
        worst = [max(column) for column in zip(*pooled, strict=True)]
        plain = [max(x, mean(worst)) for x in worst]
        assert found[head].tolist() == pytest.approx(plain + [max(plain)] * 4, abs=1e-6)
