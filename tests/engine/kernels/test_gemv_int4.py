"""int4 kernels against their reference: every format, group, kind of scale, tail, batch and thread count."""

import ctypes
from itertools import product

import pytest
import torch

from kernel_inputs import inputs, weight_for
from sparity.engine.kernels import native, native_weight
from sparity.engine.kernels.gemv import pytorch, reference
from sparity.engine.kernels.gemv.cpu import gemv, gemv_many, gemv_rows
from sparity.engine.kernels.native_weight import NativeWeight, declines
from sparity.engine.kernels.prefill.cpu import prefill
from sparity.formats import build_format, unpack

FORMATS = ("dense", "bitmask", "masks", "two_of_four", "columns")  # masks: a bitmask that never lies dense
GROUPS = (32, 64, 128)
SHAPES = ((1, 128), (3, 32), (5, 96), (6, 192), (7, 384), (9, 4224))
TOKENS = (1, 3, 7)


@pytest.fixture(autouse=True)
def reading_of_masks(request, monkeypatch):
    case = getattr(request.node, "callspec", None)
    if case is not None and "masks" in case.params.values():
        monkeypatch.setattr(native_weight, "DENSEST_MASKED", dict.fromkeys(native.instruction_sets(), 1.0))


def packed_in(name, shape, group=32, symmetric=True, scale_type="bfloat16", keep=0.5):
    options = {"group": group, "symmetric": symmetric, "scale_type": scale_type}
    name = "bitmask" if name == "masks" else name
    return build_format(name).pack(weight_for(name, *shape, keep=keep), {"int4": options})


def steps_of(packed):
    """code - zero, float64 `[rows, columns]`."""
    values = build_format(packed.format).stored(packed).double()
    if packed.encoding.symmetric:
        return values
    zeros = packed.tensors["zeros"].double().repeat_interleave(packed.encoding.group, 1)
    return (values + zeros) % 16 - zeros


def run(packed, x):
    out = torch.full((len(x), packed.shape[0]), float("nan"))
    assert gemv(NativeWeight(packed), x, out) is out
    return out


def check(packed, x, result):
    steps, scales, group = steps_of(packed), packed.tensors["scales"], packed.encoding.group
    quantized, input_scales = reference.quantize_groups(x, group)
    seen = quantized.double() * input_scales.double().repeat_interleave(group, 1)
    weight = steps * scales.double().repeat_interleave(group, 1)
    unit = (packed.shape[1] / group + 16) * 2**-24  # a group's sum is exact; it is scaled, and the groups are added
    error = (result.double() - reference.gemv_int4(steps, scales, x)).abs()
    assert bool((error <= reference.error_bound(weight, seen, unit)).all())


