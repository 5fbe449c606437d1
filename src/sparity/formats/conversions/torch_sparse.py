"""From and to PyTorch's sparse tensors: COO, CSR and BSR, and its semi-structured tensors on a GPU."""

import warnings

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.formats.base import build_format, check_weight, format_of
from sparity.formats.conversions.between import convert
from sparity.formats.storage.kept import place
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.values import bits


def to_torch(packed: Packed) -> Tensor:
    """`coo`, `csr` or `block` -> a tensor of the layout sparse COO, CSR or BSR; `dense` -> a plain tensor.

    Quantised values are decoded.

    Raises:
        InvalidInput: PyTorch has no such layout, or blocks that do not divide the shape.
    """
    form = format_of(packed)
    form.check(packed)
    if packed.quantized:
        packed = form.pack(form.unpack(packed))
    part = packed.tensors
    if packed.format == "dense":
        return form.decode(packed)
    if packed.format == "coo":
        indices = torch.stack((part["rows"], part["columns"])).long()
        return torch.sparse_coo_tensor(indices, part["values"], packed.shape, is_coalesced=True, check_invariants=True)
    if packed.format == "csr":
        return compressed(torch.sparse_csr, part["offsets"], part["columns"], part["values"], packed.shape)
    if packed.format == "block":
        if packed.shape[0] % packed.options["rows"] or packed.shape[1] % packed.options["columns"]:
            raise InvalidInput(f"PyTorch's BSR needs blocks that divide the shape {packed.shape}")
        return compressed(torch.sparse_bsr, part["offsets"], part["columns"], part["values"], packed.shape)
    raise InvalidInput(f"PyTorch has no layout like {packed.format}; convert to coo, csr or block first")


def compressed(
    layout: torch.layout, offsets: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]
) -> Tensor:
    """A sparse CSR or BSR tensor, checked, without the warning that PyTorch gives for the first one of a process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta state", UserWarning)
        return torch.sparse_compressed_tensor(
            offsets.long(), columns.long(), values, shape, layout=layout, check_invariants=True
        )


def from_torch(tensor: Tensor) -> Packed:
    """A sparse COO, CSR or BSR tensor, or a plain matrix -> `coo`, `csr`, `block` or `dense`.

    Stored zeros are dropped; the entries of a COO tensor that is not coalesced are summed.

    Raises:
        InvalidInput: another layout or type, or more than two dimensions.
    """
    tensor = tensor.detach().cpu()
    if tensor.layout == torch.strided:
        return build_format("dense").pack(tensor)
    if tensor.dim() != 2 or tensor.layout not in (torch.sparse_coo, torch.sparse_csr, torch.sparse_bsr):
        raise InvalidInput(f"cannot read a {tensor.dim()}-dimensional tensor of the layout {tensor.layout}")
    shape = (tensor.shape[0], tensor.shape[1])
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        if tensor.dense_dim():
            raise InvalidInput("cannot read a hybrid COO tensor")
        values, (rows, columns) = tensor.values(), tensor.indices()
        return _packed("coo", place(bits(values), rows, columns, shape).view(values.dtype))
    values, across = tensor.values(), tensor.col_indices()
    down = torch.repeat_interleave(torch.arange(len(tensor.crow_indices()) - 1), tensor.crow_indices().diff())
    if tensor.layout == torch.sparse_csr:
        return _packed("csr", place(bits(values), down, across, shape).view(values.dtype))
    high, wide = values.shape[1:]
    blocks = torch.zeros(shape[0] // high, shape[1] // wide, high, wide, dtype=bits(values).dtype)
    blocks[down, across] = bits(values)
    dense = blocks.transpose(1, 2).reshape(shape).view(values.dtype)
    return _packed({"block": {"rows": high, "columns": wide}}, dense)


def to_semi_structured(packed: Packed, device: str = "cuda") -> Tensor:
    """A 2:4 matrix -> PyTorch's semi-structured tensor on a GPU, whose library chooses the layout.

    Stored values go over as they are, without their scales.

    Raises:
        InvalidInput: no GPU, or a mask that is not 2:4.
    """
    if not torch.cuda.is_available():
        raise InvalidInput("semi-structured tensors need a CUDA GPU; on the CPU use the format two_of_four itself")
    two_of_four = convert(packed, "two_of_four")
    form = format_of(two_of_four)
    form.check(two_of_four)
    return torch.sparse.to_sparse_semi_structured(form.decode(two_of_four).to(device))


def from_semi_structured(tensor: Tensor) -> Packed:
    """PyTorch's semi-structured tensor -> `two_of_four`.

    Raises:
        InvalidInput: what the tensor holds is not 2:4.
    """
    return build_format("two_of_four").pack(tensor.to_dense())


def _packed(spec: str | dict[str, dict[str, int]], dense: Tensor) -> Packed:
    check_weight(dense)
    return build_format(spec).pack(dense)
