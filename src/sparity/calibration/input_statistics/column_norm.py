"""Norm of each input channel, as Wanda reads it (Sun et al. 2024, arXiv:2306.11695)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration.input_statistics.base import Statistic
from sparity.registry import register


@register("statistic", "column_norm")
@dataclass(frozen=True)
class ColumnNorm(Statistic):
    """The norm of each input channel, sqrt(sum of squares / sequences), `[in]`.

    Divided by the number of sequences, not of tokens, as in the code of Wanda.
    """

    stored_as: ClassVar[str] = "sum_of_squares"

    def add(self, total: Tensor, x: Tensor) -> None:
        """See `Statistic.add`."""
        total.add_(x.square().sum(0))

    def is_silent(self, total: Tensor) -> bool:
        """See `Statistic.is_silent`."""
        return not bool(total.any())

    def value(self, total: Tensor, sequences: int, tokens: int) -> Tensor:
        """`[in]`: sqrt(sum of squares / sequences)."""
        return (total / sequences).sqrt()
