"""From and to SciPy's sparse matrices: COO, CSR and BSR. SciPy itself is not needed until one is asked for."""

from typing import Any

import numpy as np
import torch

from sparity.errors import InvalidInput
from sparity.formats.conversions.torch_sparse import compressed, from_torch, to_torch
from sparity.formats.storage.packed import Packed


def to_scipy(packed: Packed) -> Any:
    """`coo`, `csr` or `block` -> `coo_array`, `csr_array` or `bsr_array`; quantised values are decoded.

    Raises:
        InvalidInput: SciPy is not installed, has no such format, or no such type (it knows float32 only).
    """
    sparse = _scipy()
    if packed.dtype != torch.float32:
        raise InvalidInput(f"SciPy has no sparse {packed.dtype}; unpack, cast to float32 and pack again")
    if packed.format not in ("coo", "csr", "block"):
        raise InvalidInput(f"SciPy has no format like {packed.format}; convert to coo, csr or block first")
    tensor = to_torch(packed)
    if packed.format == "coo":
        return sparse.coo_array((tensor.values().numpy(), tuple(tensor.indices().numpy())), shape=packed.shape)
    make = sparse.csr_array if packed.format == "csr" else sparse.bsr_array
    parts = (tensor.values().numpy(), tensor.col_indices().numpy(), tensor.crow_indices().numpy())
    return make(parts, shape=packed.shape)


def from_scipy(matrix: Any) -> Packed:
    """A SciPy COO, CSR or BSR array or matrix in float32 or float64 -> `coo`, `csr` or `block` in float32.

    Entries that occur twice are summed, as SciPy does.

    Raises:
        InvalidInput: another format or type.
    """
    kind = getattr(matrix, "format", None)
    if kind not in ("coo", "csr", "bsr") or matrix.dtype not in (np.float32, np.float64):
        raise InvalidInput(
            f"cannot read {type(matrix).__name__} in {getattr(matrix, 'dtype', None)}; give COO, CSR or BSR"
        )
    matrix = matrix.astype(np.float32).copy()
    matrix.sum_duplicates()
    if kind == "coo":
        indices = torch.from_numpy(np.stack((matrix.row, matrix.col)).astype(np.int64))
        return from_torch(
            torch.sparse_coo_tensor(indices, torch.from_numpy(matrix.data), matrix.shape, check_invariants=True)
        )
    offsets, columns = (torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices))
    layout = torch.sparse_csr if kind == "csr" else torch.sparse_bsr
    return from_torch(compressed(layout, offsets, columns, torch.from_numpy(matrix.data), matrix.shape))


def _scipy() -> Any:
    try:
        from scipy import sparse
    except ImportError as error:
        raise InvalidInput("this conversion needs SciPy: pip install scipy") from error
    return sparse
