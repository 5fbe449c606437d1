"""From and to PyTorch, SciPy and NVIDIA's layout."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import build_format, unpack
from sparity.formats.conversions import nvidia, scipy, torch_sparse
from sparity.formats.encodings.int8 import Int8
from sparity.formats.storage.values import bits


def sparse(shape=(32, 48), dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.3, weight, 0.0).to(dtype)


def half(rows, columns, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(rows, columns, generator=generator)
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    weight[(order >= 2).flatten(1)] = 0
    weight[torch.rand(rows, columns, generator=generator) < 0.3] = 0  # groups with one and with none
    return weight.to(dtype)


@pytest.mark.parametrize("name", ["coo", "csr", "block", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_and_back(name, dtype):
    weight = sparse(dtype=dtype)
    weight[0, 0] = -0.0
    packed = build_format(name).pack(weight)
    tensor = torch_sparse.to_torch(packed)
    assert torch.equal(tensor.to_dense(), weight)
    back = torch_sparse.from_torch(tensor)
    assert back.format == name
    assert torch.equal(bits(unpack(back)), bits(weight))


def test_torch_makes_its_own_layouts_and_they_are_read():
    weight = sparse()
    assert torch.equal(unpack(torch_sparse.from_torch(weight.to_sparse_csr())), weight)
    blocked = torch_sparse.from_torch(weight.to_sparse_bsr((4, 8)))
    assert dict(blocked.options) == {"rows": 4, "columns": 8}
    assert torch.equal(unpack(blocked), weight)
    twice = torch.sparse_coo_tensor(
        torch.tensor([[0, 0], [1, 1]]), torch.tensor([2.0, 3.0]), (2, 2), check_invariants=True
    )
    assert unpack(torch_sparse.from_torch(twice)).tolist() == [[0, 5], [0, 0]]


def test_torch_dequantises_int8():
    packed = build_format("csr").pack(sparse(), values="int8")
    assert torch.equal(torch_sparse.to_torch(packed).to_dense(), unpack(packed))


def test_what_torch_does_not_have_is_refused():
    with pytest.raises(InvalidInput, match="no layout like bitmask"):
        torch_sparse.to_torch(build_format("bitmask").pack(sparse()))
    with pytest.raises(InvalidInput, match="divide the shape"):
        torch_sparse.to_torch(build_format({"block": {"rows": 5}}).pack(sparse()))
    with pytest.raises(InvalidInput, match="cannot read a 2-dimensional tensor of the layout"):
        torch_sparse.from_torch(sparse().to_sparse_csc())
    if not torch.cuda.is_available():
        with pytest.raises(InvalidInput, match="need a CUDA GPU"):
            torch_sparse.to_semi_structured(build_format("two_of_four").pack(half(32, 64)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured tensors need a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_semi_structured_on_a_gpu(dtype):
    weight = half(128, 256, dtype)
    tensor = torch_sparse.to_semi_structured(build_format("two_of_four").pack(weight))
    back = torch_sparse.from_semi_structured(tensor)
    assert torch.equal(unpack(back), weight)


@pytest.mark.parametrize("name", ["coo", "csr", "block"])
def test_scipy_and_back(name):
    pytest.importorskip("scipy", reason="SciPy is not installed")
    weight = sparse()
    matrix = scipy.to_scipy(build_format(name).pack(weight))
    assert matrix.format == {"block": "bsr"}.get(name, name)
    assert torch.equal(torch.from_numpy(matrix.toarray()), weight)
    back = scipy.from_scipy(matrix)
    assert back.format == name
    assert torch.equal(unpack(back), weight)
    with pytest.raises(InvalidInput, match=r"no sparse torch\.bfloat16"):
        scipy.to_scipy(build_format(name).pack(weight.bfloat16()))
    with pytest.raises(InvalidInput, match="give COO, CSR or BSR"):
        scipy.from_scipy(matrix.tocsc())


@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 320)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nvidia_layout_is_pytorchs(shape, dtype):
    weight = half(*shape, dtype)
    packed = build_format("two_of_four").pack(weight)
    values, metadata = nvidia.to_nvidia(packed)
    wanted_values, wanted_metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(values, wanted_values)
    assert torch.equal(metadata, wanted_metadata)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), weight)
    back = nvidia.from_nvidia(values, metadata, dtype)
    assert all(torch.equal(back.tensors[part], packed.tensors[part]) for part in ("masks", "values"))


@pytest.mark.parametrize("shape", [(32, 128), (64, 384)], ids=str)
def test_nvidia_layout_of_int8(shape):
    weight = half(*shape, torch.float32)
    packed = build_format("two_of_four").pack(weight, values="int8")
    values, metadata = nvidia.to_nvidia(packed)
    stored, sides = Int8().encode(weight)
    wanted_values, wanted_metadata = sparse_semi_structured_from_dense_cutlass(stored)
    assert metadata.dtype == torch.int32
    assert torch.equal(values, wanted_values)
    assert torch.equal(metadata, wanted_metadata)
    back = nvidia.from_nvidia(values, metadata, torch.float32, sides["scales"])
    assert torch.equal(unpack(back), unpack(packed))


def test_nvidia_by_hand():
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[0, :4] = torch.tensor([0, 1, 0, 2])  # indices 1 and 3: 0b1101
    metadata = nvidia.to_nvidia(build_format("two_of_four").pack(weight))[1]
    assert metadata.shape == (32, 4)
    assert int(metadata.flatten()[0]) & 0xFFFF == 0b1110_1110_1110_1101  # an empty group names its last two places


def test_nvidia_refusals():
    with pytest.raises(InvalidInput, match="rows a multiple of 32; not 16 x 64"):
        nvidia.to_nvidia(build_format("two_of_four").pack(half(16, 64)))
    with pytest.raises(InvalidInput, match="only two_of_four"):
        nvidia.to_nvidia(build_format("csr").pack(half(32, 64)))
    values, metadata = nvidia.to_nvidia(build_format("two_of_four").pack(half(32, 64)))
    with pytest.raises(CorruptFile, match="not two of four in rising order"):
        nvidia.from_nvidia(values, torch.zeros_like(metadata), torch.bfloat16)
    with pytest.raises(InvalidInput, match="does not fit the values"):
        nvidia.from_nvidia(values, metadata[:, :1], torch.bfloat16)
    with pytest.raises(InvalidInput, match="int8 values need scales"):
        nvidia.from_nvidia(values.to(torch.int8), metadata, torch.bfloat16)
