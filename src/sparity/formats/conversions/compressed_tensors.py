"""The sparse layouts of compressed-tensors up to 0.14, which later releases no longer read.

A bit per weight, row after row, each row in whole bytes: bit `j` of byte `b` is column `8 b + j`. The values follow in
the order of the bits. `docs/format.md`, "Rescue", describes both layouts.
"""

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from sparity.errors import CorruptFile
from sparity.formats.base import LARGEST_SIDE
from sparity.formats.storage.kept import scatter
from sparity.formats.storage.values import FLOATS, bits, dtype_name

BITMASK = "sparse-bitmask"
TWO_OF_FOUR = "sparse-24-bitmask"
PARTS = {BITMASK: ("shape", "compressed", "bitmask", "row_offsets"), TWO_OF_FOUR: ("shape", "compressed", "bitmask")}
Header = tuple[tuple[int, ...], torch.dtype]  # a tensor's shape and type


def check_headers(layout: str, shape: Sequence[int], headers: Mapping[str, Header]) -> None:
    """Raise `CorruptFile` unless shape and type of each part go with a weight of `shape`; no content is needed."""
    if not 1 <= len(shape) <= 2 or not all(0 < side <= LARGEST_SIDE for side in shape):
        raise CorruptFile(f"a weight of shape {list(shape)} cannot be")
    if layout == TWO_OF_FOUR and (len(shape) != 2 or prod(shape) % 4):
        raise CorruptFile(f"{layout} holds matrices in whole fours, not {list(shape)}")
    *rows, columns = shape
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "bitmask": (torch.uint8, (*rows, -(-columns // 8))),
        "row_offsets": (torch.int64, tuple(rows)),
    }
    for part, wanted in expected.items():
        if part not in PARTS[layout]:
            continue
        sides, dtype = headers[part]
        if (dtype, sides) != wanted:
            raise CorruptFile(f"{part}: expected {_words(*wanted)} for {list(shape)}, found {_words(dtype, sides)}")
    sides, dtype = headers["compressed"]
    fits = len(sides) == 1 and sides[0] <= prod(shape)
    if layout == TWO_OF_FOUR:
        fits = sides == (shape[0], columns // 2) and columns % 2 == 0
    if dtype not in FLOATS or not fits:
        raise CorruptFile(f"compressed: {_words(dtype, sides)} cannot be the values of {list(shape)}")


def restore(layout: str, shape: Sequence[int], parts: Mapping[str, Tensor]) -> Tensor:
    """The dense weight of `shape` from its parts.

    Raises:
        CorruptFile: the parts contradict each other or the shape.
    """
    check_headers(layout, shape, {name: (tuple(part.shape), part.dtype) for name, part in parts.items()})
    columns = shape[-1]
    padded = torch.from_numpy(np.unpackbits(parts["bitmask"].numpy(), axis=-1, bitorder="little")).view(torch.bool)
    if bool(padded[..., columns:].any()):
        raise CorruptFile(f"bitmask: it keeps a weight behind the last of {columns} columns")
    keep, values = padded[..., :columns].contiguous(), parts["compressed"].reshape(-1)
    counts = keep.sum(-1)
    if int(counts.sum()) != len(values):
        raise CorruptFile(f"bitmask: it keeps {int(counts.sum())} weights, but {len(values)} values are stored")
    if layout == BITMASK and not torch.equal(parts["row_offsets"], counts.cumsum(0) - counts):
        raise CorruptFile("row_offsets: they disagree with the number of bits in the bitmask")
    if layout == TWO_OF_FOUR and bool((keep.view(-1, 4).sum(1) != 2).any()):
        raise CorruptFile("bitmask: it does not keep exactly two of every four weights")
    return scatter(bits(values), keep).view(values.dtype)


def _words(dtype: torch.dtype, sides: Sequence[int]) -> str:
    return f"{dtype_name(dtype)} {list(sides)}"
