"""Masks that were worked out by hand, and each layout's rule written plainly."""

import math

import pytest
import torch

import sparity

TOKENS, SIDE = 48, 8


def states(seed=0, tokens=TOKENS, heads=2, kv_heads=1, width=4, size=2.0):
    generator = torch.Generator().manual_seed(seed)
    queries = size * torch.randn(1, heads, tokens, width, generator=generator)
    return queries, torch.randn(1, kv_heads, tokens, width, generator=generator)


def blocks(method, pair, block=SIDE, **options):
    return sparity.attention_blocks(*pair, method=method, block=block, **options)[0]


def weights(pair, head, last=None):
    """Causal weights of the last queries of one head, float64."""
    queries, keys = pair[0][0, head].double(), pair[1][0, head * pair[1].shape[1] // pair[0].shape[1]].double()
    products = queries @ keys.T / math.sqrt(queries.shape[1])
    hidden = torch.ones(len(queries), len(keys), dtype=torch.bool).triu(len(keys) - len(queries) + 1)
    return products.masked_fill(hidden, -torch.inf).softmax(-1)[-(last or len(queries)) :]


def block_sums(table, side):
    """The sum over each block of a table, by loops."""
    rows, columns = len(table) // side, table.shape[1] // side
    cut = table.reshape(rows, side, columns, side)
    return cut.sum((1, 3))


def of_pairs(rule, tokens=TOKENS, side=SIDE):
    """The blocks that hold a causal pair of which a rule `(query, key)` is true."""
    found = torch.zeros(tokens // side, tokens // side, dtype=torch.bool)
    for query in range(tokens):
        for key in range(query + 1):
            found[query // side, key // side] |= bool(rule(query, key))
    return found


@pytest.mark.parametrize("window", [1, 3, 8, 9, 10, 20])
def test_local_is_every_block_with_a_near_pair(window):
    expected = of_pairs(lambda query, key: query - key < window)
    assert torch.equal(blocks("local", states(), window=window)[0], expected)


@pytest.mark.parametrize("count", [0, 1, 8, 9])
def test_global_is_the_first_tokens_and_the_own_block(count):
    expected = of_pairs(lambda query, key: key < count or query == key)
    assert torch.equal(blocks("global", states(), tokens=count)[1], expected)


def test_a_shape_is_both():
    expected = of_pairs(lambda query, key: key < 8 or query - key < 12)
    assert torch.equal(blocks("a_shape", states(), sinks=8, window=12)[0], expected)


def test_strided_by_hand():
    assert blocks("strided", states(), every=3)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
    ]


def test_random_draws_so_many_before_the_own_block():
    found = blocks("random", states(), count=2)
    assert found.sum(-1).tolist() == [[1, 2, 3, 3, 3, 3]] * 2
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found, blocks("random", states(), count=2, seed=1))


def test_vertical_slash_touches_the_best_columns_and_diagonals():
    pair = states(seed=1)
    found = blocks("vertical_slash", pair, vertical=4, slash=5, last=16, sinks=2, near=3)
    for head in range(2):
        table = weights(pair, head, 16)
        columns = table.sum(0).tolist()
        distances = [sum(float(table[row, 32 + row - d]) for row in range(16) if 32 + row - d >= 0) for d in range(48)]
        best_columns = sorted(range(48), key=lambda key: (key < 2, columns[key]), reverse=True)[:4]
        best_distances = sorted(range(48), key=lambda d: (d < 3, distances[d]), reverse=True)[:5]
        # a column is taken as a whole block, which no causal pair of its own need fill
        expected = of_pairs(lambda q, k, c=best_columns, d=best_distances: k in c or q - k in d)
        assert torch.equal(found[head], expected)


def test_xattention_sums_antidiagonals_and_covers_the_threshold():
    pair = states(seed=2)
    found = blocks("xattention", pair, stride=4, threshold=0.7)
    for head in range(2):
        queries, keys = pair[0][0, head].double(), pair[1][0, 0].double()
        tiles = torch.full((12, 12), -torch.inf, dtype=torch.double)
        for i in range(12):
            for j in range(i + 1):
                tiles[i, j] = sum(queries[4 * i + 3 - s] @ keys[4 * j + s] for s in range(4)) / (math.sqrt(4) * 4)
        mass = block_sums(tiles.softmax(-1), 2)
        for row in range(6):
            chosen = {0, row}
            rest = sorted(set(range(row + 1)) - chosen, key=lambda column: float(mass[row, column]), reverse=True)
            while sum(mass[row, column] for column in chosen) < 0.7 * mass[row].sum():
                chosen.add(rest.pop(0))
            assert set(found[head, row].nonzero().flatten().tolist()) == chosen


def test_xattention_sees_a_block_that_matters():
    queries, keys = torch.full((1, 1, 48, 4), 0.1), torch.full((1, 1, 48, 4), 0.1)
    keys[:, :, 16:24] = 20.0
    queries[:, :, 40:] = 20.0
    assert bool(blocks("xattention", (queries, keys), stride=4, threshold=0.9)[0, 5, 2])
    assert int(blocks("xattention", (queries, keys), stride=4, threshold=0.5)[0, 5].sum()) == 3


@pytest.mark.parametrize("reference", [False, True])
def test_spargeattn_takes_the_means_of_blocks_that_are_alike(reference):
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(2, 6, 4, generator=generator) * 3
    noise = torch.randn(2, 48, 4, generator=generator)
    noise[0, 8:16] *= 400  # a block of queries and one of keys that are unlike in themselves
    noise[1, 24:32] *= 400
    queries, keys = centres.repeat_interleave(8, 1) + 0.1 * noise
    pair = queries[None, None], keys[None, None]
    found = blocks("spargeattn", pair, similarity=0.5, threshold=0.6, reference=reference)[0]

    def alike(x, block):
        inside = torch.nn.functional.normalize(x[8 * block : 8 * block + 8], dim=1)
        return float((inside @ inside.T).mean()) > 0.5

    assert [alike(queries, i) for i in range(6)] == [True, False, True, True, True, True]
    assert [alike(keys, i) for i in range(6)] == [True, True, True, False, True, True]
    for row in range(6):
        known = [column for column in range(row + 1) if alike(keys, column)]
        mean = [x.view(6, 8, 4).mean(1) for x in (queries, keys)]
        shares = torch.stack([mean[0][row] @ mean[1][column] / 2 for column in known]).double().softmax(0)
        order = sorted(range(len(known)), key=lambda i: float(shares[i]), reverse=True)
        count, total = 0, 0.0
        while count < len(order) and total + float(shares[order[count]]) <= 0.6:
            total += float(shares[order[count]])
            count += 1
        chosen = {known[i] for i in order[: max(count, 1)]} | ({3} if row >= 3 else set())
        chosen = set(range(row + 1)) if not alike(queries, row) else chosen
        chosen |= set() if reference else {row}
        assert set(found[row].nonzero().flatten().tolist()) == chosen


def test_flexprefill_by_columns_and_diagonals():
    pair = states(seed=4, size=3.0)
    found = blocks("flexprefill", pair, gamma=0.5, tau=0.0, least=8)
    for head in range(2):
        table = weights(pair, head, 8)
        vertical, slash = table.mean(0), torch.zeros(48, dtype=torch.double)
        for row in range(8):
            for key in range(41 + row):
                slash[40 + row - key] += table[row, key] / 8
        picked = []
        for numbers in (vertical, slash):
            reached = numbers.sort(descending=True).values.cumsum(0)
            count = min((int((reached <= 0.5).sum()) + 1) // 8 + 1, 6)
            sums = numbers.view(6, 8).sum(1).tolist()
            picked.append(sorted(range(6), key=lambda block: (block == 0, sums[block]), reverse=True)[: max(count, 1)])
        expected = torch.zeros(6, 6, dtype=torch.bool)
        for row in range(6):
            for column in range(row + 1):
                expected[row, column] = column in picked[0] or row - column in picked[1] or row == column
        assert torch.equal(found[head], expected)


def test_flexprefill_by_pooled_scores_where_they_tell_what_is_paid():
    # queries and keys that are constant within a block: their means say all
    generator = torch.Generator().manual_seed(5)
    queries, keys = (
        (4 * torch.randn(6, 4, generator=generator)).repeat_interleave(8, 0),
        torch.randn(6, 4, generator=generator),
    )
    keys = keys.repeat_interleave(8, 0)
    pair = queries[None, None], keys[None, None]
    found = blocks("flexprefill", pair, gamma=0.6, tau=1.0, least=8)[0]
    mass = (queries[::8] @ keys[::8].T / 2).double()
    mass = mass.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf).softmax(-1).flatten()
    order = mass.sort(descending=True, stable=True).indices
    inside = order[mass[order].cumsum(0) <= 0.6 * 6]
    expected = torch.zeros(36, dtype=torch.bool)
    expected[inside] = True
    expected = expected.view(6, 6) | torch.eye(6, dtype=torch.bool)
    expected[:, 0] = True  # one block by columns, the first
    assert torch.equal(found, expected & torch.ones(6, 6, dtype=torch.bool).tril())


def test_flexprefill_leaves_a_short_prompt_dense():
    assert torch.equal(blocks("flexprefill", states())[0], torch.ones(6, 6, dtype=torch.bool).tril())


def test_a_later_part_of_a_prompt_has_the_rows_of_the_whole():
    queries, keys = states(seed=6)
    for method, options in (("local", {"window": 12}), ("global", {"tokens": 8}), ("strided", {"every": 3})):
        whole = blocks(method, (queries, keys), **options)
        assert torch.equal(blocks(method, (queries[:, :, 16:], keys), **options), whole[:, 2:])
    options = {"stride": 4, "threshold": 0.7}
    whole = blocks("xattention", (queries, keys), **options)
    assert torch.equal(blocks("xattention", (queries[:, :, 16:], keys), **options), whole[:, 2:])
