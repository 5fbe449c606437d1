"""`sparity.quantize_weight` against the published algorithms written plainly, and by hand."""

import pytest
import quantize_references as plain
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
import sparity
from references import layer
from sparity.errors import InvalidInput, NumericalError
from sparity.static.quantize.grids.integers import Integers

EXACT = {"rtol": 1e-4, "atol": 1e-5}


def same_rounding(found, expected, weight):
    """Equal up to ties: symmetric grids put the largest weight of a group halfway between two steps."""
    torch.testing.assert_close((found - weight).abs().double(), (expected - weight).abs(), **EXACT)


CASES = [(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (8, 32) for symmetric in (True, False)]


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_nearest_is_the_published_rounding(bits, group, symmetric):
    weight, _ = layer(6, 64)
    found, codes, scales, zeros = sparity.quantize_weight(
        weight, method="nearest", bits=bits, group=group, symmetric=symmetric
    )
    same_rounding(found, plain.nearest(weight, bits, group, symmetric), weight)
    steps = codes.float() - zeros.repeat_interleave(group, 1)
    assert torch.equal(found, steps * scales.repeat_interleave(group, 1) + 0.0)


def test_one_scale_per_row_by_hand():
    weight = torch.tensor([[7.0, -2.4, 0.0, 3.6], [0.7, 0.7, -0.14, 0.0]])
    found = sparity.quantize_weight(weight, bits=4, even=True)
    assert found.codes.tolist() == [[7, -2, 0, 4], [7, 7, -1, 0]]
    torch.testing.assert_close(found.scales, torch.tensor([[1.0], [0.1]]))
    torch.testing.assert_close(found.weight, torch.tensor([[7.0, -2.0, 0.0, 4.0], [0.7, 0.7, -0.1, 0.0]]))
    assert found.bits == (4,)
    assert found.input_scales is None


@pytest.mark.parametrize(("bits", "group"), [(2, 160), (3, 32), (4, 80), (4, 160), (8, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sparse", [False, True])
def test_gptq_is_the_published_loop_with_zeros_inside_it(bits, group, symmetric, sparse):
    weight, inputs = layer(6, 160, tokens=120)
    keep = references.wanda(weight, inputs, 0.5) if sparse else None
    found = sparity.quantize_weight(
        weight, inputs, method="gptq", bits=bits, group=group, symmetric=symmetric, keep=keep
    )
    expected = plain.gptq(weight, inputs, bits, group, symmetric, keep)
    agree = torch.isclose(found.weight.double(), expected, **EXACT)
    assert agree.all()


def test_gptq_with_static_groups_and_narrow_blocks():
    weight, inputs = layer(5, 64)
    options = {"method": "gptq", "bits": 3, "group": 16, "symmetric": False}
    found = sparity.quantize_weight(weight, inputs, static_groups=True, **options).weight
    torch.testing.assert_close(found.double(), plain.gptq(weight, inputs, 3, 16, False, static=True), **EXACT)
    found = sparity.quantize_weight(weight, inputs, block_columns=16, **options).weight
    torch.testing.assert_close(found.double(), plain.gptq(weight, inputs, 3, 16, False, width=16), **EXACT)


def test_gptq_in_the_order_of_the_inputs_is_gptq_of_the_reordered_layer():
    weight, inputs = layer(5, 32)
    order = references.hessian(inputs).diagonal().argsort(descending=True)
    found = sparity.quantize_weight(weight, inputs, method="gptq", bits=4, symmetric=False, act_order=True)
    expected = plain.gptq(weight[:, order], inputs[..., order], 4, 32, False, static=True)
    torch.testing.assert_close(found.weight[:, order].double(), expected, **EXACT)
    grouped = sparity.quantize_weight(weight, inputs, method="gptq", bits=4, group=8, act_order=True)
    plainly = sparity.quantize_weight(weight, bits=4, group=8)
    assert torch.equal(grouped.scales, plainly.scales)  # groups lie as they did


def test_gptq_makes_the_output_closer_than_rounding():
    weight, inputs = layer(12, 96)
    errors = {
        method: references.output_error(
            weight, sparity.quantize_weight(weight, inputs, method=method, bits=3, group=32).weight, inputs
        )
        for method in ("nearest", "gptq")
    }
    assert errors["gptq"] < 0.8 * errors["nearest"]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6), bits=st.integers(2, 5), seed=st.integers(0, 999), zeros=st.booleans(),
    grid=st.sampled_from([{}, {"even": True}, {"signed": True}, {"symmetric": False}]),
)  # fmt: skip
def test_of_two_columns_gptq_is_never_further_than_rounding(rows, bits, seed, zeros, grid):
    """Both round the first column alike, and of the second GPTQ takes the best value that the grid has."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(rows, 2, generator=generator), torch.randn(6, 2, generator=generator)
    if zeros:
        weight[0, seed % 2] = 0.0
    options = {"grid": {"integers": {"width": bits, **grid}}}
    found = sparity.quantize_weight(weight, inputs, method="gptq", damping=0.0, **options).weight
    plain = sparity.quantize_weight(weight, **options).weight
    errors = [((weight - each) @ inputs.T).double().square().sum(1) for each in (found, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-4) + 1e-5).all()


def test_of_three_columns_rounding_can_be_closer_than_gptq():
    """GPTQ's choice for the second column is the best only if the third could follow it wherever it likes."""
    weight = torch.tensor([[1.7, 3.25, 2.15, 7.0]])  # the last, which has to do with no other, makes the step 1
    inputs = torch.tensor([[1.0, 0, 0, 0], [-1, 1, 0, 0], [0, -0.5, 1, 0], [0, 0, 0, 1]])
    plain = sparity.quantize_weight(weight, bits=4, even=True).weight
    found = sparity.quantize_weight(weight, inputs, method="gptq", damping=0.0, bits=4, even=True).weight
    assert plain.tolist() == [[2, 3, 2, 7]]  # changes of 0.3, -0.25, -0.15
    assert found.tolist() == [[2, 4, 3, 7]]  # 3.25 + 0.3 is nearer to 4; 2.15 + 0.5 * 0.75 to 3
    errors = [float(((weight - each) @ inputs.T).square().sum()) for each in (plain, found)]
    assert errors == pytest.approx([0.09 + 0.55**2 + 0.025**2, 0.09 + 0.45**2 + 0.475**2], rel=1e-4)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("method", ["nearest", "gptq", "awq", "smoothquant", "slim_llm"])
def test_signed_scales_reach_every_method(method):
    weight, inputs = layer(8, 64)
    grid = {"integers": {"width": 4, "signed": True}}
    found = sparity.quantize_weight(weight, inputs, method=method, group=16, grid=grid)
    assert bool((found.scales < 0).any())
    scales = found.scales.repeat_interleave(16, 1)
    values = found.codes * scales / (1.0 if found.input_scales is None else found.input_scales)
    torch.testing.assert_close(found.weight, values)
    assert not torch.signbit(found.weight[found.weight == 0]).any()


def test_gptq_fits_signed_scales_to_what_columns_before_have_corrected():
    weight, inputs = layer(6, 32)
    found = sparity.quantize_weight(weight, inputs, method="gptq", group=16, block_columns=16, bits=4, signed=True)
    grid = Integers(4, signed=True)
    assert torch.equal(found.scales[:, 0], grid.fit(weight[:, :16]).scales)
    factor, _ = references.inverse_factor(inputs, 0.01)
    current = weight.double().clone()  # after the first group
    for column in range(16):
        error = (current[:, column] - found.weight[:, column].double()) / factor[column, column]
        current -= error[:, None] * torch.where(torch.arange(32) >= column, factor[column], 0.0)
    torch.testing.assert_close(found.scales[:, 1], grid.fit(current[:, 16:].float()).scales, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES[::3])
def test_awq_is_the_published_search(bits, group, symmetric):
    weight, inputs = layer(6, 64)
    inputs[..., 5] *= 30
    found = sparity.quantize_weight(weight, inputs, method="awq", bits=bits, group=group, symmetric=symmetric)
    same_rounding(found.weight, plain.awq(weight, inputs, bits, group, symmetric), weight)
    steps = (found.codes.float() - found.zeros.repeat_interleave(group, 1)) * found.scales.repeat_interleave(group, 1)
    torch.testing.assert_close(found.weight, steps / found.input_scales)
    assert float(found.input_scales.max() * found.input_scales.min()) == pytest.approx(1, rel=1e-4)


def test_awq_with_clipping_is_never_further_than_without():
    weight, inputs = layer(8, 64)
    weight[:, 3] *= 6  # one weight that makes its group coarse
    errors = [
        references.output_error(
            weight, sparity.quantize_weight(weight, inputs, method="awq", bits=3, group=32, clip=clip).weight, inputs
        )
        for clip in (False, True)
    ]
    assert errors[1] < errors[0]


def test_awq_clips_by_hand():
    """Only the first channel has inputs: the range is narrowed to 55 % of the other weight, as far as it goes."""
    weight, inputs = torch.tensor([[1.0, 1.9], [1.0, -9.0]]), torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    kept = sparity.quantize_weight(weight, inputs, method="awq", bits=2, steps=1, even=True)
    torch.testing.assert_close(kept.weight, torch.tensor([[1.9, 1.9], [0.0, -9.0]]))
    clipped = sparity.quantize_weight(weight, inputs, method="awq", bits=2, steps=1, even=True, clip=True)
    torch.testing.assert_close(clipped.weight, torch.tensor([[1.045, 1.045], [0.0, -9.0]]))  # the second gains nothing


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_smoothquant_is_the_published_scaling(alpha):
    weight, inputs = layer(6, 64)
    found = sparity.quantize_weight(weight, inputs, method="smoothquant", bits=4, group=32, alpha=alpha)
    same_rounding(found.weight, plain.smoothquant(weight, inputs, 4, 32, True, alpha), weight)


@pytest.mark.parametrize(("bits", "group"), [(3, 16), (4, 8), (4, 24)])
def test_slim_llm_is_the_published_search_and_loop(bits, group):
    weight, inputs = layer(6, 96)
    inputs[..., 10:20] *= 5
    found = sparity.quantize_weight(weight, inputs, method="slim_llm", bits=bits, group=group, symmetric=False)
    expected, chosen = plain.slim_llm(weight, inputs, bits, group)
    assert list(found.bits) == chosen
    assert sum(chosen) == bits * len(chosen)
    torch.testing.assert_close(found.weight.double(), expected, **EXACT)


def test_slim_llm_gives_bits_to_what_is_salient():
    weight, inputs = layer(6, 64)
    weight[:, :16] *= 20
    inputs[..., :16] *= 5
    found = sparity.quantize_weight(weight, inputs, method="slim_llm", bits=3, group=16)
    assert found.bits[0] == 4
    assert sum(found.bits) == 12


def test_slim_llm_weighs_salient_weights_where_it_is_asked_to():
    weight, inputs = layer(6, 64)
    weight[0, 3] = 4.0
    far = [
        (sparity.quantize_weight(weight, inputs, method="slim_llm", bits=3, group=64, salience_weight=factor).weight)
        for factor in (1.0, 1e6)
    ]
    assert (far[1][0, 3] - 4).abs() <= (far[0][0, 3] - 4).abs()
    assert not torch.equal(*far)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_weight_is_kept_and_arguments_are_not_changed(dtype):
    weight, inputs = layer(6, 32)
    weight = weight.to(dtype)
    copies = weight.clone(), inputs.clone()
    for method in ("nearest", "gptq", "awq", "smoothquant", "slim_llm"):
        found = sparity.quantize_weight(weight, inputs, method=method, group=16)
        assert found.weight.dtype == dtype
        assert (found.codes.dtype, found.scales.dtype) == (torch.int16, torch.float32)
        assert torch.equal(weight, copies[0])
        assert torch.equal(inputs, copies[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "gptk"}, 'did you mean "gptq"'),
        ({"bits": 9}, "2 to 8 bits"),
        ({"bits": True}, "expected int"),
        ({"bits": 4.0}, "expected int"),
        ({"group": 24}, "a group of 24 does not divide its row of 64 weights; choose 16"),
        ({"group": 128}, "choose 64"),
        ({"group": 0}, "group 0: give how many neighbours"),
        ({"group": True}, "group True"),
        ({"grid": "int4"}, "no grid"),
        ({"grid": "nf4", "bits": 8}, "leave bits out"),
        ({"method": "gptq", "dampin": 0.1}, 'did you mean "damping"'),
        ({"method": "gptq", "damping": 2.0}, "must lie in [0, 1]"),
        ({"method": "awq", "steps": 0}, "at least one power"),
        ({"method": "smoothquant", "alpha": 1.5}, "must lie in [0, 1]"),
        ({"method": "slim_llm", "bits": 2}, "3 to 7 bits"),
        ({"method": "slim_llm", "grid": "nf4"}, "3 to 7 bits"),
        ({"keep": torch.ones(6, 8)}, "keep must be a mask [6, 64]"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, words):
    weight, inputs = layer(6, 64)
    with pytest.raises(InvalidInput) as caught:
        sparity.quantize_weight(weight, inputs, **arguments)
    assert words in str(caught.value)


def test_bad_tensors():
    weight, inputs = layer(6, 16)
    with pytest.raises(InvalidInput, match="gptq needs the statistics gram: pass `inputs`"):
        sparity.quantize_weight(weight, method="gptq")
    with pytest.raises(InvalidInput, match="floating-point matrix"):
        sparity.quantize_weight(weight.int())
    with pytest.raises(NumericalError, match="weight holds NaN"):
        sparity.quantize_weight(weight / 0)
    with pytest.raises(NumericalError, match="inputs holds NaN"):
        sparity.quantize_weight(weight, inputs / 0, method="awq")
    with pytest.raises(NumericalError, match="does not fit into float16"):
        sparity.quantize_weight(weight * 1e7, scale_type="float16")
