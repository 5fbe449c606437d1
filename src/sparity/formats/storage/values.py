"""The bits of stored values, and the names of their types."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
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
