"""LLM Surgeon's elements: the cost of one, what makes up for it, many at once; against dense inverses and by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
import sparity
from references import layer
from sparity import registry
from sparity.calibration import Statistics
from sparity.calibration.statistics import OUTPUT_GRAM
from sparity.errors import InvalidInput

NAME, TINY = "llm_surgeon", 1e-6
UNDAMPED = {"damping": TINY, "output_damping": TINY}
CLOSE = {"rtol": 2e-3, "atol": 2e-4}


def rows_of(matrix):
    """As many rows as it has columns whose mean of x xT the matrix is."""
    return torch.linalg.cholesky(matrix).T * len(matrix) ** 0.5


def slopes(rows, seed=0, tokens=90):
    """Correlated gradients at the outputs, `[samples, tokens, rows]`."""
    generator = torch.Generator().manual_seed(seed + 1000)
    mixing = torch.eye(rows) + torch.randn(rows, rows, generator=generator) / rows**0.5
    return torch.randn(3, tokens // 3, rows, generator=generator) @ mixing


def curvature(inputs, gradients, damping=0.01, output_damping=0.1):
    """G `[out, out]` and A `[in, in]`, damped, in float64."""
    found = []
    for samples, strength in ((gradients, output_damping), (inputs, damping)):
        x = samples.double().flatten(0, -2)
        matrix = x.T @ x / len(x)
        found.append(matrix + strength * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64))
    return found


def loss(before, after, outputs, inputs):
    change = before.double() - after.double()
    return float(0.5 * (outputs @ change @ inputs @ change.T).trace())


def best(weight, keep, outputs, inputs):
    """The weights of a mask where the loss is least, by the dense Fisher of all weights."""
    fisher, kept = torch.kron(outputs, inputs), keep.flatten()
    found = torch.zeros(weight.numel(), dtype=torch.float64)
    right = fisher[kept] @ weight.double().flatten()
    found[kept] = torch.linalg.solve(fisher[kept][:, kept], right)
    return found.view(weight.shape)


def published(weight, keep, outputs, inputs, correlated):
    """The update of `pruner.py`: groups of rows that lose at most so many weights, each sees those before it."""
    inverse_outputs, inverse_inputs = torch.linalg.inv(outputs), torch.linalg.inv(inputs)
    groups, size = [[]], 0
    for row, lost in enumerate((~keep).sum(1).tolist()):
        if size + lost > correlated and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += lost
    change = torch.zeros(weight.shape, dtype=torch.float64)
    for group in groups:
        chosen = torch.zeros_like(keep)
        chosen[group] = ~keep[group]
        i, j = chosen.nonzero(as_tuple=True)
        known = inverse_outputs[i][:, i] * inverse_inputs[j][:, j]
        spread = torch.zeros(weight.shape, dtype=torch.float64)
        spread[i, j] = torch.linalg.solve(known, (weight.double() + change)[i, j])
        change -= inverse_outputs @ spread @ inverse_inputs
    return torch.where(keep, weight.double() + change, 0.0)


def test_one_weight_by_hand():
    matrix = torch.tensor([[2.0, 1], [1, 2]])
    inputs = gradients = rows_of(matrix)
    weight = torch.tensor([[3.0, 10], [20, 30]])
    statistics = Statistics.gather("here", ["gram"])
    statistics.add(inputs)
    known = statistics.with_gradients({OUTPUT_GRAM: matrix})
    # both inverses are [[2, -1], [-1, 2]] / 3: w^2 / (2 * 4 / 9)
    costs = registry.create("prune.score", NAME, UNDAMPED).score(weight, known)
    torch.testing.assert_close(costs, weight.square() * 9 / 8, rtol=1e-4, atol=0.0)
    options = {"solver": NAME, "sparsity": 0.25, "count": "exact", **UNDAMPED}
    found, keep = sparity.prune_weight(weight, inputs, output_gradients=gradients, **options)
    assert keep.tolist() == [[False, True], [True, True]]
    # of the 3 its row and its column take half each, and the corner gives a quarter
    torch.testing.assert_close(found, torch.tensor([[0.0, 11.5], [21.5, 29.25]]), rtol=1e-4, atol=1e-4)
    assert found[0, 0] == 0


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(2, 6), seed=st.integers(0, 999))
def test_one_weight_is_the_exact_surgeon_and_its_cost_the_loss(rows, columns, seed):
    weight, inputs = layer(rows, columns, seed)
    gradients = slopes(rows, seed)
    found, keep = sparity.prune_weight(
        weight, inputs, output_gradients=gradients, solver=NAME, sparsity=1 / weight.numel(), count="exact"
    )
    outputs, known = curvature(inputs, gradients)
    inverse = torch.linalg.inv(torch.kron(outputs, known))
    costs = weight.double().flatten().square() / (2 * inverse.diagonal())
    place = int(costs.argmin())
    assert (~keep).flatten().nonzero().flatten().tolist() == [place]
    change = -weight.flatten()[place] * inverse[:, place] / inverse[place, place]
    torch.testing.assert_close(found.double(), weight.double() + change.view(weight.shape), **CLOSE)
    assert loss(weight, found, outputs, known) == pytest.approx(float(costs[place]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("score", [None, "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x4"])
def test_many_weights_at_once_are_where_the_loss_is_least(pattern, score):
    weight, inputs = layer(8, 12)
    gradients = slopes(8)
    arguments = {"solver": NAME, "score": score, "pattern": pattern, "refinements": 96}
    found, keep = sparity.prune_weight(weight, inputs, output_gradients=gradients, **arguments)
    outputs, known = curvature(inputs, gradients)
    torch.testing.assert_close(found.double(), best(weight, keep, outputs, known), **CLOSE)
    together = published(weight, keep, outputs, known, correlated=96)
    torch.testing.assert_close(found.double(), together, **CLOSE)
    groups = published(weight, keep, outputs, known, correlated=12)
    assert loss(weight, found, outputs, known) < loss(weight, groups, outputs, known)


def test_the_mask_of_a_pattern_is_that_of_the_costs():
    weight, inputs = layer(6, 16)
    gradients = slopes(6)
    outputs, known = (torch.linalg.inv(matrix).diagonal() for matrix in curvature(inputs, gradients))
    costs = weight.double().square() / outputs[:, None] / known
    found = {
        pattern: sparity.prune_weight(weight, inputs, output_gradients=gradients, solver=NAME, pattern=pattern)[1]
        for pattern in ("2:4", "unstructured")
    }
    assert torch.equal(found["2:4"], references.n_of_m(costs, 2, 4))
    assert torch.equal(found["unstructured"], costs > costs.flatten().sort().values[48])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_outputs_that_count_alike_give_the_surgeon_of_the_layer(pattern):
    weight, inputs = layer(6, 20)
    gradients = rows_of(torch.eye(6))
    given = {"output_gradients": gradients, "pattern": pattern}
    alone = sparity.prune_weight(weight, inputs, score="obs", **given)[1]
    found, keep = sparity.prune_weight(weight, inputs, solver=NAME, **given)
    assert torch.equal(keep, alone)
    torch.testing.assert_close(found.double(), references.least_squares(weight, inputs, keep, 0.01), **CLOSE)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 20),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 999),
    refinements=st.integers(1, 60),
    tokens=st.integers(1, 40),
    score=st.sampled_from([None, "magnitude"]),
)
def test_never_worse_than_zeroing_with_zeros_that_are_exact(rows, columns, sparsity, seed, refinements, tokens, score):
    weight, inputs = layer(rows, columns, seed, tokens=tokens)
    gradients = slopes(rows, seed)
    arguments = {"solver": NAME, "sparsity": sparsity, "refinements": refinements, "score": score}
    found, keep = sparity.prune_weight(weight, inputs, output_gradients=gradients, **arguments)
    outputs, known = curvature(inputs, gradients)
    assert (found[~keep] == 0).all()
    plain = loss(weight, torch.where(keep, weight, 0.0), outputs, known)
    assert loss(weight, found, outputs, known) <= plain * (1 + 1e-4) + 1e-6


def test_a_second_shot_keeps_the_zeros_of_the_first():
    weight, inputs = layer(8, 16)
    given = {"output_gradients": slopes(8), "solver": NAME}
    first, kept = sparity.prune_weight(weight, inputs, pattern="3:4", **given)
    second, keep = sparity.prune_weight(first, inputs, pattern="2:4", **given)
    assert not (keep & ~kept).any()
    assert torch.equal(second != 0, keep)


def test_an_output_that_makes_no_difference_goes_first_and_counts_for_no_other():
    weight, inputs = layer(4, 8)
    gradients = slopes(4)
    gradients[..., 2] = 0
    found, keep = sparity.prune_weight(weight, inputs, output_gradients=gradients, solver=NAME, sparsity=0.2)
    assert (~keep).nonzero()[:, 0].tolist() == [2] * 8
    assert torch.equal(found[[0, 1, 3]], weight[[0, 1, 3]])
    found, keep = sparity.prune_weight(weight, inputs, output_gradients=0 * gradients, solver=NAME, sparsity=0.2)
    assert not keep.any()  # all cost nothing, and ties go together
    assert not found.any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"output_gradients": None}, "needs the statistics output_gradient_gram: pass `output_gradients`"),
        ({"output_gradients": torch.ones(3, 5)}, r"must be \[tokens, 4\] or \[samples, tokens, 4\], got \[3, 5\]"),
        ({"output_gradients": [1.0]}, "output_gradients must be a torch tensor, got list"),
        ({"damping": 0.0}, r"both must lie in \(0, 1\]"),
        ({"output_damping": 2.0}, r"both must lie in \(0, 1\]"),
        ({"refinements": 0}, "at least 1, or the score llm_surgeon alone"),
    ],
)
def test_bad_input_says_what_to_do(arguments, words):
    weight, inputs = layer(4, 8)
    with pytest.raises(InvalidInput, match=words):
        sparity.prune_weight(weight, inputs, **{"output_gradients": slopes(4), "solver": NAME, **arguments})