@pytest.mark.parametrize("name", ["dense", "two_of_four"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_rows_side_by_side_have_the_same_bits_with_every_instruction_set(name, symmetric, group):
    packed, x = packed_in(name, (21, 384), group, symmetric), inputs(3, 384)
    weight, before = NativeWeight(packed), native.instruction_set()
    found = []
    for name in native.instruction_sets():
        with native.using(name):
            found.append(gemv(weight, x, torch.empty(3, 21)))
    assert native.instruction_set() == before
    assert all(torch.equal(result, found[0]) for result in found)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_zeros_that_are_not_read_have_the_bits_of_zeros_that_are(isa, symmetric, group):
    encoding = {"int4": {"group": group, "symmetric": symmetric}}
    for shape in SHAPES:
        if shape[1] % group:
            continue
        weight, x = weight_for("two_of_four", *shape), inputs(5, shape[1])
        weight[0, :8] = 0  # fours that keep fewer than two
        dense, *others = (run(build_format(name).pack(weight, encoding), x) for name in ("dense", "two_of_four"))
        assert all(torch.equal(other, dense) for other in others)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_every_tail_and_batch(isa, name, symmetric, group):
    for number, shape in enumerate(SHAPES):
        if shape[1] % group:
            continue
        packed = packed_in(name, shape, group, symmetric, ("bfloat16", "float16", "float32")[number % 3])
        for tokens in TOKENS:
            x = inputs(tokens, shape[1])
            result = run(packed, x)
            check(packed, x, result)
            assert torch.equal(gemv(NativeWeight(packed), x), result.bfloat16())


def test_a_product_by_hand(isa):
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([16.0, -4.0, 6.0])  # scale -2: codes -8, 2, -3
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, :4] = torch.tensor([127.0, 2.0, -1.0, 64.0])  # scale 1
    for name in ("dense", "bitmask"):
        assert run(build_format(name).pack(weight.bfloat16(), "int4"), x).item() == -2 * (-8 * 127 + 2 * 2 + 3)


@pytest.mark.parametrize("name", ["bitmask", "masks"])
@pytest.mark.parametrize("keep", [0.0, 0.03, 0.9, 1.0])
@pytest.mark.parametrize("group", GROUPS)
def test_bitmask_from_empty_to_full(isa, name, keep, group):
    packed = packed_in(name, (21, 384), group, keep=keep)
    for tokens in (1, 4):
        x = inputs(tokens, 384)
        result = run(packed, x)
        check(packed, x, result)
        if not keep:
            assert not result.any()


@pytest.mark.parametrize(("name", "symmetric"), list(product(FORMATS, (True, False))))
def test_bits_depend_on_neither_threads_nor_the_other_inputs(isa, name, symmetric, monkeypatch):
    for group in GROUPS:
        packed = packed_in(name, (150, 256), group, symmetric)
        x = inputs(7, 256)
        first = run(packed, x)
        for token in range(len(x)):
            assert torch.equal(run(packed, x[token : token + 1])[0], first[token])
        for count in (2, 7):
            monkeypatch.setattr(native, "threads", lambda count=count: count)
            assert torch.equal(run(packed, x), first)
        monkeypatch.undo()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_is_nan(isa, name, bad):
    for group in GROUPS:
        x = inputs(3, 384)
        x[1, 140] = bad
        result = run(packed_in(name, (10, 384), group), x)
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()


def test_weights_of_all_groups_share_an_input(isa):
    x = inputs(5, 384)
    every = [NativeWeight(packed_in(name, (20 + group, 384), group)) for name, group in product(FORMATS, GROUPS)]
    every += [
        NativeWeight(build_format("dense").pack(weight_for("dense", 9, 384), values)) for values in ("same", "int8")
    ]
    for weight, found in zip(every, gemv_many(every, x), strict=True):
        assert torch.equal(found, gemv(weight, x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_some_rows_have_the_bits_that_they_have_among_all(isa, symmetric):
    weight, x = NativeWeight(packed_in("dense", (70, 192), 64, symmetric)), inputs(3, 192)
    rows = torch.tensor([0, 3, 4, 31, 69], dtype=torch.int32)
    out = torch.full((3, 70), 7.0)
    gemv_rows(weight, rows, x, out)
    every = gemv(weight, x, torch.empty(3, 70))
    assert torch.equal(out[:, rows], every[:, rows])
    out[:, rows] = 7
    assert bool((out == 7).all())


@pytest.mark.parametrize(("name", "group"), list(product(FORMATS, GROUPS)))
def test_unpacked_rows_are_those_of_the_format(isa, name, group):
    for symmetric, scale_type in product((True, False), ("bfloat16", "float16", "float32")):
        packed = packed_in(name, (22, 256), group, symmetric, scale_type)
        weight, dense = NativeWeight(packed), unpack(packed)
        for begin, end in ((0, 22), (4, 21), (20, 22)):
            out = torch.full((end - begin, 256), float("nan"), dtype=torch.bfloat16)
            assert not native.library().sparity_unpack(weight.address, begin, end, out.data_ptr(), 2)
            assert torch.equal(out, dense[begin:end])
        x = inputs(37, 256)
        assert torch.equal(prefill(weight, x), x @ dense.T)
        assert torch.equal(pytorch.gemv(packed, x), x @ dense.T)


def test_what_the_library_does_not_take_is_refused():
    blocks = build_format("block").pack(weight_for("block", 8, 64), "int4")
    assert native.unavailable() or declines(blocks) == "no kernel for the format block with int4 values"
    weight = NativeWeight(packed_in("dense", (8, 64)))
    x, out = inputs(1, 64), torch.empty(1, 8)
    weight._matrix.columns = 80
    pointers = ctypes.c_void_p(weight.address), x.data_ptr(), out.data_ptr()
    assert native.library().sparity_gemv(*pointers, True, 1, 1) == 1
