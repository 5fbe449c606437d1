"""int4 by its definition: two values in a byte, groups, zero points, and weights that are on a grid already."""

import pytest
import torch

from sparity.errors import InvalidInput
from sparity.formats import build_encoding, build_format
from sparity.formats.encodings.int4 import Int4
from sparity.formats.storage.nibbles import narrow, widen


def weight(rows=6, columns=256, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, columns, generator=generator)
    dense[torch.rand(rows, columns, generator=generator) < 0.4] = 0
    return dense.to(dtype)


def test_the_first_of_two_values_lies_in_the_lower_half_of_a_byte():
    values = torch.tensor([[1, -1, 7], [-8, 3, -2]], dtype=torch.int8)
    assert narrow(values).tolist() == [[0xF1, 0x07], [0x38, 0x0E]]
    assert torch.equal(widen(narrow(values), 3), values)
    assert narrow(torch.empty(0, dtype=torch.int8)).shape == (0,)


def test_symmetric_values_by_hand():
    row = torch.zeros(1, 32)
    row[0, :6] = torch.tensor([15.0, -15.0, 2.0, 1.0, -3.0, 5.0])  # the scale is 2 * 15 / 15 = 2, not -15 / 8
    values, sides = Int4().encode(row)
    assert sides["scales"].tolist() == [[2.0]]
    assert values[0, :6].tolist() == [7, -8, 1, 0, -2, 2]  # 7.5 rounds to 8, of which there is none; ties go to even
    back = Int4().decode(values, sides, torch.float32)
    assert back[0, :6].tolist() == [14.0, -16.0, 2.0, 0.0, -4.0, 4.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weight_is_the_code_of_which_there_is_one_more(sign):
    row = torch.zeros(1, 32)
    row[0, :4] = sign * torch.tensor([16.0, 2.0, -14.0, 5.0])  # by 16 / 8 only 5 is rounded
    values, sides = Int4().encode(row)
    assert sides["scales"].tolist() == [[-2.0 * sign]]
    assert values[0, :4].tolist() == [-8, -1, 7, -2]
    assert Int4().decode(values, sides, torch.float32)[0, :4].tolist() == [sign * each for each in (16, 2, -14, 4)]


def test_values_with_a_zero_point_by_hand():
    row = torch.zeros(1, 32)
    row[0, :4] = torch.tensor([11.0, -4.0, 0.0, 5.0])  # 15 steps of 1 from -4 on: the code of 0 is 4
    values, sides = Int4(symmetric=False).encode(row)
    assert (sides["scales"].tolist(), sides["zeros"].tolist()) == ([[1.0]], [[4]])
    assert values[0, :4].tolist() == [-5, -4, 0, 5]  # 11 is code 15, 15 - 4 = 11, and 11 - 16 = -5
    assert Int4(symmetric=False).decode(values, sides, torch.float32)[0, :4].tolist() == [11.0, -4.0, 0.0, 5.0]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_type", ["bfloat16", "float16", "float32"])
def test_every_group_by_the_formula(group, symmetric, scale_type):
    dense, encoding = weight(), Int4(group, symmetric, scale_type)
    values, sides = encoding.encode(dense)
    back = encoding.decode(values, sides, torch.bfloat16)
    kind = getattr(torch, scale_type)
    for row in range(len(dense)):
        for start in range(0, dense.shape[1], group):
            part, at = dense[row, start : start + group].float(), start // group
            low, high = min(float(part.min()), 0), max(float(part.max()), 0)
            steps = [high / 15 - low / 15]
            if symmetric:
                steps = [2 * max(-low, high) / 15, -high / 8 if high >= -low else -low / 8]
            lost = {}
            for step in (float(torch.tensor(step).to(kind)) for step in steps):
                lost[step] = float(((part / step).round().clamp(-8, 7) * step - part).square().sum())
            step = min(lost, key=lost.get)
            assert sides["scales"][row, at].float() == pytest.approx(step, rel=2**-7)
            scale = sides["scales"][row, at].float()
            zero = 0 if symmetric else int((-low / scale).round())
            codes = ((part / scale).round() + zero).clamp(*((-8, 7) if symmetric else (0, 15)))
            assert torch.equal(back[row, start : start + group], ((codes - zero) * scale).bfloat16())
            assert torch.equal(values[row, start : start + group] % 16, ((codes - zero) % 16).to(torch.int8))


def test_it_says_what_it_is():
    encoding = build_encoding({"int4": {"group": 64, "scale_type": "float16"}})
    assert encoding.spec == {"int4": {"group": 64, "symmetric": True, "scale_type": "float16"}}
    assert (encoding.bits(torch.float32), encoding.half_bytes, encoding.integer_products) == (4, True, False)
    assert encoding.words(torch.bfloat16) == "int4 in groups of 64, float16 scales"
    assert Int4(32, symmetric=False).words(torch.bfloat16) == "int4 in groups of 32 with zero points, bfloat16 scales"
    assert encoding.side_tensors(5, 128) == {"scales": (torch.float16, (5, 2))}
    assert build_format("dense").nbytes((5, 128), 640, torch.bfloat16, encoding) == 5 * 64 + 5 * 2 * 2
    assert build_format("csr").nbytes((5, 128), 3, torch.bfloat16, encoding) == 3 * 4 + 6 * 8 + 2 + 20


@pytest.mark.parametrize(
    ("spec", "columns", "words"),
    [
        ({"group": 48}, 96, "groups of 32, 64 or 128 weights, not 48"),
        ({"group": 64}, 96, "groups of 64 do not divide a row of 96 weights; choose a group of 32"),
        ({"group": 128}, 192, "choose a group of 32 or 64"),
        ({}, 100, "groups of 32 do not divide a row of 100 weights; keep another encoding, such as int8"),
        ({"scale_type": "int8"}, 64, "scale_type"),
    ],
)
def test_groups_that_do_not_fit_are_refused(spec, columns, words):
    with pytest.raises(InvalidInput, match=words):
        build_format("dense").pack(torch.ones(2, columns), {"int4": spec})


def test_a_scale_that_its_type_cannot_hold_is_refused():
    large = torch.full((1, 32), 1e6)
    with pytest.raises(InvalidInput, match=r"a scale of 1.33e.05 does not fit into float16; take scale_type bfloat16"):
        Int4(scale_type="float16").encode(large)
    assert Int4().encode(large)[1]["scales"].isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("wide", "group"), [(32, 32), (64, 64), (96, 32), (384, 128)])
