"""One threshold over all matrices: exactly the lowest scores of the whole model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity.budgets.base import Site
from sparity.errors import InvalidInput, NumericalError
from sparity.static.prune.global_threshold import GlobalThreshold
from sparity.static.prune.patterns.base import build_pattern
from sparity.static.prune.pruning import Pruning


def shares_of(matrices, target, pattern="unstructured"):
    budget = GlobalThreshold(lambda: iter(matrices.items()), build_pattern(pattern))
    return budget.allocate([Site(name, float(scores.numel())) for name, scores in matrices.items()], target)


def pruned(matrices, target, pattern="unstructured"):
    """Name -> bool mask, True where pruned, by the pattern's own rule with the shares."""
    shares = shares_of(matrices, target, pattern)
    chosen = build_pattern(pattern)
    return {
        name: ~chosen.keep(scores, shares[name], "layer") if shares[name] else torch.zeros_like(scores, dtype=bool)
        for name, scores in matrices.items()
    }


def test_by_hand():
    matrices = {"a": torch.tensor([[1.0, 2.0], [3.0, 10.0]]), "b": torch.tensor([[4.0, 20.0], [30.0, 40.0]])}
    found = pruned(matrices, 0.5)
    assert found["a"].tolist() == [[True, True], [True, False]]
    assert found["b"].tolist() == [[True, False], [False, False]]
    assert shares_of(matrices, 0.5) == {"a": 2.5 / 4, "b": 0.5 / 4}  # between the ranks, where no rounding can reach
    assert shares_of(matrices, 0.0) == {"a": 0.0, "b": 0.0}


MATRIX = st.tuples(st.integers(1, 5), st.integers(1, 6))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(MATRIX, min_size=1, max_size=4),
    st.floats(0, 0.999),
    st.sampled_from(["unstructured", "exact"]),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_exactly_the_lowest_scores_of_all_matrices_go(shapes, target, count, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for number, shape in enumerate(shapes):
        scores = torch.randn(shape, generator=generator) * 10.0 ** float(torch.randn((), generator=generator) * 3)
        matrices[str(number)] = scores.round() if ties else scores
    pattern = "unstructured" if count == "unstructured" else {"unstructured": {"count": "exact"}}
    found = pruned(matrices, target, pattern)
    everything = torch.cat([scores.flatten() for scores in matrices.values()])
    goal = int(target * len(everything))
    if not goal:
        assert not any(mask.any() for mask in found.values())
        return
    threshold = everything.sort().values[goal - 1]
    for name, scores in matrices.items():
        assert torch.equal(found[name], scores <= threshold)


def test_blocks_compete_by_their_sums():
    matrices = {"a": torch.ones(4, 4), "b": torch.full((4, 4), 3.0)}
    matrices["b"][2:, 2:] = 0.5
    found = pruned(matrices, 0.5, "block:2x2")
    assert found["a"].tolist() == [[True] * 4] * 4  # with the block of b's below them: five of eight tie or are lower
    assert found["b"].sum() == 4


def test_a_matrix_without_scores_gives_up_the_target_and_one_that_does_not_take_part_is_left_alone():
    matrices = {"a": torch.rand(4, 4), "b": torch.rand(4, 4)}
    budget = GlobalThreshold(lambda: iter(matrices.items()), build_pattern("unstructured"))
    shares = budget.allocate([Site("a", 16.0), Site("unseen", 16.0)], 0.25)
    assert shares == {"a": 3.5 / 16, "unseen": 0.25}


def test_what_cannot_be_compared():
    with pytest.raises(NumericalError, match="scores hold NaN"):
        shares_of({"a": torch.tensor([[1.0, float("nan")]])}, 0.5)
    with pytest.raises(InvalidInput, match="2 of 4 kept leaves nothing to compare across layers"):
        Pruning.of(score="wanda", pattern="2:4", compare_within="global")


def test_a_matrix_that_loses_nearly_everything_is_told(caplog):
    shares_of({"a": torch.zeros(10, 20), "b": torch.ones(10, 20)}, 0.5)
    assert "a: the global threshold removes 99.8 % of it" in caplog.text
