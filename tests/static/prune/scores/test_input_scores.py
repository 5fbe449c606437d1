"""The scores that read inputs, or nothing at all, worked by hand: obs, ria, random."""

import pytest
import torch

import references
import sparity
from references import layer
from sparity import registry
from sparity.calibration import Statistics


def test_obs_by_hand():
    """H = 2 diag(1, 4) damped by nothing: scores w^2 / (2 / (2 h)) = w^2 h, so 3^2*1 = 9 against 2^2*4 = 16."""
    weight, inputs = torch.tensor([[3.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    pruned, keep = sparity.prune_weight(weight, inputs, score="obs", damping=0.0, count="exact")
    assert keep.tolist() == [[False, True]]
    assert pruned.tolist() == [[0.0, 2.0]]


def test_obs_sees_that_correlated_inputs_can_replace_each_other():
    """Two almost equal channels carry large weights, but each can replace the other; the third cannot be."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 1, generator=generator)
    noise = 0.01 * torch.randn(200, 1, generator=generator)
    inputs = torch.cat([base, base + noise, torch.randn(200, 1, generator=generator)], 1)
    weight = torch.tensor([[2.0, 2.0, 1.0]])
    _, keep = sparity.prune_weight(weight, inputs, score="obs", sparsity=0.34, count="exact", damping=1e-4)
    assert keep[0, 2].item()
    _, keep = sparity.prune_weight(weight, inputs, score="wanda", sparsity=0.34)
    assert not keep[0, 2].item()


def test_random_is_the_same_each_time_and_another_with_another_seed():
    weight, _ = layer(16, 32)
    first = sparity.prune_weight(weight, score="random", seed=1)[1]
    assert torch.equal(first, sparity.prune_weight(weight, score="random", seed=1)[1])
    assert not torch.equal(first, sparity.prune_weight(weight, score="random", seed=2)[1])
    assert not torch.equal(first, sparity.prune_weight(weight + 1, score="random", seed=1)[1])


def reference_ria(weight, inputs, a):
    """RIA's formula, an entry at a time."""
    norm, size = references.input_norm(inputs), weight.double().abs()
    metric = torch.empty_like(size)
    for row in range(size.shape[0]):
        for column in range(size.shape[1]):
            share = size[row, column] / size[:, column].sum() + size[row, column] / size[row].sum()
            metric[row, column] = share * norm[column] ** a
    return metric


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_ria_equals_the_formula(a):
    weight, inputs = layer(9, 16)
    _, keep = sparity.prune_weight(weight, inputs, score="ria", a=a, sparsity=0.6)
    metric = reference_ria(weight, inputs, a)
    assert torch.equal(keep, metric > metric.flatten().sort().values[int(9 * 16 * 0.6)])
    _, keep = sparity.prune_weight(weight, inputs, score="ria", a=a, pattern="2:4")
    assert torch.equal(keep, references.n_of_m(metric, 2, 4))


def test_ria_by_hand_and_with_an_empty_row():
    weight = torch.tensor([[1.0, 3.0], [1.0, 0.0], [0.0, 0.0]])  # column sums 2 and 3, row sums 4, 1 and 0
    scores = registry.build("prune.score", {"ria": {"a": 0.0}})
    statistics = Statistics.gather("here", ["column_norm"])
    statistics.add(torch.ones(1, 2))
    assert scores.score(weight, statistics).tolist() == [[0.75, 1.75], [1.5, 0.0], [0.0, 0.0]]
