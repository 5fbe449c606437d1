"""SparseSwaps and DSnoT, which change masks and no weights: against every pair tried, and the published code."""

import numpy as np
import pytest
import solver_references as plain
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
import sparity
from references import layer
from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.static.prune import best_exchanges
from sparity.static.prune.mean_exchanges import Exchanges
from sparity.static.prune.pruning import Pruning

PATTERNS = {"unstructured": None, "2:4": 4, "3:8": 8}


def mean_errors(weight, keep, inputs):
    """`[rows]`: |sum over pruned weights of weight times summed input| per sequence, DSnoT's own measure."""
    sums = inputs.double().sum(1).mean(0)
    return ((weight.double() * sums) * ~keep).sum(1).abs()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_swaps_are_those_of_every_pair_tried(pattern, score):
    weight, inputs = layer(4, 16)
    _, start = sparity.prune_weight(weight, inputs, score=score, pattern=pattern, compare_within="row")
    found, keep = sparity.prune_weight(
        weight, inputs, score=score, pattern=pattern, solver="sparse_swaps", compare_within="row"
    )
    expected = plain.best_swaps(weight, start, plain.gram(inputs), PATTERNS[pattern] or 16)
    assert torch.equal(keep, expected)
    assert torch.equal(found, torch.where(keep, weight, 0.0))
    assert not torch.equal(keep, start)


@pytest.mark.parametrize("candidates", [1, 3])
def test_a_row_is_done_only_when_no_pair_at_all_gains(candidates):
    weight, inputs = layer(4, 16)
    _, keep = sparity.prune_weight(weight, inputs, solver="sparse_swaps", candidates=candidates, swaps=1000)
    assert torch.equal(plain.best_swaps(weight, keep, plain.gram(inputs), 16), keep)


def test_swaps_look_at_pairs_in_parts_and_at_wide_groups(monkeypatch):
    weight, inputs = layer(4, 20)
    whole = sparity.prune_weight(weight, inputs, solver="sparse_swaps")[1]
    monkeypatch.setattr(best_exchanges, "LARGEST_TABLE", 200)  # three weights at a time
    assert torch.equal(sparity.prune_weight(weight, inputs, solver="sparse_swaps")[1], whole)
    tail = {"n_of_m": {"n": 12, "m": 24, "tail": "dense"}}  # wider than the rows: nothing is pruned
    assert Pruning.of("wanda", tail, "sparse_swaps").apply(weight, gathered(inputs), 0.5)[1].all()


def gathered(inputs):
    statistics = Statistics.gather("weight", ["column_norm", "gram"])
    statistics.add(inputs)
    return statistics


def test_swaps_by_hand():
    """Two inputs that always agree: their pruned weights add up, so one of each sign is better than two of one."""
    weight = torch.tensor([[1.0, 1.05, -1.1, 3.0]])
    inputs = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert sparity.prune_weight(weight, inputs)[1].tolist() == [[False, False, True, True]]  # error 2 * (1 + 1.05)^2
    _, keep = sparity.prune_weight(weight, inputs, solver="sparse_swaps")
    assert keep.tolist() == [[True, False, False, True]]  # error 2 * (1.05 - 1.1)^2


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.sampled_from([4, 8, 12, 20]),
    seed=st.integers(0, 999),
    pattern=st.sampled_from(["unstructured", "2:4", "1:4"]),
    swaps=st.sampled_from([1, 3, 100]),
    group=st.sampled_from(["row", "layer"]),
    dead=st.booleans(),
)
def test_swaps_keep_the_counts_and_are_never_worse(rows, columns, seed, pattern, swaps, group, dead):
    weight, inputs = layer(rows, columns, seed)
    if dead:
        inputs[..., :3] = 0.0
    options = {"pattern": pattern, "compare_within": group}
    start_weight, start = sparity.prune_weight(weight, inputs, score="wanda", **options)
    found, keep = sparity.prune_weight(weight, inputs, score="wanda", solver="sparse_swaps", swaps=swaps, **options)
    assert torch.equal(keep.sum(1), start.sum(1))
    if pattern != "unstructured":
        assert torch.equal(keep.view(-1, 4).sum(1), start.view(-1, 4).sum(1))
    errors = [references.output_error(weight, each, inputs) for each in (found, start_weight)]
    assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dsnot_follows_the_published_code_where_it_is_asked_to(pattern, sparsity):
    weight, inputs = layer(24, 96, samples=1, tokens=96)
    inputs += 0.3
    options = {"pattern": pattern} if pattern != "unstructured" else {"sparsity": sparsity}
    _, start = sparity.prune_weight(weight, inputs, **options)
    found, keep = sparity.prune_weight(weight, inputs, solver="dsnot", reference=True, cycles=12, **options)
    x = inputs[0].double().numpy()
    shares = weight.double().numpy() * x.sum(0)
    scores = np.abs(weight.double().numpy()) * np.sqrt((x**2).sum(0))
    rows = [
        plain.dsnot_row(shares[row], x.var(0), scores[row], start[row].numpy(), PATTERNS[pattern] or 96)
        for row in range(24)
    ]
    assert torch.equal(keep, torch.from_numpy(np.stack(rows)))
    assert torch.equal(found, torch.where(keep, weight, 0.0))
    assert not torch.equal(keep, start)


