"""One constraint on the share of a model's weights: by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity.models.dimensions import Cut
from sparity.static.structure.competition import Part
from sparity.static.structure.constraints import Axis
from sparity.static.structure.weight_share import WeightShare


def share_of(rows, weights, target):
    """A constraint on axes with these log alpha, by dimension."""
    axes, parts = [], {}
    for name, values in rows.items():
        axis = Axis(name, len(values), len(values[0]), 1)
        axis.log_alpha.data.copy_(torch.tensor(values))
        axes.append(axis)
        parts[name] = [Part(Cut("down", "columns", 1), torch.zeros(axis.size), weights[name])] * axis.rows
    return WeightShare(axes, parts, target)


def closed(log_alpha):
    return 1 / (1 + math.exp(log_alpha + 2 / 3 * math.log(11)))


def test_the_share_the_lagrangian_and_their_gradients_by_hand():
    rows = {"mlp_channels": [[0.5, -1.0], [2.0, 0.0]], "kv_groups": [[1.0], [-3.0]]}
    found = share_of(rows, {"mlp_channels": 3, "kv_groups": 10}, target=0.4)
    gone = 3 * sum(closed(a) for a in (0.5, -1.0, 2.0, 0.0)) + 10 * (closed(1.0) + closed(-3.0))
    share = gone / (3 * 4 + 10 * 2)
    assert float(found.sparsity.detach()) == pytest.approx(share, rel=1e-5)
    found.linear.data.fill_(0.7)
    found.squared.data.fill_(1.3)
    miss = share - 0.75 * 0.4
    value = found.lagrangian(0.75)
    assert float(value.detach()) == pytest.approx(0.7 * miss + 1.3 * miss**2, rel=1e-5)
    value.backward()
    assert float(found.linear.grad) == pytest.approx(miss, rel=1e-5)
    assert float(found.squared.grad) == pytest.approx(miss**2, rel=1e-5)
    for axis, weights in zip(found.axes, (3, 10), strict=True):
        p = torch.tensor([[closed(a) for a in row] for row in axis.log_alpha.tolist()])
        slope = (0.7 + 2.6 * miss) * -weights * p * (1 - p) / 32
        torch.testing.assert_close(axis.log_alpha.grad, slope, rtol=1e-4, atol=1e-7)


def test_one_unit_of_each_kind_stays_in_every_block():
    found = share_of({"mlp_channels": [[0.0, 0.0]], "kv_groups": [[-1.0]]}, {"mlp_channels": 5, "kv_groups": 30}, 0.5)
    assert found.kept() == {"mlp_channels": [[1]], "kv_groups": [[0]]}  # though 20 should go


def test_the_lowest_log_alpha_go_by_their_weights():
    rows = {"mlp_channels": [[-3.0, 1.0, -1.0], [-2.0, 2.0, 3.0]], "kv_groups": [[-2.5, 4.0], [4.0, 0.0]]}
    weights = {"mlp_channels": 1, "kv_groups": 4}  # 22 in all
    assert share_of(rows, weights, 5.5 / 22).kept() == {
        "mlp_channels": [[1, 2], [0, 1, 2]],
        "kv_groups": [[1], [0, 1]],
    }
    assert share_of(rows, weights, 6 / 22).kept()["mlp_channels"] == [[1, 2], [1, 2]]
    assert share_of(rows, weights, 7 / 22).kept()["mlp_channels"] == [[1], [1, 2]]
    assert share_of(rows, weights, 10 / 22).kept()["kv_groups"] == [[1], [0, 1]]  # 11 with the next one
    assert share_of(rows, weights, 11 / 22).kept()["kv_groups"] == [[1], [0]]


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.95), st.integers(0, 1000))
def test_never_more_goes_than_the_target_and_less_than_a_unit_is_missing(target, seed):
    drawn = torch.Generator().manual_seed(seed)
    rows = {"mlp_channels": torch.randn(2, 9, generator=drawn).tolist()}
    found = share_of(rows, {"mlp_channels": 7}, target)
    kept = found.kept()["mlp_channels"]
    gone = 18 - sum(len(row) for row in kept)
    assert gone == min(int(target * 18 * (1 + 1e-9)), 18) or any(len(row) == 1 for row in kept)
    assert gone <= target * 18 * (1 + 1e-9)
