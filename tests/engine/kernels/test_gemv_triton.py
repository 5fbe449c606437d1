"""Triton's GEMV and unpacking of bitmask against the reference: on a GPU, or by the interpreter on the processor."""

import pytest
import torch

from kernel_inputs import inputs, place, rounded, weight_for
from sparity.engine.kernels.gemv import reference
from sparity.engine.kernels.triton_weight import TritonWeight, group_starts
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import build_format

triton = pytest.importorskip("sparity.engine.kernels.gemv.triton", reason="Triton is not installed")
prefill = pytest.importorskip("sparity.engine.kernels.prefill.triton", reason="Triton is not installed")

FORM = build_format("bitmask")
SHAPES = ((1, 1), (5, 63), (9, 100))  # small, since the interpreter takes some 30 ms for each program
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expected(packed, x):
    """The reference and how far a float32 result may be from it, each float64 `[tokens, rows]`."""
    unit = (packed.shape[1] + 16) * 2**-23  # twice as much as rounding to nearest: tensor cores cut off
    if packed.quantized:
        values, scales = FORM.decode(packed), packed.tensors["scales"]
        return reference.gemv_scaled(values, scales, x), reference.error_bound(values * scales[:, None], x, unit)
    weight = FORM.unpack(packed)
    return reference.gemv(weight, x), reference.error_bound(weight, x, unit)


def run(packed, x, gpu, launch=None, dtype=torch.float32):
    out = torch.full((len(x), packed.shape[0]), float("nan"), dtype=dtype, device=gpu)
    assert triton.gemv(TritonWeight(packed, gpu), x.to(gpu), out, launch) is out
    return out.cpu()


