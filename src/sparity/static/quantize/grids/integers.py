"""Integers: equal steps from a group's smallest to its largest weight (Jacob et al. 2018, arXiv:1712.05877)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.formats.storage.signed_scales import losing_less
from sparity.registry import register
from sparity.static.quantize.grids.base import Fitted, Grid, ScaleType, usable_scales


@register("quantize.grid", "integers")
@dataclass(frozen=True)
class Integers(Grid):
    """(code - zero) * scale, with 2^width codes at equal distances.

    Symmetric codes run from -2^(width-1) to 2^(width-1) - 1 around 0. The step is 2 max|w| / (2^width - 1), as in the
    code of GPTQ; with `even`, max|w| / (2^(width-1) - 1), as in that of AWQ and of the encoding int8, which leaves the
    lowest code unused; with `signed`, -w / 2^(width-1) of a group's largest weight w where that loses less, as in the
    encoding int4, which may be negative. Asymmetric codes run from 0; the range is stretched to hold 0, and the zero
    point is a whole number, so that a weight of 0 comes back as 0.

    `scale_type` is the type in which scales will be stored: they are rounded to it before the codes are chosen.
    """

    width: int = 4
    symmetric: bool = True
    even: bool = False
    signed: bool = False
    scale_type: ScaleType = "float32"

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise InvalidInput(f"bits {self.width}: integers of 2 to 8 bits can be chosen")
        if self.even and not self.symmetric:
            raise InvalidInput("even: only symmetric integers have as many codes above 0 as below")
        if self.signed and (self.even or not self.symmetric):
            raise InvalidInput("signed: only symmetric integers that are not even have a lowest code on one side alone")

    @property
    def bits(self) -> int:
        """See `Grid.bits`."""
        return self.width

    @property
    def zero_bits(self) -> int:
        """A zero point is one of the codes."""
        return 0 if self.symmetric else self.width

    @property
    def words(self) -> str:
        """See `Grid.words`."""
        return f"{self.width} bits, {'symmetric' if self.symmetric else 'with zero point'}"

    def fit(self, groups: Tensor) -> Fitted:
        """See `Grid.fit`."""
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        empty = (low == 0) & (high == 0)
        steps = 2**self.width - 1
        if self.symmetric:
            largest = torch.maximum(-low, high)
            scales = largest / (2 ** (self.width - 1) - 1) if self.even else 2 * largest / steps
            usable = usable_scales(scales, empty, self.scale_type)
            if self.signed:
                usable = losing_less(groups, usable.to(self.stored_scale), self.width).float()
            return Fitted(usable, torch.zeros_like(scales))
        scales = usable_scales((high - low) / steps, empty, self.scale_type)
        return Fitted(scales, (-low / scales).round().clamp(0, steps))

    def codes(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """See `Grid.codes`; ties go to the even step."""
        lowest = -(2 ** (self.width - 1)) if self.symmetric else 0
        return ((weight / scales).round() + zeros).clamp(lowest, lowest + 2**self.width - 1).short()

    def values(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """See `Grid.values`."""
        return (codes.float() - zeros) * scales + 0.0  # no -0, which a negative scale would make
