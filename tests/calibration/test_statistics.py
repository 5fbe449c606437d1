import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
from sparity.calibration.statistics import STATISTICS, Statistics
from sparity.errors import InvalidInput, NumericalError


def gathered(inputs, needs=tuple(STATISTICS)):
    statistics = Statistics.gather("here", needs)
    statistics.add(inputs)
    return statistics


def test_by_hand():
    inputs = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 2.0], [0.0, 4.0]]])  # 2 sequences of 2 tokens
    statistics = gathered(inputs)
    assert (statistics.sequences, statistics.tokens) == (2, 4)
    assert statistics.mean.tolist() == [1.0, 2.0]
    torch.testing.assert_close(statistics.column_norm, torch.tensor([5.0**0.5, 12.0**0.5]))
    assert statistics.gram.tolist() == [[10.0, 2.0], [2.0, 24.0]]
    assert statistics.hessian.tolist() == [[10.0, 2.0], [2.0, 24.0]]  # 2/2 of it


def test_equal_to_the_running_sums_of_the_reference_code():
    inputs = torch.randn(5, 7, 6)
    statistics = gathered(inputs)
    torch.testing.assert_close(statistics.column_norm.double(), references.input_norm(inputs), rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics.hessian.double(), references.hessian(inputs), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_two_halves_merged_are_the_whole(first, second, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(first + second, 4, columns, generator=generator)
    whole, halves = gathered(inputs), gathered(inputs[:first]).merge(gathered(inputs[first:]))
    assert (halves.sequences, halves.tokens) == (whole.sequences, whole.tokens)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(halves, name), getattr(whole, name), rtol=1e-4, atol=1e-5)


def test_inverse_factor_gives_the_inverse_of_every_remaining_sub_problem():
    inputs = torch.randn(4, 30, 6)
    factor, dead = gathered(inputs).inverse_factor(0.01)
    matrix = references.hessian(inputs)
    matrix += 0.01 * matrix.diagonal().mean() * torch.eye(6)
    assert not dead.any()
    for column in range(6):
        expected = torch.linalg.inv(matrix[column:, column:])[0, 0]
        assert float(factor[column, column]) ** 2 == pytest.approx(float(expected), rel=1e-4)


def test_a_dead_channel_has_a_diagonal_of_one():
    inputs = torch.randn(2, 20, 4)
    inputs[..., 2] = 0
    factor, dead = gathered(inputs).inverse_factor(0.0)
    assert dead.tolist() == [False, False, True, False]
    assert float(factor[2, 2]) == pytest.approx(1.0)


def test_errors():
    with pytest.raises(InvalidInput, match="unknown statistics"):
        Statistics.gather("here", ["colum_norm"])
    with pytest.raises(InvalidInput, match='"gram" was not gathered'):
        _ = gathered(torch.ones(1, 2, 3), ["mean"]).gram
    with pytest.raises(NumericalError, match="here: no calibration token reached it"):
        _ = Statistics.gather("here", ["mean"]).mean
    with pytest.raises(NumericalError, match="here: the inputs hold NaN"):
        gathered(torch.full((1, 2, 3), torch.nan), ["mean"])
    with pytest.raises(InvalidInput, match="different kinds"):
        gathered(torch.ones(1, 2, 3), ["mean"]).merge(gathered(torch.ones(1, 2, 3), ["gram"]))
