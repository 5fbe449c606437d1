"""GEMV against its reference: every format, instruction set, tail, batch and thread count."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel_inputs import FORMATS, inputs, weight_for
from sparity.engine.kernels import native
from sparity.engine.kernels.gemv import pytorch, reference
from sparity.engine.kernels.gemv.cpu import gemv
from sparity.engine.kernels.native_weight import INT8_COLUMNS, NativeWeight, declines
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import build_format

SHAPES = ((1, 1), (1, 64), (3, 31), (4, 65), (5, 130), (7, 1), (16, 128), (17, 127), (33, 259), (64, 1000), (2, 4096))
TOKENS = (1, 2, 3, 4, 5, 7, 8, 16)


def form(name):
    return build_format({name: FORMATS[name]})


def run(packed, x, dtype=torch.float32):
    out = torch.full((x.shape[0], packed.shape[0]), float("nan"), dtype=dtype)
    assert gemv(NativeWeight(packed), x, out) is out
    return out


def check(packed, x, result):
    """`result` is float32; int8 is exact, floating point lies within the bound of its rounding errors."""
    weight = build_format({packed.format: dict(packed.options)}).unpack(packed)
    if packed.quantized:
        values = build_format({packed.format: dict(packed.options)}).decode(packed)
        assert torch.equal(result, reference.gemv_int8(values, packed.tensors["scales"], x).float())
        return
    unit = (packed.shape[1] / 8 + 16) * 2**-24  # at least 8 partial sums run side by side
    error = (result.double() - reference.gemv(weight, x)).abs()
    assert (error <= reference.error_bound(weight, x, unit)).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", ["same", "int8"])
def test_every_tail_and_batch(isa, name, shape, values):
    packed = form(name).pack(weight_for(name, *shape), values)
    if declines(packed):
        assert (name, values) == ("block", "int8")
        return
    for tokens in TOKENS:
        x = inputs(tokens, shape[1])
        result = run(packed, x)
        check(packed, x, result)
        assert torch.equal(run(packed, x, torch.bfloat16), result.bfloat16())
        assert torch.equal(gemv(NativeWeight(packed), x), result.bfloat16())


@pytest.mark.parametrize("block", [(1, 16), (4, 16), (16, 16), (20, 16), (3, 48), (8, 32), (9, 64), (32, 32)], ids=str)
def test_blocks_of_many_sizes(isa, block):
    weight = weight_for("block", 70, 200, block=block)
    packed = build_format({"block": {"rows": block[0], "columns": block[1]}}).pack(weight)
    for tokens in (1, 2, 3, 16):
        x = inputs(tokens, 200)
        check(packed, x, run(packed, x))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("values", ["same", "int8"])
def test_the_number_of_threads_changes_nothing(isa, name, values, monkeypatch):
    packed = form(name).pack(weight_for(name, 150, 200), values)
    if declines(packed):
        return
    x = inputs(3, 200)
    first = run(packed, x)
    for count in (2, 3, 7, 64):
        monkeypatch.setattr(native, "threads", lambda count=count: count)
        assert torch.equal(run(packed, x), first)


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("values", ["same", "int8"])
def test_bitmask_from_empty_to_full(isa, keep, values):
    packed = form("bitmask").pack(weight_for("bitmask", 21, 300, keep=keep), values)
    for tokens in (1, 4):
        x = inputs(tokens, 300)
        check(packed, x, run(packed, x))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spreads_as_in_dense(isa, name, bad):
    weight = weight_for(name, 40, 150)
    for place in (0, 77, 149):
        x = inputs(3, 150)
        x[1, place] = bad
        wanted = reference.gemv(weight, x)
        result = run(form(name).pack(weight), x)
        assert torch.equal(result.isnan(), wanted.isnan())
        assert torch.equal(result.isinf(), wanted.isinf())
        assert torch.equal(result[~wanted.isfinite()].nan_to_num(), wanted[~wanted.isfinite()].float().nan_to_num())
        assert result[[0, 2]].isfinite().all()
        weight[3, 5] = bad  # and from a weight into its row
        weight_result = run(form("bitmask").pack(weight), inputs(2, 150))
        assert torch.equal(weight_result.isfinite(), reference.gemv(weight, inputs(2, 150)).isfinite())
        weight[3, 5] = 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_of_a_token_that_is_not_finite_is_nan(isa, bad):
    x = inputs(3, 150)
    x[1, 4] = bad
    result = run(form("bitmask").pack(weight_for("bitmask", 40, 150), "int8"), x)
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


def test_the_int8_sums_of_the_largest_values_are_exact(isa):
    columns = (
        INT8_COLUMNS - 1
    )  # the most there may be: 127 * 127 * columns just fits int32, 255 * 127 * columns does not
    weight = torch.full((2, columns), -1.0, dtype=torch.bfloat16)
    x = torch.full((1, columns), 3.0, dtype=torch.bfloat16)
    for name in ("dense", "bitmask"):
        packed = form(name).pack(weight, "int8")
        check(packed, x, run(packed, x))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, 1e-40, 3e38])
def test_quantised_inputs_equal_the_reference(isa, value):
    x = inputs(4, 130)
    x[1] = value
    x[2] *= 1e-37
    x[3, 7] = float("inf")
    values, scales = torch.empty(4, 130, dtype=torch.int8), torch.empty(4)
    native.library().sparity_quantize(x.data_ptr(), 4, 130, values.data_ptr(), scales.data_ptr(), 1)
    wanted_values, wanted_scales = reference.quantize_tokens(x)
    assert torch.equal(values[:3], wanted_values[:3])
    assert torch.equal(scales[:3], wanted_scales[:3])
    assert scales[3].isnan()
    assert wanted_scales[3].isnan()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(isa, data):
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 400))
    values = data.draw(st.sampled_from(("same", "int8")))
    packed = form(name).pack(weight_for(name, rows, columns, keep=data.draw(st.floats(0, 1))), values)
    if not declines(packed):
        x = inputs(data.draw(st.integers(1, 17)), columns)
        check(packed, x, run(packed, x))


def test_what_does_not_fit_is_refused(isa):
    weight = NativeWeight(form("bitmask").pack(weight_for("bitmask", 8, 100)))
    for x in (torch.ones(1, 99).bfloat16(), torch.ones(1, 100), torch.ones(100).bfloat16()):
        with pytest.raises(InvalidInput, match=r"inputs \[tokens, 100\] are needed"):
            gemv(weight, x)
    for out in (torch.empty(1, 7), torch.empty(1, 8).half(), torch.empty(8, 2)[:, :1].T):
        with pytest.raises(InvalidInput, match="`out` must be"):
            gemv(weight, inputs(1, 100), out)
    assert gemv(weight, inputs(1, 100)[:0]).shape == (0, 8)


def test_a_corrupt_matrix_never_reaches_a_kernel(isa):
    packed = form("bitmask").pack(weight_for("bitmask", 8, 100))
    packed.tensors["masks"][0] = 255
    with pytest.raises(CorruptFile):
        NativeWeight(packed)


@pytest.mark.parametrize("name", [*FORMATS, "csr", "coo"])
@pytest.mark.parametrize("values", ["same", "int8"])
def test_pytorch_does_every_format(name, values):
    weight = weight_for("two_of_four", 20, 70)
    packed = build_format(name).pack(weight, values)
    x = inputs(5, 70)
    if values == "same":
        assert torch.equal(pytorch.gemv(packed, x), torch.nn.functional.linear(x, weight))
    else:
        stored = build_format(name).decode(packed)
        wanted = reference.gemv_int8(stored, packed.tensors["scales"], x)
        assert torch.equal(pytorch.gemv(packed, x), wanted.bfloat16())


@pytest.mark.parametrize("columns", [8200, 8256])
def test_int8_with_inputs_too_large_for_the_first_cache(isa, columns):
    packed = form("dense").pack(weight_for("dense", 6, columns), "int8")
    for tokens in (3, 4, 6, 7):
        x = inputs(tokens, columns)
        check(packed, x, run(packed, x))
