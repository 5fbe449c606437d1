"""NF4: 16 values, equally likely for normally distributed weights (Dettmers et al. 2023, arXiv:2305.14314)."""

from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from sparity.registry import register
from sparity.static.quantize.grids.base import Fitted, Grid, ScaleType
from sparity.static.quantize.grids.codebook import Codebook

OUTERMOST = 0.9677083  # the probability at which the outermost values lie, 1 - (1/30 + 1/32) / 2, as published


def normal_entries() -> tuple[float, ...]:
    """Quantiles of a normal distribution: 8 below and with 0, 8 above, the outermost scaled to -1 and 1."""

    def side(count: int) -> list[float]:
        places = [OUTERMOST + (0.5 - OUTERMOST) * step / count for step in range(count)]
        return [NormalDist().inv_cdf(place) for place in places]

    below, above = side(7), side(8)
    reach = above[0]
    return (*(-value / reach for value in below), 0.0, *(value / reach for value in reversed(above)))


@register("quantize.grid", "nf4")
@dataclass(frozen=True)
class NF4(Grid):
    """The 16 values of QLoRA's NormalFloat, scaled to the largest weight of a group.

    `scale_type` is as for integers.
    """

    scale_type: ScaleType = "float32"

    @property
    def bits(self) -> int:
        """Four."""
        return 4

    @property
    def words(self) -> str:
        """See `Grid.words`."""
        return "NF4"

    @property
    def _book(self) -> Codebook:
        return Codebook(normal_entries(), self.scale_type)

    def fit(self, groups: Tensor) -> Fitted:
        """See `Grid.fit`."""
        return self._book.fit(groups)

    def codes(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """See `Grid.codes`."""
        return self._book.codes(weight, scales, zeros)

    def values(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """See `Grid.values`."""
        return self._book.values(codes, scales, zeros)
