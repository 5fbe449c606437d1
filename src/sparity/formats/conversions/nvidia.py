"""2:4 as NVIDIA's sparse tensor cores read it: kept values row by row, and two 2-bit indices per group of four.

The order of the indices is CUTLASS's (Mishra et al. 2021, arXiv:2104.08378, for the pattern): PyTorch's
semi-structured tensors use it too, so the layout can be built and tested without a GPU.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparity.errors import CorruptFile, InvalidInput
from sparity.formats.base import format_of
from sparity.formats.encodings.int8 import Int8
from sparity.formats.encodings.same import Same
from sparity.formats.storage import tiles
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.values import bits, dtype_name
from sparity.formats.two_of_four import KEPT

ROW_MULTIPLE = 32


def to_nvidia(packed: Packed) -> tuple[Tensor, Tensor]:
    """`two_of_four` [rows, columns] -> values `[rows, columns / 2]` and CUTLASS's metadata.

    The metadata is int16 `[rows, columns / 16]` for 16-bit values and int32 `[rows, columns / 32]` for int8.

    Raises:
        InvalidInput: another format, float32, or a shape that the tensor cores do not take.
        CorruptFile: the packed matrix contradicts itself.
    """
    rows, columns = packed.shape
    if packed.format != "two_of_four":
        raise InvalidInput(f"only two_of_four has this layout, not {packed.format}")
    if packed.encoding.half_bytes:
        raise InvalidInput(f"the tensor cores take no {packed.encoding.name} values: unpack the matrix first")
    format_of(packed).check(packed)
    values = packed.tensors["values"]
    _check_shape(rows, columns, values.dtype)
    masks = packed.tensors["masks"].transpose(1, 2).reshape(rows, -1)[:, : columns // 8]
    words = torch.from_numpy(_INDICES[masks.numpy()].view(_word(values.dtype)))
    kept = bits(values).transpose(1, 2).reshape(rows, -1)[:, : columns // 2].contiguous().view(values.dtype)
    return kept, _reorder(words)


def from_nvidia(values: Tensor, metadata: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> Packed:
    """The inverse of `to_nvidia`; `dtype` is what unpacking gives, `scales` [rows] belong to int8 values.

    Raises:
        InvalidInput: shapes or types that do not belong together.
        CorruptFile: an index pair that is no two of four.
    """
    if values.dim() != 2 or (scales is None) == (values.dtype == torch.int8):
        raise InvalidInput("values must be a matrix, and int8 values need scales")
    rows, columns = values.shape[0], values.shape[1] * 2
    _check_shape(rows, columns, values.dtype)
    word = torch.from_numpy(np.empty(0, _word(values.dtype))).dtype
    if metadata.dtype != word or metadata.shape != (rows, columns // 8 // word.itemsize):
        raise InvalidInput(f"metadata {list(metadata.shape)} in {dtype_name(metadata.dtype)} does not fit the values")
    masks = _MASKS[_restore(metadata).numpy().view(np.uint8)]
    if (masks == 0).any():
        raise CorruptFile("the metadata holds an index pair that is not two of four in rising order")
    padded = torch.zeros(rows, -(-columns // tiles.COLUMNS) * (tiles.COLUMNS // 8), dtype=torch.uint8)
    padded[:, : columns // 8] = torch.from_numpy(masks)
    padded[:, columns // 8 :] = 0b11001100
    kept = bits(values).new_zeros(rows, padded.shape[1] * 4)
    kept[:, : columns // 2] = bits(values)
    count, groups = tiles.grid(rows, columns)
    parts = {
        "masks": padded.view(count, tiles.ROWS, groups, -1).transpose(1, 2).contiguous(),
        "values": kept.view(count, tiles.ROWS, groups, KEPT).transpose(1, 2).contiguous().view(values.dtype),
    }
    encoding, sides = (Same(), {}) if scales is None else (Int8(), {"scales": scales})
    packed = Packed("two_of_four", (rows, columns), dtype, {**parts, **sides}, {}, encoding)
    format_of(packed).check(packed)
    return packed


def _reorder(words: Tensor) -> Tensor:
    """Metadata `[rows, n]` in reading order -> in CUTLASS's order.

    Rows go by groups of 32 (16-bit words) or 16 (32-bit words), in which row `8 b + c` moves to place `c` of part `b`;
    the 2 x 2 blocks that then arise are transposed, and pairs of columns are stored column-major.
    """
    rows, count = words.shape
    if words.dtype == torch.int16:
        parts = words.view(rows // 32, 2, 2, 8, count // 2, 2)  # group, b / 2, b % 2, c, column / 2, column % 2
        return parts.permute(4, 0, 3, 1, 5, 2).reshape(rows, count)
    parts = words.view(rows // 16, 2, 8, count // 2, 2)  # group, b, c, column / 2, column % 2
    return parts.permute(3, 0, 2, 4, 1).reshape(rows, count)


def _restore(metadata: Tensor) -> Tensor:
    rows, count = metadata.shape
    if metadata.dtype == torch.int16:
        parts = metadata.reshape(count // 2, rows // 32, 8, 2, 2, 2)
        return parts.permute(1, 3, 5, 2, 0, 4).reshape(rows, count)
    parts = metadata.reshape(count // 2, rows // 16, 8, 2, 2)
    return parts.permute(1, 4, 2, 0, 3).reshape(rows, count)


def _check_shape(rows: int, columns: int, dtype: torch.dtype) -> None:
    multiple = {1: 128, 2: 64}.get(dtype.itemsize)
    if multiple is None or dtype == torch.float32 or rows % ROW_MULTIPLE or columns % multiple:
        raise InvalidInput(
            f"NVIDIA's 2:4 takes fp16, bf16 (columns a multiple of 64) or int8 (128), rows a multiple of 32; "
            f"not {rows} x {columns} in {dtype_name(dtype)}"
        )


def _word(dtype: torch.dtype) -> type[np.signedinteger[Any]]:
    return np.int32 if dtype == torch.int8 else np.int16


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Mask byte -> index byte (two groups of four each), and back; 0 where a byte is not legal."""
    indices, masks = np.zeros(256, np.uint8), np.zeros(256, np.uint8)
    pairs = {1 << low | 1 << high: low | high << 2 for low in range(4) for high in range(low + 1, 4)}
    for low_mask, low in pairs.items():
        for high_mask, high in pairs.items():
            indices[low_mask | high_mask << 4] = low | high << 4
            masks[low | high << 4] = low_mask | high_mask << 4
    return indices, masks


_INDICES, _MASKS = _tables()
