"""Largest size of each input channel, as SmoothQuant reads it (Xiao et al. 2023, arXiv:2211.10438)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.calibration.input_statistics.base import Statistic
from sparity.registry import register


@register("statistic", "max_absolute")
@dataclass(frozen=True)
class MaxAbsolute(Statistic):
    """The maximum of |x| over tokens, `[in]`."""

    def add(self, total: Tensor, x: Tensor) -> None:
        """See `Statistic.add`."""
        torch.maximum(total, x.abs().amax(0), out=total)

    def merge(self, total: Tensor, other: Tensor) -> Tensor:
        """The larger of both."""
        return torch.maximum(total, other)

    def is_silent(self, total: Tensor) -> bool:
        """See `Statistic.is_silent`."""
        return not bool(total.any())

    def value(self, total: Tensor, sequences: int, tokens: int) -> Tensor:
        """`[in]`: as it is."""
        return total