def check(packed, x, result):
    wanted, bound = expected(packed, x)
    assert ((result.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["same", "int8"])
def test_every_type_and_tail(gpu, shape, dtype, values):
    packed = FORM.pack(weight_for("bitmask", *shape).to(dtype), values)
    for tokens in (1, 3):
        x = inputs(tokens, shape[1]).to(dtype)
        result = run(packed, x, gpu)
        check(packed, x, result)
        assert torch.equal(TritonWeight(packed, gpu)(x.to(gpu)).cpu(), rounded(result, dtype))


@pytest.mark.parametrize("tokens", range(1, 17))
def test_every_batch(gpu, tokens):
    packed = FORM.pack(weight_for("bitmask", 6, 150))
    x = inputs(tokens, 150)
    check(packed, x, run(packed, x, gpu))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("values", ["same", "int8"])
def test_every_split_gives_the_same_bits_again(gpu, tokens, values):
    packed = FORM.pack(weight_for("bitmask", 6, 300), values)
    x = inputs(tokens, 300)
    for launch in (triton.Launch(4, splits) for splits in (1, 2, 3, 4, 50)):  # 5 groups: of 4 ranges, one is empty
        result = run(packed, x, gpu, launch)
        check(packed, x, result)
        assert torch.equal(run(packed, x, gpu, launch), result)


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.9, 1.0])
def test_from_empty_to_full(gpu, keep):
    weight = weight_for("bitmask", 6, 100, keep=keep)
    weight[2:5] = 0
    packed = FORM.pack(weight)
    for tokens in (1, 2, 20):
        result = TritonWeight(packed, gpu)(inputs(tokens, 100).to(gpu)).float().cpu()
        wanted, bound = expected(packed, inputs(tokens, 100))
        assert ((result.double() - wanted).abs() <= bound + wanted.abs() * place(torch.bfloat16)).all()
        assert (result[:, 2:5] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_not_finite_spreads_as_in_dense(gpu, bad, tokens):
    weight = weight_for("bitmask", 6, 150)
    for column in (0, 149):
        x = inputs(tokens, 150)
        x[-1, column] = bad
        wanted = reference.gemv(weight, x).float()
        result = run(FORM.pack(weight), x, gpu)
        assert torch.equal(result.isfinite(), wanted.isfinite())
        assert torch.equal(result[-1].nan_to_num(7.0), wanted[-1].nan_to_num(7.0))
        assert result[:-1].isfinite().all()
    weight[3, 5] = bad
    result = run(FORM.pack(weight), inputs(tokens, 150), gpu)
    assert torch.equal(result.isfinite(), reference.gemv(weight, inputs(tokens, 150)).isfinite())


def test_a_slice_of_a_larger_tensor_is_read_as_what_it_is(gpu):
    packed = FORM.pack(weight_for("bitmask", 8, 64))
    wide = inputs(4, 200)
    for x in (wide[:1, 3:67], wide[:, 3:67], wide.T[3:67].T[::2]):
        check(packed, x, run(packed, x, gpu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (6, 63), (5, 600)], ids=str)
def test_unpacked_rows_are_the_weight(gpu, dtype, shape):
    for values in ("same", "int8"):
        packed = FORM.pack(weight_for("bitmask", *shape).to(dtype), values)
        weight = TritonWeight(packed, gpu)
        for begin in (0, 4 * ((shape[0] - 1) // 4)):
            out = torch.full((shape[0] - begin, shape[1]), float("nan"), dtype=dtype, device=gpu)
            exact = FORM.decode(packed)
            if values == "int8":
                exact = rounded(exact * packed.tensors["scales"][:, None], dtype)
            assert torch.equal(prefill.unpack(weight, begin, out).cpu(), exact[begin:])


@pytest.mark.parametrize("values", ["same", "int8"])
def test_prefill_in_panels(gpu, values, monkeypatch):
    monkeypatch.setattr(prefill, "PANEL", 64 * 100 * 2)
    packed = FORM.pack(weight_for("bitmask", 70, 100), values)
    x = inputs(17, 100)
    result = TritonWeight(packed, gpu)(x.to(gpu)).cpu()
    weight = FORM.decode(packed)
    if values == "int8":
        weight = rounded(weight * packed.tensors["scales"][:, None], torch.bfloat16)
    wanted = reference.gemv(weight, x)
    bound = reference.error_bound(weight, x, 100 * 2**-23) + wanted.abs() * 2**-8
    assert result.dtype == torch.bfloat16
    assert ((result.double() - wanted).abs() <= bound).all()


def test_where_groups_begin():
    weight = torch.zeros(5, 130)
    weight[0, :3] = weight[2, 60:70] = weight[3, 129] = weight[4, 64] = 1  # 3 + 4 in group 0, 6 in 1, 1 in 2
    packed = FORM.pack(weight)
    assert group_starts(packed.tensors["masks"]).tolist() == [[0, 7, 13], [0, 0, 1]]
    weight = TritonWeight(packed, "cpu") if triton.gpu.interpreted() else TritonWeight(packed)
    assert weight.nbytes == packed.nbytes + 4 * 6


def test_what_does_not_fit_is_refused(gpu):
    weight = TritonWeight(FORM.pack(weight_for("bitmask", 8, 100)), gpu)
    for x in (torch.ones(1, 99).bfloat16(), torch.ones(1, 100), torch.ones(100).bfloat16()):
        with pytest.raises(InvalidInput, match=r"bfloat16 inputs \[tokens, 100\] are needed"):
            triton.gemv(weight, x.to(gpu))
    for out in (torch.empty(1, 7), torch.empty(1, 8).half(), torch.empty(8, 2)[:, :1].T):
        with pytest.raises(InvalidInput, match="`out` must be"):
            triton.gemv(weight, inputs(1, 100).to(gpu), out.to(gpu) if out.is_contiguous() else out)
    with pytest.raises(InvalidInput, match="at most 16 inputs, not 17"):
        triton.gemv(weight, inputs(17, 100).to(gpu))
    assert weight(inputs(1, 100)[:0].to(gpu)).shape == (0, 8)
    packed = FORM.pack(weight_for("bitmask", 8, 100))
    packed.tensors["masks"][0] = 255
    with pytest.raises(CorruptFile):
        TritonWeight(packed, gpu)
