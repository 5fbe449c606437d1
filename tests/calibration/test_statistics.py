import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
from sparity.calibration.input_statistics import gram
from sparity.calibration.statistics import Statistics
from sparity.errors import InvalidInput, NumericalError

OWN = ("column_norm", "gram", "histogram", "mean")


def gathered(inputs, needs=OWN):
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
    for name in OWN:
        torch.testing.assert_close(getattr(halves, name), getattr(whole, name), rtol=1e-4, atol=1e-5)


def test_gram_matrices_are_summed_in_panels_of_their_upper_half(monkeypatch):
    monkeypatch.setattr(gram, "PANEL", 3)
    inputs = torch.randn(2, 9, 8)
    statistics = gathered(inputs)
    x = inputs.reshape(-1, 8)
    assert float(statistics.sums["gram"][3:, :3].abs().max()) == 0
    torch.testing.assert_close(statistics.gram, x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.gram, statistics.gram.T, rtol=0, atol=1e-5)
    before = statistics.inverse_factor(0.01)[0].clone()
    statistics.add(inputs)
    torch.testing.assert_close(statistics.gram, 2 * x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.inverse_factor(0.01)[0], before, rtol=1e-4, atol=1e-5)  # the same mean


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.floats(0, 1))
def test_the_histogram_gives_quantiles_within_one_percent(values, share):
    statistics = gathered(torch.tensor(values)[:, None], ["histogram"])
    sizes = sorted(abs(value) for value in values)
    exact = sizes[max(math.ceil(share * len(sizes)) - 1, 0)]
    assert int(statistics.histogram.sum()) == len(values)
    found = statistics.magnitude_at(share)
    assert found <= exact <= found * (1 + 2**-7) + 1e-40


def test_a_histogram_by_hand():
    statistics = gathered(torch.tensor([[0.0, -1.0], [1.0, 2.0]]), ["histogram"])
    bins = {0x0000: 1, 0x3F80: 2, 0x4000: 1}  # the upper halves of 0.0, 1.0 and 2.0
    assert {index: int(n) for index, n in enumerate(statistics.histogram) if n} == bins
    assert [statistics.magnitude_at(share) for share in (0, 0.25, 0.5, 0.75, 1)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_histogram_notices_what_is_not_finite(bad):
    with pytest.raises(NumericalError, match="NaN or infinite"):
        gathered(torch.tensor([[1.0, bad]]), ["histogram"])


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


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_where_no_channel_fired_every_one_is_dead(damping, scale):
    factor, dead = gathered(torch.full((2, 20, 4), scale)).inverse_factor(damping)
    assert dead.all()
    torch.testing.assert_close(factor, torch.eye(4) / (1 + damping) ** 0.5)


def test_errors():
    with pytest.raises(
        InvalidInput, match=r"unknown statistics \['colum_norm'\]; did you mean \"column_norm\"\? \(known: "
    ):
        Statistics.gather("here", ["colum_norm"])
    with pytest.raises(InvalidInput, match='"gram" was not gathered'):
        _ = gathered(torch.ones(1, 2, 3), ["mean"]).gram
    with pytest.raises(NumericalError, match="here: no calibration token reached it"):
        _ = Statistics.gather("here", ["mean"]).mean
    with pytest.raises(NumericalError, match="here: the inputs hold NaN"):
        gathered(torch.full((1, 2, 3), torch.nan), ["mean"])
    with pytest.raises(InvalidInput, match="different kinds"):
        gathered(torch.ones(1, 2, 3), ["mean"]).merge(gathered(torch.ones(1, 2, 3), ["gram"]))
