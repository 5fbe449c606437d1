"""ADMM, ALPS and Thanos against the published algorithms written plainly, by hand, and against one another."""

import pytest
import solver_references as plain
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
import sparity
from references import layer
from sparity.errors import InvalidInput
from sparity.static.prune.solvers.admm import gradual

CLOSE = {"rtol": 2e-3, "atol": 2e-4}
LAYERWISE = {"compare_within": "layer", "count": "exact"}


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("at_once", [False, True])
def test_admm_is_the_published_iteration(sparsity, at_once):
    weight, inputs = layer(8, 24)
    found, keep = sparity.prune_weight(weight, inputs, solver="admm", sparsity=sparsity, at_once=at_once, **LAYERWISE)
    expected, mask = plain.admm(weight, inputs, sparsity, at_once=at_once)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(found.double(), expected, **CLOSE)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
def test_admm_in_a_pattern_is_the_published_iteration(pattern):
    weight, inputs = layer(6, 24)
    found, keep = sparity.prune_weight(weight, inputs, solver="admm", pattern=f"{pattern[0]}:{pattern[1]}")
    expected, mask = plain.admm(weight, inputs, pattern=pattern)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(found.double(), expected, **CLOSE)


def test_admm_for_a_given_mask_comes_to_its_best_weights():
    weight, inputs = layer(6, 20)
    found, keep = sparity.prune_weight(weight, inputs, score="ria", solver="admm", iterations=400, damping=1e-4)
    best = references.least_squares(weight, inputs, keep)
    assert torch.equal(keep, sparity.prune_weight(weight, inputs, score="ria")[1])
    torch.testing.assert_close(found.double(), best, rtol=0.02, atol=0.02)


def test_admm_without_rounds_keeps_the_mask_of_wanda():
    weight, inputs = layer(6, 20)
    _, keep = sparity.prune_weight(weight, inputs, solver="admm", rounds=0, compare_within="row")
    assert torch.equal(keep, references.wanda(weight, inputs, 0.5))


def test_gradual_takes_the_smallest_of_what_goes_first():
    keep = torch.tensor([[True, False, False], [False, True, False]])
    weight = torch.tensor([[9.0, -2.0, 1.0], [3.0, 9.0, 4.0]])
    assert gradual(keep, weight, 0.5).tolist() == [[True, False, False], [True, True, True]]
    assert gradual(keep, weight, 0.0).all()
    assert torch.equal(gradual(keep, weight, 1.0), keep)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_alps_is_the_published_search(sparsity, seed):
    weight, inputs = layer(8, 24, seed)
    found, keep = sparity.prune_weight(weight, inputs, solver="alps", sparsity=sparsity, **LAYERWISE)
    expected, mask = plain.alps(weight, inputs, sparsity)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(found.double(), expected, **CLOSE)


def test_alps_for_a_given_mask_is_least_squares():
    weight, inputs = layer(6, 20)
    for pattern in ("unstructured", "2:4"):
        options = {"score": "magnitude", "pattern": pattern}
        found, keep = sparity.prune_weight(weight, inputs, solver="alps", damping=1e-6, refinements=60, **options)
        assert torch.equal(keep, sparity.prune_weight(weight, **options)[1])
        torch.testing.assert_close(found.double(), references.least_squares(weight, inputs, keep), **CLOSE)


def test_alps_by_hand():
    """Two equal inputs: the weight of the one that goes, whichever it is, moves to the other."""
    weight = torch.tensor([[3.0, 2.0]])
    inputs = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]])
    found, keep = sparity.prune_weight(weight, inputs, solver="alps", damping=1e-6, count="exact")
    assert keep.sum() == 1
    torch.testing.assert_close(found[keep], torch.tensor([5.0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("width", [8, 24, 64])
def test_thanos_is_the_published_algorithm(sparsity, width):
    weight, inputs = layer(7, 64)
    found, keep = sparity.prune_weight(
        weight, inputs, solver="thanos", sparsity=sparsity, block_columns=width, **LAYERWISE
    )
    expected, mask = plain.thanos(weight, inputs, sparsity, width=width)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [(2, 4), (3, 8)])
def test_thanos_goes_group_by_group_in_a_pattern(pattern):
    weight, inputs = layer(7, 48)
    found, keep = sparity.prune_weight(weight, inputs, solver="thanos", pattern=f"{pattern[0]}:{pattern[1]}")
    expected, mask = plain.thanos(weight, inputs, pattern=pattern, width=pattern[1])
    assert torch.equal(keep, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_thanos_in_one_block_is_least_squares_of_the_damped_layer():
    weight, inputs = layer(6, 40)
    for score in (None, "magnitude"):
        found, keep = sparity.prune_weight(weight, inputs, solver="thanos", score=score, damping=0.02)
        best = references.least_squares(weight, inputs, keep, damping=0.02)
        torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize("seed", range(3))
def test_the_solvers_come_in_the_order_of_their_freedom(pattern, seed):
    """Of 64 inputs that belong together: those that search the mask and all weights are closer than SparseGPT."""
    weight, inputs = layer(32, 64, seed)
    errors = {
        solver: references.output_error(
            weight, sparity.prune_weight(weight, inputs, solver=solver, pattern=pattern)[0], inputs
        )
        for solver in ("mask_only", "sparsegpt", "admm", "alps")
    }
    assert errors["alps"] < errors["sparsegpt"] < errors["mask_only"]
    assert errors["admm"] < errors["sparsegpt"]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 24),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 999),
    solver=st.sampled_from(["admm", "alps", "thanos"]),
    score=st.sampled_from([None, "magnitude"]),
    tokens=st.integers(1, 40),
)
def test_any_layer_few_tokens_too(rows, columns, sparsity, seed, solver, score, tokens):
    weight, inputs = layer(rows, columns, seed, tokens=tokens)
    found, keep = sparity.prune_weight(weight, inputs, solver=solver, score=score, sparsity=sparsity)
    assert found.isfinite().all()
    assert (found[~keep] == 0).all()
    plainly = references.output_error(weight, torch.where(keep, weight, 0.0), inputs)
    assert references.output_error(weight, found, inputs) <= plainly * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"solver": "admm", "damping": 0.0}, "must lie in (0, 1]"),
        ({"solver": "admm", "rounds": 21}, "0 <= rounds <= iterations"),
        ({"solver": "admm", "iterations": 0}, "0 <= rounds <= iterations"),
        ({"solver": "alps", "damping": 2.0}, "must lie in (0, 1]"),
        ({"solver": "alps", "iterations": 0}, "at least 1 of iterations"),
        ({"solver": "thanos", "block_columns": 0}, "at least 1"),
        ({"solver": "thanos", "damping": -1.0}, "must lie in [0, 1]"),
    ],
)
def test_bad_options_say_what_to_do(arguments, words):
    weight, inputs = layer(4, 8)
    with pytest.raises(InvalidInput) as caught:
        sparity.prune_weight(weight, inputs, **arguments)
    assert words in str(caught.value)
