"""The scale of a group of symmetric integers: of two the one that loses less, of which one may be negative."""

import torch
from torch import Tensor

AT_ONCE = 2**16  # weights: what is computed in float32 stays in the cache


def losing_less(groups: Tensor, spanning: Tensor, width: int) -> Tensor:
    """Per group the scale with the less squared error of rounding to nearest, of two; of equals the first.

    Codes run from `-2^(width - 1)` to one less than the opposite, so that the side of the lowest code reaches further.
    The first is `spanning`; the second puts the largest weight `w` on the lowest code, `-w / 2^(width - 1)`, and is
    negative where `w` is above 0 (as Q4_0 of ggml does).

    Args:
        groups: `[groups, members]`, any floating type, finite.
        spanning: `[groups]`, positive, in the type that scales are stored in.
        width: bits of a code.
    """
    lowest = -(2 ** (width - 1))
    low, high = groups.amin(1).float(), groups.amax(1).float()
    largest = torch.maximum(-low, high)
    size = (largest / -lowest).clamp(min=torch.finfo(spanning.dtype).tiny)
    other = (torch.where(high >= -low, -1.0, 1.0) * size).to(spanning.dtype)
    less = _lost(groups, largest, other, lowest) < _lost(groups, largest, spanning, lowest)
    return torch.where((largest > 0) & other.isfinite() & less, other, spanning)


def _lost(groups: Tensor, largest: Tensor, scales: Tensor, lowest: int) -> Tensor:
    """The squared error of rounding, in squares of each group's largest weight, `[groups]`."""
    lost = torch.empty(len(groups), device=groups.device)
    count = max(AT_ONCE // groups.shape[1], 1)
    for first in range(0, len(groups), count):
        some = slice(first, first + count)
        unit = largest[some, None].clamp(min=torch.finfo(torch.float32).tiny)
        share, step = groups[some].float() / unit, scales[some, None].float() / unit
        codes = (share / step).round_().clamp_(lowest, -lowest - 1)
        lost[some] = codes.mul_(step).sub_(share).square_().sum(1)
    return lost
