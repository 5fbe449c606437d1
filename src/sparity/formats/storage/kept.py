"""The kept values of a matrix as a list, and back.

By way of numpy's flat indices, which are several times faster than boolean indexing, and piece by piece, so that the
indices never take more than a few MB.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 21  # weights at a time


def gather(values: Tensor, keep: Tensor) -> Tensor:
    """The entries of `values` where `keep`, of the same shape, is True; in order, 1-D."""
    flat, mask = values.numpy().reshape(-1), keep.numpy().reshape(-1)
    pieces = [flat[piece][np.flatnonzero(mask[piece])] for piece in _pieces(mask.size)]
    return torch.from_numpy(np.concatenate(pieces))


def scatter(values: Tensor, keep: Tensor) -> Tensor:
    """Zeros in the shape of `keep`, with `values` (1-D, as many as `keep` has True) at the kept places."""
    out = torch.zeros(keep.shape, dtype=values.dtype)
    flat, mask, source = out.numpy().reshape(-1), keep.numpy().reshape(-1), values.numpy()
    done = 0
    for piece in _pieces(mask.size):
        places = np.flatnonzero(mask[piece])
        flat[piece][places] = source[done : done + len(places)]
        done += len(places)
    return out


def columns_of(keep: Tensor) -> Tensor:
    """int32 `[kept]`: the column of each True in `keep` [rows, columns], row after row."""
    rows, columns = keep.shape
    step = max(1, PIECE // columns)
    pieces = [
        (np.flatnonzero(keep[row : row + step].numpy()) % columns).astype(np.int32) for row in range(0, rows, step)
    ]
    return torch.from_numpy(np.concatenate(pieces))


def place(values: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros of `shape` with `values` [kept] at `rows` [kept] and `columns` [kept]; each place at most once."""
    out = torch.zeros(shape, dtype=values.dtype)
    flat = rows.numpy().astype(np.int64) * shape[1] + columns.numpy()
    out.numpy().reshape(-1)[flat] = values.numpy()
    return out


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, start + PIECE) for start in range(0, size, PIECE))
