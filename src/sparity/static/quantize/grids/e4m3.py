"""E4M3: eight-bit floating point, 4 bits of exponent and 3 of mantissa (Micikevicius et al. 2022, arXiv:2209.05433)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.registry import register
from sparity.static.quantize.grids.base import Fitted, Grid, ScaleType, usable_scales

LARGEST = 448.0


@register("quantize.grid", "e4m3")
@dataclass(frozen=True)
class E4M3(Grid):
    """The float8_e4m3fn nearest to weight / scale; the scale maps the largest weight of a group to 448.

    Codes are the eight bits as a whole number; -0 is never one of them. `scale_type` is as for integers.
    """

    scale_type: ScaleType = "float32"

    @property
    def bits(self) -> int:
        """Eight."""
        return 8

    @property
    def words(self) -> str:
        """See `Grid.words`."""
        return "fp8 (e4m3)"

    def fit(self, groups: Tensor) -> Fitted:
        """See `Grid.fit`."""
        largest = groups.abs().amax(1)
        scales = usable_scales(largest / LARGEST, largest == 0, self.scale_type)
        return Fitted(scales, torch.zeros_like(scales))

    def codes(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """See `Grid.codes`; ties go to the even mantissa."""
        scaled = (weight / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return torch.where(scaled.float() == 0, 0, scaled.view(torch.uint8).short())

    def values(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """See `Grid.values`."""
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float() * scales
