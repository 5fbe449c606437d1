"""Two stored values in a byte: the first in its lower half."""

import torch
from torch import Tensor


def narrow(values: Tensor) -> Tensor:
    """int8 `[..., count]` between -8 and 7 -> uint8 `[..., ceil(count / 2)]`; a half byte behind the last is 0."""
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    halves = values.view(torch.uint8)
    return (halves[..., 0::2] & 15) | (halves[..., 1::2] << 4)


def widen(narrowed: Tensor, count: int) -> Tensor:
    """The inverse of `narrow`, for `count` values in the last dimension."""
    halves = torch.stack((narrowed & 15, narrowed >> 4), -1).flatten(-2)[..., :count]
    return ((halves ^ 8).view(torch.int8) - 8).contiguous()