def test_a_weight_on_a_grid_is_stored_by_the_grid_s_own_scales(symmetric, dtype, wide, group):
    generator = torch.Generator().manual_seed(3)
    rows, columns = 5, 384
    codes = torch.randint(-8 if symmetric else 0, 8 if symmetric else 16, (rows, columns), generator=generator)
    scales = torch.rand(rows, columns // wide, generator=generator) * 0.1 + 0.01
    zeros = torch.randint(0, 16, (rows, columns // wide), generator=generator)
    shift = 0 if symmetric else zeros.repeat_interleave(wide, 1)
    dense = ((codes - shift).float() * scales.repeat_interleave(wide, 1)).to(dtype)
    recorded = {"scales": scales} | ({} if symmetric else {"zeros": zeros.to(torch.uint8)})
    encoding, values, sides = Int4(64).on_grid(dense, recorded)
    assert encoding == Int4(group, symmetric, "float32")
    packed = build_format("bitmask").wrap(values, sides, dtype, encoding)
    assert torch.equal(build_format("bitmask").unpack(packed), dense)
    dense[2, 7] += 0.5 * float(scales[2, 7 // wide])
    assert Int4().on_grid(dense, recorded) is None


def test_scales_that_are_none_of_a_weight_are_not_used():
    dense, scales = weight(), torch.ones(6, 8)
    for recorded in (
        {},
        {"scales": scales[:5]},
        {"scales": torch.ones(6, 5)},
        {"scales": torch.ones(6, 0)},
        {"scales": torch.ones(6, 64)},  # groups of 4
        {"scales": torch.zeros(6, 8)},
        {"scales": scales.double()},
        {"scales": scales, "zeros": torch.full((6, 8), 16, dtype=torch.uint8)},
        {"scales": scales, "zeros": torch.zeros(6, 8)},
        {"scales": scales},
    ):
        assert Int4().on_grid(dense, recorded) is None
