"""Sixteen rows side by side: where every byte lies, and that all come back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparity.formats import build_format, unpack
from sparity.formats.conversions.spread import SpreadSideBySide
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.pairs_beside import PairsSideBySide
from sparity.formats.storage.side_by_side import DenseSideBySide


def test_where_a_byte_of_a_row_lies():
    values = torch.arange(18 * 16, dtype=torch.int64).to(torch.uint8).view(18, 16)  # 18 rows of 32 columns
    scales = torch.arange(18.0)[:, None] + torch.tensor([[0.0, 100.0]])
    laid = DenseSideBySide.of({"values": values, "scales": scales}).laid
    assert laid["values"].shape == (2, 4, 16, 4)
    assert torch.equal(laid["values"][0, 1, 5], values[5, 4:8])  # columns 8 to 15 of row 5
    assert torch.equal(laid["values"][1, 3, 1], values[17, 12:16])
    assert not laid["values"][1, :, 2:].any()  # beyond the matrix
    assert laid["scales"].shape == (2, 2, 16)
    assert laid["scales"][0, 1, 7] == 107
    assert all(part.is_contiguous() for part in laid.values())


def test_where_two_of_four_lie():
    weight = torch.zeros(2, 32)
    weight[1, 1], weight[1, 3] = -8, 5  # the first four: places 1 and 3
    weight[1, 4], weight[1, 6] = 7, -1  # the second: 0 and 2
    weight[1, 26] = 2  # the third of the second sixteen: place 2, and 3, where nothing is kept
    packed = build_format("two_of_four").pack(weight.bfloat16(), {"int4": {"group": 32}})
    assert packed.tensors["scales"][1].item() == 1
    laid = PairsSideBySide.of(packed.tensors, *packed.shape).laid
    assert laid["masks"].shape == (1, 2, 16, 2)
    empty = 0b10, 0b11  # a four of which nothing is kept: places 2 and 3
    assert laid["masks"][0, 0, 1].tolist() == [1 | 0 << 2 | empty[0] * 0b01010000, 3 | 2 << 2 | empty[1] * 0b01010000]
    assert laid["masks"][0, 1, 1].tolist() == [empty[0] * 0b01010101, empty[1] * 0b01010101]
    assert laid["values"].shape == (1, 4, 16, 2)
    assert laid["values"][0, 0, 1].tolist() == [(-8 + 8) | (7 + 8) << 4, (5 + 8) | (-1 + 8) << 4]
    assert laid["values"][0, 3, 1].tolist() == [(2 + 8) | 8 << 4, 8 | 8 << 4]


def lay(packed):
    """The tensors of a matrix side by side."""
    if packed.format == "bitmask":
        return SpreadSideBySide.of(packed)
    if packed.format == "two_of_four":
        return PairsSideBySide.of(packed.tensors, *packed.shape)
    return DenseSideBySide.of(packed.tensors)


@given(
    name=st.sampled_from(["dense", "two_of_four", "bitmask"]),
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    symmetric=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_tensor_comes_back(name, rows, groups, symmetric, seed):
    weight = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)).bfloat16()
    if name != "dense":
        weight.view(-1, 4)[:, seed % 2 :: 2] = 0
    packed = build_format(name).pack(weight, {"int4": {"group": 32, "symmetric": symmetric}})
    laid = Packed(packed.format, packed.shape, packed.dtype, lay(packed), {}, packed.encoding)
    assert set(laid.tensors) == set(packed.tensors)
    assert len(laid.tensors) == len(packed.tensors)
    assert all(torch.equal(laid.tensors[name], part) for name, part in packed.tensors.items())
    assert laid.nbytes == sum(part.numel() * part.element_size() for part in laid.tensors.laid.values())
    assert torch.equal(unpack(laid), unpack(packed))


@given(rows=st.integers(1, 40), seed=st.integers(0, 9))
def test_some_rows_of_a_dense_matrix(rows, seed):
    random = torch.Generator().manual_seed(seed)
    packed = build_format("dense").pack(torch.randn(rows, 64, generator=random).bfloat16(), "int4")
    laid = Packed(packed.format, packed.shape, packed.dtype, lay(packed), {}, packed.encoding)
    ids = torch.randint(0, rows, (5,), generator=random)
    for name, part in packed.rows_of(ids).items():
        assert torch.equal(laid.rows_of(ids)[name], part)
    with pytest.raises(IndexError):
        laid.rows_of(torch.tensor([rows]))


def test_a_name_that_is_not_there():
    with pytest.raises(KeyError, match="masks"):
        DenseSideBySide.of({"values": torch.zeros(1, 16, dtype=torch.uint8)})["masks"]