def exchanged(shares, keep, scores, growth=None, width=None, **options):
    shares, keep = torch.tensor([shares]), torch.tensor([keep])
    growth = torch.where(keep, 0.0, shares).sort(dim=1, stable=True).indices if growth is None else growth
    chosen = {"cycles": 50, "threshold": 0.1, "same_sign": False, "reference": False, **options}
    width = width or shares.shape[1]
    return Exchanges(*chosen.values(), shares, keep, growth, torch.tensor([scores]), width).refined()[0].tolist()


def test_dsnot_by_hand():
    shares, keep = [3.0, 1.0, -0.5, -2.0], [False, False, True, True]  # error 3 + 1
    scores = [9.0, 9.0, 1.0, 2.0]
    # revive 3, prune -0.5: error 0.5; revive 1, prune -2: error -2.5 would be larger
    assert exchanged(shares, keep, scores) == [True, False, False, True]
    assert exchanged(shares, keep, scores, reference=True) == [True, True, False, False]
    assert exchanged(shares, keep, scores, threshold=4.0) == keep
    assert exchanged(shares, keep, scores, cycles=1) == [True, False, False, True]
    assert exchanged([3.0, 0.0, -4.0, 2.0], [False, False, True, True], scores, same_sign=True) == keep  # 3 - 3 - 4


def test_dsnot_in_a_pattern_by_hand():
    shares, keep = [3.0, 1.0, 2.0, -2.0], [False, True, False, True]  # error 5, groups of two
    scores = [9.0, 4.0, 9.0, 2.0]
    # revive 3, prune 1: error 3; revive 2, prune -2: error -1, which is smaller, but turned round
    assert exchanged(shares, keep, scores, width=2) == [True, False, True, False]
    assert exchanged(shares, keep, scores, width=2, reference=True) == [True, False, False, True]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.sampled_from([4, 8, 20]),
    seed=st.integers(0, 999),
    pattern=st.sampled_from(["unstructured", "2:4", "1:4"]),
    score=st.sampled_from(["wanda", "magnitude", "obd"]),
    same_sign=st.booleans(),
    dead=st.booleans(),
)
def test_dsnot_keeps_the_counts_and_its_error_never_grows(rows, columns, seed, pattern, score, same_sign, dead):
    weight, inputs = layer(rows, columns, seed)
    inputs = inputs + 0.2
    if dead:
        inputs[..., :3] = 0.0
    _, start = sparity.prune_weight(weight, inputs, score=score, pattern=pattern)
    _, keep = sparity.prune_weight(weight, inputs, score=score, pattern=pattern, solver="dsnot", same_sign=same_sign)
    assert torch.equal(keep.sum(1), start.sum(1))
    if pattern != "unstructured":
        assert torch.equal(keep.view(-1, 4).sum(1), start.view(-1, 4).sum(1))
    before, after = mean_errors(weight, start, inputs), mean_errors(weight, keep, inputs)
    assert (after <= before * (1 + 1e-4) + 1e-4).all()


@pytest.mark.parametrize("solver", ["sparse_swaps", "dsnot"])
def test_blocks_are_refused(solver):
    weight, inputs = layer(8, 16)
    with pytest.raises(InvalidInput, match=f"{solver} lets single weights change places, which blocks of 4 x 4 do not"):
        sparity.prune_weight(weight, inputs, solver=solver, pattern="block:4x4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"solver": "sparse_swaps", "swaps": 0}, "at least one of swaps"),
        ({"solver": "sparse_swaps", "candidates": 0}, "at least one of candidates"),
        ({"solver": "dsnot", "cycles": 0}, "at least 1 of cycles"),
        ({"solver": "dsnot", "threshold": -1.0}, "not negative"),
    ],
)
def test_bad_options_say_what_to_do(arguments, words):
    weight, inputs = layer(4, 8)
    with pytest.raises(InvalidInput) as caught:
        sparity.prune_weight(weight, inputs, **arguments)
    assert words in str(caught.value)
