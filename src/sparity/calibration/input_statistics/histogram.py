"""Histogram of the inputs' magnitudes, from which thresholds at any sparsity follow."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.calibration.input_statistics.base import Statistic
from sparity.registry import register

MAGNITUDES = 1 << 15  # bins of |x|: the upper half of the bits of a float32, without its sign
INFINITE = 0x7F80  # the first of them that holds no finite numbers


@register("statistic", "histogram")
@dataclass(frozen=True)
class Histogram(Statistic):
    """How many |x| of all channels share the upper 16 bits of a float32, `[32768]`, int64; a bin is under 1 % wide."""

    def empty(self, columns: int, device: torch.device | str) -> Tensor:
        """See `Statistic.empty`."""
        return torch.zeros(MAGNITUDES, dtype=torch.int64, device=device)

    def add(self, total: Tensor, x: Tensor) -> None:
        """See `Statistic.add`."""
        bins = x.abs().contiguous().view(torch.int32) >> 16
        total += torch.bincount(bins.flatten(), minlength=MAGNITUDES)

    def is_finite(self, total: Tensor) -> bool:
        """See `Statistic.is_finite`."""
        return not bool(total[INFINITE:].any())

    def is_silent(self, total: Tensor) -> bool:
        """See `Statistic.is_silent`."""
        return not bool(total[1:].any())

    def value(self, total: Tensor, sequences: int, tokens: int) -> Tensor:
        """`[32768]`: the counts as they are."""
        return total


def magnitude_at(counts: Tensor, share: float) -> float:
    """The |x| below which the given share of the counted inputs lies, in [0, 1], within 1 %; `counts` is `[32768]`."""
    up_to = counts.cumsum(0)
    rank = max(math.ceil(share * int(up_to[-1])), 1)
    bin_ = int(torch.searchsorted(up_to, rank))
    return float(torch.tensor(min(bin_, INFINITE - 1) << 16, dtype=torch.int32).view(torch.float32))
