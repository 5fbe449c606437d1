"""The rule by which channels are skipped, on hand-worked inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparity.engine.kernels.skip.reference import SkipRule
from sparity.errors import InvalidInput

X = torch.tensor([[1.0, -2.0, 0.5, 4.0], [-8.0, 0.0, 1.0, -1.0]])
NAN = float("nan")


def everywhere(value: float) -> Tensor:
    return torch.tensor(value)


def test_a_channel_counts_strictly_above_the_threshold():
    rule = SkipRule(everywhere(1.0))
    assert rule.keep(X).tolist() == [[False, True, False, True], [True, False, False, False]]
    assert rule.apply(X).tolist() == [[0, -2, 0, 4], [-8, 0, 0, 0]]


def test_each_channel_may_have_a_threshold_and_a_centre():
    rule = SkipRule(torch.tensor([0.0, 1.0, 2.0, torch.inf]), torch.tensor([1.0, -1.0, 0.0, 0.0]))
    assert rule.keep(X).tolist() == [[False, False, False, False], [True, False, False, False]]
    assert rule.apply(X).tolist() == [[0, 0, 0, 0], [-9, 0, 0, 0]]


def test_rms_scales_with_the_token():
    """The rms of the first token is sqrt(21.25 / 4) = 2.305, of the second sqrt(66 / 4) = 4.062."""
    assert SkipRule(everywhere(0.5), scale="rms").keep(X).tolist() == [
        [False, True, False, True],
        [True, False, False, False],
    ]
    assert torch.equal(
        SkipRule(everywhere(0.3), scale="rms").keep(X), SkipRule(everywhere(0.3), scale="rms").keep(1024 * X)
    )


def test_top_keeps_a_number_of_channels_and_of_equals_the_first():
    assert SkipRule(everywhere(1.0), scale="top", kept=2).keep(X).tolist() == [
        [False, True, False, True],
        [True, False, True, False],
    ]


def test_top_divides_by_the_thresholds():
    """|x| / t of the first token: 10, 2, 5, 4."""
    rule = SkipRule(torch.tensor([0.1, 1.0, 0.1, 1.0]), scale="top", kept=2)
    assert rule.keep(X)[0].tolist() == [True, False, True, False]


def test_statistical_counts_deviations_from_the_mean():
    """|x| of the first token: mean 1.875, deviation sqrt(1.797) = 1.34; of the second: mean 2.5, deviation 3.2."""
    assert SkipRule(everywhere(1.0), scale="statistical", deviations=1.0).keep(X).tolist() == [
        [False, False, False, True],
        [True, False, False, False],
    ]
    assert SkipRule(everywhere(1.0), scale="statistical").keep(X)[0].tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "rule",
    [
        SkipRule(everywhere(torch.inf)),
        SkipRule(everywhere(torch.inf), scale="rms"),
        SkipRule(everywhere(1.0), scale="top", kept=1),
        SkipRule(everywhere(1.0), scale="statistical", deviations=9.0),
    ],
)
def test_nan_counts_and_reaches_the_output(rule: SkipRule):
    x = torch.tensor([[1.0, NAN, 3.0, NAN]])
    assert rule.apply(x).isnan().tolist() == [[False, True, False, True]]


def test_an_infinite_threshold_leaves_the_centre_alone():
    centre = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert not SkipRule(everywhere(torch.inf), centre).apply(X).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_threshold_is_the_input_bit_for_bit(dtype: torch.dtype):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert SkipRule(everywhere(0.0)).idle
    assert torch.equal(SkipRule(everywhere(0.0)).apply(x), x)
    assert not SkipRule(everywhere(0.0), x[0]).idle
    assert not SkipRule(torch.tensor([0.0, 0.1])).idle


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_top_keeps_just_as_many_as_asked(columns: int, kept: int, seed: int):
    x = torch.randint(-3, 4, (3, columns), generator=torch.Generator().manual_seed(seed)).float()
    counts = SkipRule(everywhere(0.5), scale="top", kept=kept).keep(x)
    assert counts.sum(-1).tolist() == [min(kept, columns)] * 3
    smallest = x.abs().masked_fill(~counts, torch.inf).amin(-1)
    assert (x.abs().masked_fill(counts, -1).amax(-1) <= smallest).all()


def test_numbers_that_are_no_rule_are_refused():
    with pytest.raises(InvalidInput, match="keep 1 or more, not 0"):
        SkipRule(everywhere(1.0), scale="top")
    with pytest.raises(InvalidInput, match="a finite number"):
        SkipRule(everywhere(1.0), scale="statistical", deviations=NAN)
