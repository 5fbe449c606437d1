"""RIA: a weight's share of its row and of its column, times input norm (Zhang et al. 2024, "Plug-and-Play")."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.scores.base import Score


@register("prune.score", "ria")
@dataclass(frozen=True)
class RIA(Score):
    """(|w| / sum over its column + |w| / sum over its row) * norm^a. Scores compare within a layer.

    No row and no column can be emptied by being small throughout. `a` weighs the input norm; 0 ignores it.
    """

    a: float = 0.5

    needs: ClassVar[tuple[str, ...]] = ("column_norm",)

    def __post_init__(self) -> None:
        if self.a < 0:
            raise InvalidInput(f"a {self.a}: the exponent of the input norm must not be negative")

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        size = weight.abs().float()
        share_of_column = size / size.sum(0, keepdim=True).clamp(min=TINY)
        share_of_row = size / size.sum(1, keepdim=True).clamp(min=TINY)
        return (share_of_column + share_of_row) * statistics.column_norm**self.a


TINY = 1e-30  # an empty row or column has scores of zero, not NaN
