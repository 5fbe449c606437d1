"""Mean of the inputs."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration.input_statistics.base import Statistic
from sparity.registry import register


@register("statistic", "mean")
@dataclass(frozen=True)
class Mean(Statistic):
    """The mean of each input channel over tokens, `[in]`."""

    stored_as: ClassVar[str] = "sum"

    def add(self, total: Tensor, x: Tensor) -> None:
        """See `Statistic.add`."""
        total.add_(x.sum(0))

    def value(self, total: Tensor, sequences: int, tokens: int) -> Tensor:
        """`[in]`: sum / tokens."""
        return total / tokens
