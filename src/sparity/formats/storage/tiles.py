"""The order in which kernels read: tiles of 4 rows, and in a tile groups of 64 columns, row after row.

The masks of a tile follow one another, and so do its values: two sequential streams per thread.
"""

import numpy as np
import torch
from torch import Tensor

ROWS = 4
COLUMNS = 64
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def grid(rows: int, columns: int) -> tuple[int, int]:
    """Tiles and groups that cover a matrix."""
    return -(-rows // ROWS), -(-columns // COLUMNS)


def to_tiles(matrix: Tensor) -> Tensor:
    """`[rows, columns]` -> `[tiles, groups, 4, 64]`, contiguous, padded with zeros."""
    tiles, groups = grid(*matrix.shape)
    padded = matrix
    if matrix.shape != (tiles * ROWS, groups * COLUMNS):
        padded = matrix.new_zeros(tiles * ROWS, groups * COLUMNS)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.reshape(tiles, ROWS, groups, COLUMNS).transpose(1, 2).contiguous()


def from_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `to_tiles`."""
    count, groups = tiles.shape[:2]
    padded = tiles.transpose(1, 2).reshape(count * ROWS, groups * COLUMNS)
    return padded[:rows, :columns].contiguous()


def to_masks(keep: Tensor) -> Tensor:
    """bool `[tiles, groups, 4, 64]` -> uint8 `[tiles, groups, 4, 8]`; bit `j` of byte `b` is column `8 b + j`."""
    packed = np.packbits(keep.numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(packed).view(*keep.shape[:3], COLUMNS // 8)


def from_masks(masks: Tensor) -> Tensor:
    """The inverse of `to_masks`."""
    flat = np.unpackbits(masks.numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(flat).view(torch.bool).view(*masks.shape[:3], COLUMNS)


def kept_per_tile(masks: Tensor) -> Tensor:
    """int64 `[tiles]`: how many bits of each tile's masks are set."""
    if hasattr(np, "bitwise_count"):
        counts = np.bitwise_count(masks.numpy().reshape(len(masks), -1).view(np.uint64))
    else:  # numpy 1
        counts = _ONES[masks.numpy().reshape(len(masks), -1)]
    return torch.from_numpy(counts.sum(1, dtype=np.int64))


def outside(masks: Tensor, rows: int, columns: int) -> bool:
    """Whether masks mark a weight beyond the matrix's last row or column."""
    last_rows, last_columns = rows - (len(masks) - 1) * ROWS, columns - (masks.shape[1] - 1) * COLUMNS
    below = bool(masks[-1, :, last_rows:].any())
    return below or bool(from_masks(masks[:, -1:])[..., last_columns:].any())
