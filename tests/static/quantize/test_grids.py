"""The grids: worked by hand, and the laws that all of them obey."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity import registry
from sparity.errors import InvalidInput, NumericalError
from sparity.formats.encodings.int4 import Int4
from sparity.static.quantize.grids.codebook import Codebook
from sparity.static.quantize.grids.e4m3 import E4M3
from sparity.static.quantize.grids.integers import Integers
from sparity.static.quantize.grids.nf4 import NF4, normal_entries
from sparity.static.quantize.quantizing import build_grid

GRIDS = [
    *(Integers(width, symmetric) for width in (2, 3, 4, 8) for symmetric in (True, False)),
    *(Integers(width, even=True) for width in (2, 4, 8)),
    *(Integers(width, signed=True) for width in (2, 4, 8)),
    Integers(4, scale_type="float16"),
    NF4(),
    E4M3(),
    Codebook((-1.0, 0.0, 0.25, 1.0)),
]
# bitsandbytes, `functional.py`: the values of NF4 as QLoRA's authors list them
PUBLISHED_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def rounded(grid, weight):
    fitted = grid.fit(weight)
    return grid.codes(weight, fitted.scales[:, None], fitted.zeros[:, None]), fitted


def test_symmetric_integers_by_hand():
    weight = torch.tensor([[-7.5, 3.6, 0.4, 7.5]])  # a step of 2 * 7.5 / 15 = 1
    codes, fitted = rounded(Integers(4), weight)
    assert (fitted.scales.tolist(), fitted.zeros.tolist()) == ([1.0], [0.0])
    assert codes.tolist() == [[-8, 4, 0, 7]]  # ties to even, and 8 is no code
    codes, fitted = rounded(Integers(4, even=True), torch.tensor([[-7.0, 3.6, 0.5, 1.5]]))
    assert (fitted.scales.tolist(), codes.tolist()) == ([1.0], [[-7, 4, 0, 2]])


def test_of_two_scales_the_one_that_loses_less_by_hand():
    weight = torch.tensor([[8.0, 3.0, -2.0, 1.0], [-8.0, 3.0, -2.0, 1.0], [7.5, -7.5, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    codes, fitted = rounded(Integers(4, signed=True), weight)
    assert fitted.scales.tolist() == [-1.0, 1.0, 1.0, 1.0]  # -8 / 8, 8 / 8; 15 / 15 where both ends are as far
    assert codes.tolist() == [[-8, -3, 2, -1], [-8, 3, -2, 1], [7, -8, 1, 2], [0, 0, 0, 0]]
    assert Integers(4, signed=True).nearest(weight[:2], fitted.scales[:2, None], torch.zeros(1)).equal(weight[:2])


@settings(max_examples=30, deadline=None)
@given(group=st.sampled_from([32, 64]), seed=st.integers(0, 999), size=st.sampled_from([1e-3, 1.0, 50.0]))
def test_signed_integers_are_those_of_the_encoding_int4_and_lose_no_more_than_unsigned(group, seed, size):
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(seed)) * size
    for kept in ("bfloat16", "float32"):
        grid, groups = Integers(4, signed=True, scale_type=kept), weight.view(-1, group)
        scales = grid.fit(groups).scales[:, None]
        values, encoding = grid.nearest(groups, scales, torch.zeros(1)), Int4(group, scale_type=kept)
        stored, sides = encoding.encode(weight)
        assert torch.equal(sides["scales"].float().view(-1, 1), scales)
        assert torch.equal(encoding.decode(stored, sides, torch.float32), values.view(weight.shape))
        assert encoding.on_grid(values.view(5, -1), {"scales": scales.view(5, -1)}) is not None
        plain = Integers(4, scale_type=kept)
        others = plain.nearest(groups, plain.fit(groups).scales[:, None], torch.zeros(1))
        errors = [(each - groups).square().sum(1) for each in (values, others)]
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


def test_integers_with_a_zero_point_by_hand():
    weight = torch.tensor([[-1.0, 0.0, 3.4, 6.5], [2.0, 4.0, 6.0, 7.5]])
    codes, fitted = rounded(Integers(4, symmetric=False), weight)  # steps of 7.5 / 15, both from 0 or below
    assert (fitted.scales.tolist(), fitted.zeros.tolist()) == ([0.5, 0.5], [2.0, 0.0])
    assert codes.tolist() == [[0, 2, 9, 15], [4, 8, 12, 15]]  # 3.4 / 0.5 = 6.8


def test_two_bits_by_hand():
    codes, fitted = rounded(Integers(2, symmetric=False), torch.tensor([[-0.4, 0.0, 0.3, 1.1]]))
    assert fitted.scales.tolist() == pytest.approx([0.5])
    assert (fitted.zeros.tolist(), codes.tolist()) == ([1.0], [[0, 1, 2, 3]])


def test_nf4_is_the_published_list_and_takes_the_nearest():
    assert normal_entries() == pytest.approx(PUBLISHED_NF4, abs=2e-7)
    weight = torch.tensor([[2.0, -2.0, 0.0, 0.2, 1.0]])
    codes, fitted = rounded(NF4(), weight)
    assert fitted.scales.tolist() == [2.0]
    assert codes.tolist() == [[15, 0, 7, 8, 12]]  # 0.1 is next to 0.0796, 0.5 to 0.4407


def test_e4m3_by_hand():
    weight = torch.tensor([[448.0, 17.0, 0.0, -3.3, 2.0**-10 * 0.9]])
    codes, fitted = rounded(E4M3(), weight)
    assert fitted.scales.tolist() == [1.0]
    values = E4M3().values(codes, fitted.scales[:, None], fitted.zeros[:, None])
    assert values.tolist() == [[448.0, 16.0, 0.0, -3.25, 0.0]]  # three bits of mantissa; half the least step is 2^-10
    assert codes[0, 2] == codes[0, 4] == 0


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name} {grid.words}")
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 40), seed=st.integers(0, 999), size=st.sampled_from([1e-6, 1, 300]))
def test_zero_comes_back_codes_fit_and_values_stay(grid, rows, width, seed, size):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * size
    weight[torch.rand(rows, width, generator=generator) < 0.3] = 0.0
    codes, fitted = rounded(grid, weight)
    scales, zeros = fitted.scales[:, None], fitted.zeros[:, None]
    values = grid.values(codes, scales, zeros)
    assert ((scales > 0) | bool(getattr(grid, "signed", False)) & (scales < 0)).all()
    assert scales.isfinite().all()
    assert torch.equal(zeros, zeros.round())
    assert (values[weight == 0] == 0).all()
    assert not torch.signbit(values[weight == 0]).any()
    assert int(codes.max()) - int(codes.min()) < 2**grid.bits
    assert len(codes.unique()) <= 2**grid.bits
    assert torch.equal(grid.codes(values, scales, zeros), codes)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_an_integer_comes_back_within_half_a_step(width, symmetric, seed):
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(seed))
    grid = Integers(width, symmetric)
    fitted = grid.fit(weight)
    change = (grid.nearest(weight, fitted.scales[:, None], fitted.zeros[:, None]) - weight).abs()
    steps = 0.5 if symmetric else 1.0  # the range moves by up to half a step for 0 to be one of its values
    assert (change <= fitted.scales[:, None] * steps * (1 + 1e-4)).all()


def test_nothing_but_zeros_and_what_is_too_small_or_too_large():
    for grid in GRIDS:
        codes, fitted = rounded(grid, torch.zeros(2, 8))
        assert fitted.scales.tolist() == [1.0, 1.0]
        assert (grid.values(codes, fitted.scales[:, None], fitted.zeros[:, None]) == 0).all()
        tiny = grid.fit(torch.full((1, 4), 1e-45))
        assert (tiny.scales > 0).all()
    with pytest.raises(NumericalError, match="does not fit into float16"):
        Integers(4, scale_type="float16").fit(torch.full((1, 4), 1e6))
    with pytest.raises(NumericalError, match="does not fit into float32"):
        Integers(4, symmetric=False).fit(torch.tensor([[3e38, -3e38]]))
    with pytest.raises(NumericalError, match="does not fit into float32"):
        Integers(4).fit(torch.tensor([[torch.nan, 1.0]]))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"codebook": {"entries": [0.0]}}, "2 to 256 entries"),
        ({"codebook": {"entries": []}}, "2 to 256 entries"),
        ({"codebook": {"entries": [float(i) for i in range(257)]}}, "2 to 256 entries"),
        ({"codebook": {"entries": [0.0, float("nan")]}}, "finite numbers"),
        ({"codebook": {"entries": [0.0, 0.0, 1.0]}}, "rise from the first to the last"),
        ({"codebook": {"entries": [-1.0, 1.0]}}, "0 is one of them"),
        ({"codebook": {"entries": "abc"}}, "expected list of float"),
        ({"integers": {"width": 9}}, "2 to 8 bits"),
        ({"integers": {"width": 1}}, "2 to 8 bits"),
        ({"integers": {"even": True, "symmetric": False}}, "only symmetric integers"),
        ({"integers": {"signed": True, "symmetric": False}}, "signed: only symmetric integers"),
        ({"integers": {"signed": True, "even": True}}, "signed: only symmetric integers"),
        ({"integers": {"scale_type": "int8"}}, "'float32' or 'float16' or 'bfloat16'"),
        ("nf5", 'did you mean "nf4"'),
    ],
)
def test_bad_grids_say_what_to_do(spec, words):
    with pytest.raises(InvalidInput, match=words):
        build_grid(spec)


def test_bits_that_a_grid_does_not_have():
    assert build_grid("nf4", 4).bits == 4
    with pytest.raises(InvalidInput, match="NF4 has 4; leave bits out"):
        build_grid("nf4", 3)
    with pytest.raises(InvalidInput, match="has no zero point"):
        build_grid("e4m3", symmetric=False)


def test_every_grid_of_the_registry_is_tried_here():
    assert {grid.name for grid in GRIDS} == set(registry.names("quantize.grid"))
