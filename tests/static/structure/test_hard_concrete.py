"""Hard concrete masks and the constraints on them, against the published formulas worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparity.static.structure.constraints import Axis, lagrangian
from sparity.static.structure.hard_concrete import LIMIT, draw, probability, settled

numbers = st.floats(-4.5, 4.5, width=32)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def axis(log_alpha, left, name="mlp_channels"):
    values = torch.tensor(log_alpha)
    found = Axis(name, *values.shape, left)
    found.log_alpha.data.copy_(values)
    return found


@pytest.mark.parametrize(("log_alpha", "u"), [(0.0, 0.5), (2.0, 0.9), (-1.0, 0.7), (4.0, 0.999), (-4.0, 0.2)])
def test_quantiles_by_hand(log_alpha, u):
    stretched = sigmoid((math.log(u) - math.log(1 - u) + log_alpha) * 3 / 2) * 1.2 - 0.1
    found = draw(torch.tensor([log_alpha]), torch.tensor([u]))
    assert float(found) == pytest.approx(min(max(stretched, 0), 1), abs=1e-6)
    assert float(draw(torch.zeros(1), torch.full((1,), 0.5))) == pytest.approx(0.5)


def test_uniform_numbers_at_the_ends_are_finite():
    for log_alpha in (-LIMIT, 0.0, LIMIT):
        values = torch.full((2,), log_alpha, requires_grad=True)
        found = draw(values, torch.tensor([0.0, 1.0]))
        assert found.tolist() == [0.0, 1.0]
        found.sum().backward()
        assert torch.isfinite(values.grad).all()


def test_expected_norm_by_hand():
    # 1 - sigmoid(2/3 log(1/11)) = 1 - 1 / (1 + 11^(2/3))
    assert float(probability(torch.zeros(1))) == pytest.approx(1 - 1 / (1 + 11 ** (2 / 3)), abs=1e-6)
    assert float(probability(torch.tensor([math.log(3)]))) == pytest.approx(1 - 1 / (1 + 3 * 11 ** (2 / 3)), abs=1e-6)


@given(numbers, st.floats(1e-4, 1 - 1e-4))
def test_a_mask_is_open_as_often_as_its_probability_says(log_alpha, u):
    value = torch.tensor([log_alpha], dtype=torch.float64)
    closed = 1 - float(probability(value))
    if abs(u - closed) > 1e-6:
        assert bool(draw(value, torch.tensor([u], dtype=torch.float64)) > 0) == (u > closed)


@given(st.lists(numbers, min_size=1, max_size=12), st.data())
def test_settled_masks_keep_exactly_as_many(values, data):
    count = data.draw(st.integers(1, len(values)))
    log_alpha = torch.tensor([values, values[::-1]])
    found = settled(log_alpha, count)
    assert found.count_nonzero(1).tolist() == [count, count]
    for row, given_row in zip(found, log_alpha, strict=True):
        kept = row != 0
        assert torch.allclose(row[kept], torch.sigmoid(1.2 * given_row[kept]))
        assert kept.all() or given_row[kept].min() >= given_row[~kept].max()


def test_the_lagrangian_and_its_gradients_by_hand():
    found = axis([[0.5, -1.0, 2.0], [0.0, 3.0, -2.0]], left=2)
    found.linear.data.fill_(0.7)
    found.squared.data.fill_(1.3)
    open_ = [[1 - sigmoid(2 / 3 * math.log(1 / 11) - a) for a in row] for row in found.log_alpha.tolist()]
    target = 0.6 * (1 - 2 / 3)  # three fifths of the warm-up
    miss = [1 - sum(row) / 3 - target for row in open_]
    value = found.lagrangian(0.6)
    assert float(value.detach()) == pytest.approx(sum(0.7 * m + 1.3 * m * m for m in miss) / 2, rel=1e-5)
    value.backward()
    assert float(found.linear.grad) == pytest.approx(sum(miss) / 2, rel=1e-5)
    assert float(found.squared.grad) == pytest.approx(sum(m * m for m in miss) / 2, rel=1e-5)
    slope = [[-(0.7 + 2.6 * m) / 2 * p * (1 - p) / 3 for p in row] for m, row in zip(miss, open_, strict=True)]
    torch.testing.assert_close(found.log_alpha.grad, torch.tensor(slope), rtol=1e-4, atol=1e-7)


def test_the_lagrangian_sums_over_axes_and_starts_without_a_force():
    axes = [Axis("mlp_channels", 2, 4, 1), Axis("depth", 1, 3, 2)]
    assert float(lagrangian(axes, 1.0).detach()) == 0
    for each in axes:
        each.squared.data.fill_(1.0)
    dense = 1 - float(probability(torch.tensor([LIMIT])))
    assert float(lagrangian(axes, 1.0).detach()) == pytest.approx((dense - 3 / 4) ** 2 + (dense - 1 / 3) ** 2, rel=1e-5)


def test_log_alpha_stays_within_its_range():
    found = axis([[9.0, -9.0]], left=1)
    found.clamp()
    assert found.log_alpha.tolist() == [[pytest.approx(math.log(100)), pytest.approx(math.log(0.01))]]


def test_drawn_masks_follow_the_seed():
    found = axis([[0.0] * 6], left=3)
    first, again, other = (found.draw(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
