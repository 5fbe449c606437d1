"""Triton's GEMV that skips channels, against the rule and the reference: on a GPU, or by the interpreter."""

import math

import pytest
import torch

from kernel_inputs import inputs, place, weight_for
from sparity.engine.kernels.gemv import reference
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.engine.kernels.triton_weight import TritonWeight
from sparity.errors import InvalidInput
from sparity.formats import build_format

triton = pytest.importorskip("sparity.engine.kernels.skip.triton", reason="Triton is not installed")

COLUMNS = 70


def packed_for(rows, columns=COLUMNS, values="same"):
    return build_format("columns").pack(weight_for("columns", rows, columns), values)


def rules(columns=COLUMNS):
    generator = torch.Generator().manual_seed(3)
    thresholds, centre = torch.rand(columns, generator=generator), torch.randn(columns, generator=generator).bfloat16()
    return [SkipRule(torch.tensor(0.5)), SkipRule(thresholds, centre), SkipRule(thresholds, centre, scale="rms")]


def expected(packed, x, rule):
    """float64 sums over what counts, and the bound of float32 sums of it, each `[tokens, rows]`."""
    form = build_format("columns")
    weight = form.unpack(packed).double() if not packed.quantized else form.decode(packed).double()
    scale = packed.tensors["scales"].double() if packed.quantized else torch.ones(len(weight), dtype=torch.float64)
    wide = x.float() - (0 if rule is None or rule.centre is None else rule.centre.float())
    kept = wide.double() * (x != 0 if rule is None else rule.keep(x))
    return kept @ weight.T * scale, (kept.abs() @ weight.abs().T * scale) * (packed.shape[1] + 16) * 2**-23


@pytest.mark.parametrize("values", ["same", "int8"])
@pytest.mark.parametrize("rule", [None, *rules()], ids=["zeros", "one", "centre", "rms"])
@pytest.mark.parametrize(("rows", "splits"), [(5, 1), (20, 3)])
def test_sums_over_what_counts(gpu, values, rule, rows, splits):
    packed, x = packed_for(rows, values=values), inputs(2, COLUMNS)
    x[:, ::3] = 0
    launch = triton.SkipLaunch(rows=16, channels=16, splits=splits)
    found = triton.gemv(TritonWeight(packed, gpu), x.to(gpu), rule, launch).cpu()
    wanted, bound = expected(packed, x, rule)
    assert ((found.double() - wanted).abs() <= bound + place(x.dtype) * wanted.abs()).all()


def test_what_does_not_count_is_not_read(gpu):
    """A channel of NaN weights below its threshold leaves no trace, one above it reaches every output."""
    packed, x = packed_for(8), inputs(1, COLUMNS)
    rule = SkipRule(torch.zeros(COLUMNS).index_fill(0, torch.tensor([7]), torch.inf))
    broken = TritonWeight(packed, gpu)
    whole = triton.gemv(broken, x.to(gpu), rule)
    broken.part["values"][7] = math.nan
    assert torch.equal(triton.gemv(broken, x.to(gpu), rule), whole)
    assert triton.gemv(broken, x.to(gpu), SkipRule(torch.tensor(0.0))).isnan().all()


def test_nothing_counts_and_nan_counts(gpu):
    weight, x = TritonWeight(packed_for(8), gpu), inputs(2, COLUMNS).to(gpu)
    never = SkipRule(torch.tensor(torch.inf))
    assert torch.equal(triton.gemv(weight, x, never), torch.zeros(2, 8, dtype=x.dtype, device=gpu))
    x[1, 4] = math.nan
    found = triton.gemv(weight, x, never)
    assert not found[0].any()
    assert found[1].isnan().all()


def test_bits_do_not_depend_on_other_tokens(gpu):
    weight, x, rule = TritonWeight(packed_for(6), gpu), inputs(16, COLUMNS).to(gpu), rules()[2]
    launch = triton.SkipLaunch(rows=16, channels=32, splits=2)
    together = triton.gemv(weight, x, rule, launch)
    assert torch.equal(together, torch.cat([triton.gemv(weight, row, rule, launch) for row in x.split(1)]))


@pytest.mark.parametrize("name", ["silu", "relu"])
def test_gate_and_up_joined(gpu, name):
    packed, x, rule = packed_for(12), inputs(2, COLUMNS), rules()[0]
    found = triton.gemv(TritonWeight(packed, gpu), x.to(gpu), rule, joined=name).cpu()
    sums, bound = expected(packed, x, rule)
    gate, up = sums.chunk(2, dim=1)
    wanted = getattr(torch.nn.functional, name)(gate) * up
    slack = 1.1 * (bound[:, :6] * up.abs() + (gate.abs() + bound[:, :6]) * bound[:, 6:]) + 1e-6
    assert ((found.double() - wanted).abs() <= slack + place(x.dtype) * wanted.abs()).all()


def test_a_weight_by_columns_takes_any_number_of_inputs(gpu):
    packed, x = packed_for(4), inputs(19, COLUMNS)
    found = TritonWeight(packed, gpu)(x.to(gpu)).cpu()
    dense = build_format("columns").unpack(packed)
    bound = reference.error_bound(dense, x, (COLUMNS + 16) * 2**-23)
    wanted = reference.gemv(dense, x)
    assert ((found.double() - wanted).abs() <= bound + place(x.dtype) * wanted.abs()).all()


@pytest.mark.parametrize(
    ("rule", "joined", "words"),
    [
        (SkipRule(torch.tensor(1.0), scale="top", kept=3), None, "no GPU kernel for the scale top"),
        (SkipRule(torch.ones(3)), None, "one threshold, or 70, none negative"),
        (SkipRule(torch.tensor(-1.0)), None, "one threshold, or 70, none negative"),
        (SkipRule(torch.tensor(math.nan)), None, "one threshold, or 70, none negative"),
        (None, "tanh", "joined by tanh"),
        (None, "silu", "as many rows of gate and up, not 5"),
    ],
)
def test_what_it_refuses(gpu, rule, joined, words):
    with pytest.raises(InvalidInput, match=words):
        triton.gemv(TritonWeight(packed_for(5), gpu), inputs(1, COLUMNS).to(gpu), rule, joined=joined)


def test_other_formats_are_refused(gpu):
    weight = TritonWeight(build_format("bitmask").pack(weight_for("bitmask", 4, COLUMNS)), gpu)
    with pytest.raises(InvalidInput, match="a weight by columns and at most 16 inputs, not bitmask"):
        triton.gemv(weight, inputs(1, COLUMNS).to(gpu))
