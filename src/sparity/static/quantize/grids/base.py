"""What a grid is: the values that a few bits, a scale and a zero point can express."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparity.errors import NumericalError

ScaleType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Fitted:
    """A grid fitted to some groups of weights.

    Attributes:
        scales: the size of a step, `[groups]`, float32, finite and above zero.
        zeros: the code that stands for 0, `[groups]`, float32 whole numbers; 0 where the grid has no zero point.
    """

    scales: Tensor
    zeros: Tensor


class Grid(ABC):
    """A set of values that is scaled to each group of weights; a frozen dataclass whose fields are its options.

    The laws: 0 is one of its values and comes back as +0; a weight inside the range that was fitted comes back within
    `largest_step` of it; `values(codes(w))` is a fixed point.
    """

    name: ClassVar[str]
    scale_type: ScaleType

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def words(self) -> str:
        """The grid in a few words, such as "4 bits, symmetric"."""

    @property
    def zero_bits(self) -> int:
        """Bits of a group's zero point; 0 where it has none."""
        return 0

    @property
    def stored_scale(self) -> torch.dtype:
        """The type of a group's scale."""
        stored: torch.dtype = getattr(torch, self.scale_type)
        return stored

    @abstractmethod
    def fit(self, groups: Tensor) -> Fitted:
        """The grid that spans `groups` [groups, width], float32.

        Raises:
            NumericalError: a scale that is not finite.
        """

    @abstractmethod
    def codes(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest code of each weight, int16; `scales` and `zeros` broadcast against `weight`."""

    @abstractmethod
    def values(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """What codes stand for, float32; the inverse of `codes` on the grid."""

    def nearest(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest value of the grid to each weight, float32."""
        return self.values(self.codes(weight, scales, zeros), scales, zeros)


def usable_scales(scales: Tensor, empty: Tensor, dtype: ScaleType = "float32") -> Tensor:
    """Scales `[groups]` as they will be stored, in float32: 1 for a group of zeros, and never so small that it is 0.

    Raises:
        NumericalError: one that is NaN or too large for its type.
    """
    kept: torch.dtype = getattr(torch, dtype)
    limits = torch.finfo(kept)
    stored = scales.clamp(min=limits.tiny).to(kept).float()
    stored = torch.where(empty, 1.0, stored)
    if not bool(stored.isfinite().all()):
        raise NumericalError(
            f"a scale of {float(scales.abs().max()):.3g} does not fit into {dtype}: the weights are damaged or too "
            "large; repair them, or keep the scales in float32"
        )
    return stored
