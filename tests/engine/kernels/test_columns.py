"""Weights by input channel: what is skipped changes no bit, and nothing else is skipped."""

import dataclasses
import math

import pytest
import torch

from kernel_inputs import inputs, weight_for
from sparity.engine.kernels import native
from sparity.engine.kernels.gemv import reference
from sparity.engine.kernels.gemv.cpu import gemv, gemv_many, gemv_rows
from sparity.engine.kernels.native_weight import NativeWeight
from sparity.errors import InvalidInput
from sparity.formats import build_format

SHAPES = ((1, 1), (31, 9), (64, 7), (65, 130), (192, 576), (1000, 16), (2049, 24), (4100, 9), (70, 1100))
SHARES = (0.0, 0.25, 0.5, 0.9, 1.0)


def native_weight(rows, columns, values="same", form="columns"):
    return NativeWeight(build_format(form).pack(weight_for("dense", rows, columns), values))


def sparse_inputs(tokens, columns, share, seed=1):
    drawn = torch.rand(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < share, 0.0, inputs(tokens, columns, seed)).bfloat16()


def run(weight, x):
    return gemv(weight, x, torch.full((len(x), weight.packed.shape[0]), math.nan))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", SHARES)
def test_zeros_among_the_inputs(isa, shape, share):
    weight, whole = native_weight(*shape), native_weight(*shape, "int8")
    dense, dense_int8 = weight_for("dense", *shape), native_weight(*shape, "int8", "dense")
    for tokens in (1, 2, 5, 8, 16, 19):
        x = sparse_inputs(tokens, shape[1], share)
        bound = reference.error_bound(dense, x, (shape[1] + 16) * 2**-24)
        assert ((run(weight, x).double() - reference.gemv_columns(dense, x)).abs() <= bound).all()
        assert torch.equal(run(whole, x), run(dense_int8, x))


@pytest.mark.parametrize(("rows", "columns"), [(3000, 64), (200, 1152)])
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_bits_depend_on_neither_other_tokens_nor_threads(isa, values, rows, columns, monkeypatch):
    """Each token has zeros of its own, so that the channels which any of them uses differ; several ranges of them."""
    weight = native_weight(rows, columns, values)
    x = torch.cat([sparse_inputs(1, columns, share, seed) for seed, share in enumerate(SHARES * 4)])
    alone = torch.cat([run(weight, row) for row in x.split(1)])
    for tokens in range(2, 21):
        assert torch.equal(run(weight, x[:tokens]), alone[:tokens])
    for count in (1, 2, 3, 5, 64):
        monkeypatch.setattr(native, "threads", lambda count=count: count)
        assert torch.equal(run(weight, x), alone)
        assert torch.equal(run(weight, x[3:4]), alone[3:4])


@pytest.mark.parametrize("values", ["same", "int8"])
def test_channels_without_their_zeros_give_the_same_bits(isa, values):
    """A weight of only the channels that are left, in their order."""
    weight, x = weight_for("dense", 200, 90), sparse_inputs(1, 90, 0.6)
    kept = x[0] != 0
    if values == "int8":  # the same scales in both
        weight[:, kept.nonzero()[0]] = 9.0
    full, cut = (build_format("columns").pack(part, values) for part in (weight, weight[:, kept]))
    assert torch.equal(run(NativeWeight(full), x), run(NativeWeight(cut), x[:, kept]))


