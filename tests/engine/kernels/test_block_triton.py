"""Triton's product with a block weight against the reference: on a GPU, or by the interpreter on the processor."""

import pytest
import torch

from kernel_inputs import inputs, place, weight_for
from sparity.engine.kernels.gemv import reference
from sparity.engine.kernels.triton_weight import TritonWeight, declines
from sparity.errors import InvalidInput
from sparity.formats import build_format

BLOCKS = ((16, 16), (32, 32), (4, 8), (20, 48), (8, 128))


def form(block):
    return build_format({"block": {"rows": block[0], "columns": block[1]}})


def check(packed, x, result, dtype):
    found = build_format({"block": dict(packed.options)})
    if packed.quantized:
        values, scales = found.decode(packed), packed.tensors["scales"]
        weight, wanted = values * scales[:, None], reference.gemv_scaled(values, scales, x)
    else:
        weight = found.unpack(packed)
        wanted = reference.gemv(weight, x)
    bound = reference.error_bound(weight, x, (packed.shape[1] + 16) * 2**-23) + wanted.abs() * place(dtype)
    assert result.dtype == dtype
    assert ((result.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("values", ["same", "int8"])
def test_blocks_of_many_sizes_on_odd_shapes(gpu, block, dtype, values):
    packed = form(block).pack(weight_for("block", 21, 250, block=block).to(dtype), values)
    weight = TritonWeight(packed, gpu)
    for tokens in (1, 33):
        x = inputs(tokens, 250).to(dtype)
        result = weight(x.to(gpu)).cpu()
        check(packed, x, result, dtype)
        assert torch.equal(weight(x.to(gpu)).cpu(), result)


@pytest.mark.parametrize("tokens", [2, 16, 17, 70])
def test_batches(gpu, tokens):
    packed = form((16, 16)).pack(weight_for("block", 35, 100))
    x = inputs(tokens, 100)
    check(packed, x, TritonWeight(packed, gpu)(x.to(gpu)).cpu(), torch.bfloat16)


def test_rows_of_blocks_that_store_nothing(gpu):
    weight = weight_for("block", 64, 64, keep=1.0)
    weight[16:48] = 0
    packed = form((16, 16)).pack(weight)
    result = TritonWeight(packed, gpu)(inputs(3, 64).to(gpu)).cpu()
    assert (result[:, 16:48] == 0).all()
    check(packed, inputs(3, 64), result, torch.bfloat16)
    empty = form((16, 16)).pack(torch.zeros(5, 20, dtype=torch.bfloat16))
    assert (TritonWeight(empty, gpu)(inputs(3, 20).to(gpu)).cpu() == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spreads_also_through_blocks_that_are_not_stored(gpu, bad):
    weight = weight_for("block", 32, 150)
    packed = form((16, 16)).pack(weight)
    for column in (0, 77, 149):
        x = inputs(3, 150)
        x[1, column] = bad
        wanted = reference.gemv(weight, x).float()
        result = TritonWeight(packed, gpu)(x.to(gpu)).float().cpu()
        assert torch.equal(result[1].nan_to_num(7.0), wanted[1].bfloat16().float().nan_to_num(7.0))
        assert result[[0, 2]].isfinite().all()


def test_what_does_not_fit_is_refused(gpu):
    large = form((256, 16)).pack(weight_for("block", 256, 16))
    assert "at most 128 x 128" in declines(large, gpu)
    with pytest.raises(InvalidInput, match="at most 128 x 128"):
        TritonWeight(large, gpu)
    weight = TritonWeight(form((16, 16)).pack(weight_for("block", 32, 32)), gpu)
    with pytest.raises(InvalidInput, match=r"inputs \[tokens, 32\] are needed"):
        weight(inputs(2, 31).to(gpu))
    assert weight(inputs(2, 32)[:0].to(gpu)).shape == (0, 32)
