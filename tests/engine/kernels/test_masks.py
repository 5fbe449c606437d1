"""Every mask of eight weights, wherever it lies, and how a matrix may end: all exact, with small whole numbers."""

from itertools import combinations, product

import pytest
import torch

from sparity.engine.kernels.gemv.cpu import gemv
from sparity.engine.kernels.native_weight import NativeWeight
from sparity.formats import build_format

TOKENS = (1, 2, 3, 4)
PAIRS = [sum(1 << place for place in two) for two in combinations(range(4), 2)]  # two kept of four
EIGHTS = {
    "bitmask": torch.arange(256),
    "two_of_four": torch.tensor([low | high << 4 for low, high in product(PAIRS, PAIRS)]),
}


def whole_numbers(*shape, most, seed):
    """Whole numbers of 1 to `most` of either sign: bfloat16 and float32 sums hold them exactly."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return sign * torch.randint(1, most + 1, shape, generator=generator)


def weight_of(masks, most=9):
    """`masks` [rows, eights], a bit per weight -> bfloat16 [rows, 8 eights] with whole numbers where a bit is set."""
    kept = (masks[..., None] >> torch.arange(8) & 1).flatten(1)
    return (kept * whole_numbers(*kept.shape, most=most, seed=0)).bfloat16()


def check(name, weight, values):
    """Against whole-number products of what is stored."""
    packed = build_format(name).pack(weight, values)
    for tokens in TOKENS:
        x = whole_numbers(tokens, weight.shape[1], most=5, seed=tokens)
        x[:, 0] = 127  # so that inputs quantised by the largest of them stay what they are
        wanted = x.double() @ build_format(name).decode(packed).double().T
        if values == "int8":
            wanted = wanted * packed.tensors["scales"].double()
        out = torch.full((tokens, len(weight)), float("nan"))
        gemv(NativeWeight(packed), x.bfloat16(), out)
        assert torch.equal(out, wanted.float())


@pytest.mark.parametrize("name", EIGHTS)
@pytest.mark.parametrize("values", ["same", "int8"])
def test_every_mask_of_eight_in_every_place(isa, name, values):
    masks = torch.stack([EIGHTS[name].roll(5 * place) for place in range(9)], 1)  # the ninth is the tail of a row
    assert all(len(column.unique()) == len(EIGHTS[name]) for column in masks.T)
    check(name, weight_of(masks), values)


@pytest.mark.parametrize("values", ["same", "int8"])
def test_a_matrix_whose_values_end_long_before_its_rows(isa, values):
    for rows in (1, 3, 4, 5, 8):
        for kept in (1, 15, 16, 17, 40):
            weight = weight_of(torch.full((rows, 24), 255))
            weight[0, kept:] = 0
            weight[1:] = 0
            check("bitmask", weight, values)
            check("bitmask", weight.flip(0), values)  # and whose first rows are empty


@pytest.mark.parametrize("values", ["same", "int8"])
def test_values_thin_out_towards_the_end(isa, values):
    weight = weight_of(torch.full((5, 80), 255))
    for row in range(5):
        weight[row, 64 * (row + 1) - 3 : 640 - row] = 0  # a few values in the first and in the last group of each row
    check("bitmask", weight, values)
    weight = weight_of(torch.full((1, 64), 255))
    weight[0, torch.arange(512) % 64 > 0] = 0  # the last values are those of several groups
    check("bitmask", weight, values)


@pytest.mark.parametrize("name", EIGHTS)
def test_int8_sums_that_only_fit_when_scaled_back_in_time(isa, name):
    masks = EIGHTS[name][-1].expand(4, 2048)  # 16384 columns
    weight = weight_of(masks).sign().abs()
    packed = build_format(name).pack(weight, "int8")
    assert packed.tensors["values"].max() == 127
    x = torch.full((4, 16384), 127.0).bfloat16()
    out = torch.empty(4, 4)
    gemv(NativeWeight(packed), x, out)
    sums = build_format(name).decode(packed).double().sum(1) * 127
    assert torch.equal(out, (sums * packed.tensors["scales"].double()).float().expand(4, 4))
