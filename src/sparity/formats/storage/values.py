"""The values of a weight: floating point as they are, or int8 with one scale per output channel."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from sparity.errors import InvalidInput

Values = Literal["same", "int8"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST = 127  # symmetric: -128 is not used
ROWS_AT_ONCE = 32  # what is computed in float32 stays in the cache
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`, the name that files use."""
    return str(dtype).removeprefix("torch.")


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied when its numbers straddle machine words, as those of a file with an odd header do."""
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def bits(values: Tensor) -> Tensor:
    """The same memory as integers of the same width: only +0 is 0 there, so -0.0 and NaN count as kept."""
    return values.view(_INTEGERS[values.element_size()])


def nonzero(values: Tensor) -> Tensor:
    """bool like `values`: True where the bits differ from +0."""
    return bits(values) != 0


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [rows, columns] -> int8 `[rows, columns]` and float32 scales `[rows]`.

    The scale is the row's largest magnitude / 127 (1 for a row of zeros, and at least the smallest normal float32); a
    value is `round(weight / scale)`, ties to even.

    Raises:
        InvalidInput: the weight holds NaN or infinity, which int8 cannot express.
    """
    largest = weight.abs().amax(1).float()
    if not bool(largest.isfinite().all()):
        raise InvalidInput("int8 values cannot hold NaN or infinity; repair the weight or keep floating-point values")
    scales = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    scales[largest == 0] = 1.0
    values = torch.empty(weight.shape, dtype=torch.int8)
    for rows in _pieces(len(weight)):
        values[rows] = (weight[rows].float() / scales[rows, None]).round_().clamp_(-LARGEST, LARGEST)
    return values, scales


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 `[rows, columns]` and scales `[rows]` -> `values * scales`, multiplied in float32, in `dtype`."""
    weight = torch.empty(values.shape, dtype=dtype)
    for rows in _pieces(len(values)):
        weight[rows] = values[rows].float().mul_(scales[rows, None])
    return weight


def _pieces(rows: int) -> Iterator[slice]:
    return (slice(row, row + ROWS_AT_ONCE) for row in range(0, rows, ROWS_AT_ONCE))
