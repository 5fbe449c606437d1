"""Mean size of each input channel, as AWQ reads it (Lin et al. 2024, arXiv:2306.00978)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration.input_statistics.base import Statistic
from sparity.registry import register


@register("statistic", "mean_absolute")
@dataclass(frozen=True)
class MeanAbsolute(Statistic):
    """The mean of |x| over tokens, `[in]`."""

    stored_as: ClassVar[str] = "sum_of_absolutes"

    def add(self, total: Tensor, x: Tensor) -> None:
        """See `Statistic.add`."""
        total.add_(x.abs().sum(0))

    def is_silent(self, total: Tensor) -> bool:
        """See `Statistic.is_silent`."""
        return not bool(total.any())

    def value(self, total: Tensor, sequences: int, tokens: int) -> Tensor:
        """`[in]`: sum of |x| / tokens."""
        return total / tokens
