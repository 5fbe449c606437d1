"""The errors of a block's output, by hand."""

import pytest
import torch

from sparity.quality.block_error import BLOCK_ERRORS, teal_error, token_error

DENSE = torch.zeros(8, 2)
FOUND = torch.tensor([[3.0, 4.0], *[[0.0, 0.0]] * 5, [6.0, 0.0], [8.0, 5.0]])


def test_the_norm_of_each_token_mean_over_tokens():
    assert token_error(DENSE, FOUND) == pytest.approx((5 + 6 + 89**0.5) / 8)


def test_teals_norm_over_the_last_quarter_of_positions_mean_over_channels():
    assert teal_error(DENSE, FOUND) == pytest.approx((10 + 5) / 2)
    assert teal_error(DENSE[:3], FOUND[5:]) == pytest.approx((8 + 5) / 2)  # the last alone: a quarter of 3 is none


def test_half_precision_is_compared_in_float32():
    dense = torch.full((1, 4), 256.0, dtype=torch.bfloat16)
    for error in BLOCK_ERRORS.values():
        assert error(dense, dense) == 0.0
        assert error(dense, dense + 2) > 0.0