@pytest.mark.parametrize("values", ["same", "int8", "int4", {"int4": {"group": 64, "symmetric": False}}], ids=str)
def test_every_instruction_set_gives_the_same_bits(values):
    """A product of two bfloat16 is exact in float32, so that sums in one order are equal whether fused or not."""
    weight, x = native_weight(300, 640, values), sparse_inputs(5, 640, 0.3)
    found = []
    for name in native.instruction_sets():
        with native.using(name):
            found.append(run(weight, x))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_ranges_of_channels_are_summed_alone_and_then_added(isa):
    """1024 channels of 8 rows are four ranges of 256; within one, channel after channel."""
    dense, x = weight_for("dense", 8, 1024), sparse_inputs(1, 1024, 0.4)
    total = torch.zeros(8)
    for begin in range(0, 1024, 256):
        part = torch.zeros(8)
        for channel in range(begin, begin + 256):
            part += dense[:, channel].float() * x[0, channel].float()
        total += part
    assert torch.equal(run(NativeWeight(build_format("columns").pack(dense)), x)[0], total)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_groups_are_whole_numbers_scaled_and_added_in_order(isa, group, symmetric):
    options = {"int4": {"group": group, "symmetric": symmetric, "scale_type": "float32"}}
    packed = build_format("columns").pack(weight_for("dense", 131, 256), options)
    x = sparse_inputs(3, 256, 0.5)
    steps = build_format("columns").stored(packed).int()
    if not symmetric:
        zeros = packed.tensors["zeros"].int().repeat_interleave(group, 1)
        steps = (steps + zeros) % 16 - zeros
    quantized, scales = reference.quantize_groups(x, group)
    total = torch.zeros(3, 131)
    for place in range(256 // group):
        inside = slice(place * group, (place + 1) * group)
        sums = quantized[:, inside].int() @ steps[:, inside].T
        total += sums.float() * (packed.tensors["scales"][:, place] * scales[:, place, None])
    assert torch.equal(run(NativeWeight(packed), x), total)


def test_int4_channels_that_are_left_out_are_not_read(isa):
    """Other weights under channels that are zero for all tokens change nothing."""
    weight, x = weight_for("dense", 300, 128), sparse_inputs(2, 128, 0.7)
    packed = build_format("columns").pack(weight, "int4")
    gone = (x == 0).all(0)
    values = packed.tensors["values"].clone()
    values[gone] = 0x77
    other = dataclasses.replace(packed, tensors={**packed.tensors, "values": values})
    assert gone.any()
    assert torch.equal(run(NativeWeight(other), x), run(NativeWeight(packed), x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_skipped(isa, bad):
    dense, x = weight_for("dense", 40, 30), sparse_inputs(4, 30, 0.5)
    weight = NativeWeight(build_format("columns").pack(dense))
    x[1, 7], x[2, 29] = bad, bad
    result, wanted = run(weight, x), reference.gemv_columns(dense, x)
    assert torch.equal(result.isnan(), wanted.isnan())
    assert torch.equal(result[wanted.isinf()], wanted[wanted.isinf()].float())
    assert result[[0, 3]].isfinite().all()


def test_a_zero_meets_no_weight_even_where_another_token_needs_it(isa):
    dense, x = weight_for("dense", 40, 30), sparse_inputs(3, 30, 0.2)
    dense[5, 4], dense[6, 4] = math.inf, math.nan
    x[:, 4] = torch.tensor([0.0, 1.0, -0.0])
    result = run(NativeWeight(build_format("columns").pack(dense)), x)
    assert result[[0, 2]].isfinite().all()
    assert result[1, 5] == math.inf
    assert result[1, 6].isnan()


def test_an_int8_token_that_is_not_finite_is_nan_everywhere(isa):
    x = sparse_inputs(3, 30, 0.5)
    x[1] = 0
    x[1, 3] = math.inf
    result = run(native_weight(70, 30, "int8"), x)
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


def test_int8_sums_of_the_largest_values_are_exact(isa):
    for sign in (-1.0, 1.0):
        weight = torch.full((3, 131071), sign).bfloat16()
        x = torch.full((2, 131071), 3.0).bfloat16()
        x[1, ::2] = 0
        found, wanted = (NativeWeight(build_format(name).pack(weight, "int8")) for name in ("columns", "dense"))
        assert torch.equal(run(found, x), run(wanted, x))


def test_beside_dense_weights_of_the_same_input(isa):
    weights = [
        native_weight(rows, 70, form=form) for rows, form in ((300, "dense"), (77, "columns"), (2500, "columns"))
    ]
    x = sparse_inputs(2, 70, 0.5)
    for weight, result in zip(weights, gemv_many(weights, x), strict=True):
        assert torch.equal(result, gemv(weight, x))


@pytest.mark.parametrize("values", ["same", "int8"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_listed_rows_have_the_bits_that_they_have_among_all(isa, values, tokens):
    weight, x = native_weight(150, 200, values, "dense"), inputs(tokens, 200)
    rows = (torch.rand(150, generator=torch.Generator().manual_seed(0)) < 0.4).nonzero()[:, 0].to(torch.int32)
    out = torch.full((tokens, 150), -7.0)
    gemv_rows(weight, rows, x, out)
    wanted = torch.full((tokens, 150), -7.0)
    wanted[:, rows.long()] = run(weight, x)[:, rows.long()]
    assert torch.equal(out, wanted)
    assert torch.equal(gemv_rows(weight, rows[:0], x, out.clone()), out)


def test_rows_that_do_not_fit_are_refused():
    if native.unavailable():
        pytest.skip("no compiled kernels")
    x, out = inputs(1, 20), torch.empty(1, 10)
    for rows in (torch.tensor([0, 10]), torch.tensor([-1]), torch.tensor([3, 3]), torch.tensor([[1]])):
        with pytest.raises(InvalidInput, match="rising int32 rows below 10"):
            gemv_rows(native_weight(10, 20, form="dense"), rows.to(torch.int32), x, out)
    with pytest.raises(InvalidInput, match="of a dense weight"):
        gemv_rows(native_weight(10, 20), torch.tensor([1], dtype=torch.int32), x, out)
