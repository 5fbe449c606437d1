"""Sixteen rows side by side: where every byte lies, and that all come back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparity.formats import build_format, unpack
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.side_by_side import SideBySide


def test_where_a_byte_of_a_row_lies():
    values = torch.arange(18 * 16, dtype=torch.int64).to(torch.uint8).view(18, 16)  # 18 rows of 32 columns
    scales = torch.arange(18.0)[:, None] + torch.tensor([[0.0, 100.0]])
    laid = SideBySide.of({"values": values, "scales": scales}).laid
    assert laid["values"].shape == (2, 4, 16, 4)
    assert torch.equal(laid["values"][0, 1, 5], values[5, 4:8])  # columns 8 to 15 of row 5
    assert torch.equal(laid["values"][1, 3, 1], values[17, 12:16])
    assert not laid["values"][1, :, 2:].any()  # beyond the matrix
    assert laid["scales"].shape == (2, 2, 16)
    assert laid["scales"][0, 1, 7] == 107
    assert all(part.is_contiguous() for part in laid.values())


@given(rows=st.integers(1, 40), groups=st.integers(1, 3), symmetric=st.booleans(), seed=st.integers(0, 9))
def test_every_tensor_comes_back(rows, groups, symmetric, seed):
    weight = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)).bfloat16()
    packed = build_format("dense").pack(weight, {"int4": {"group": 32, "symmetric": symmetric}})
    laid = Packed(packed.format, packed.shape, packed.dtype, SideBySide.of(packed.tensors), {}, packed.encoding)
    assert list(laid.tensors) == list(packed.tensors)
    assert all(torch.equal(laid.tensors[name], part) for name, part in packed.tensors.items())
    assert laid.nbytes == packed.nbytes
    assert torch.equal(unpack(laid), unpack(packed))
    ids = torch.randint(0, rows, (5,), generator=torch.Generator().manual_seed(seed))
    for name, part in packed.rows_of(ids).items():
        assert torch.equal(laid.rows_of(ids)[name], part)
    with pytest.raises(IndexError):
        laid.rows_of(torch.tensor([rows]))


def test_a_name_that_is_not_there():
    with pytest.raises(KeyError, match="masks"):
        SideBySide.of({"values": torch.zeros(1, 16, dtype=torch.uint8)})["masks"]
