"""Rotary positions, as far as policies turn queries and keys themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """How positions turn queries and keys: the first `2 pairs` numbers, halves against halves.

    Attributes:
        frequencies: float32 `[pairs]`, radians per position.
        scale: by which the turned numbers are multiplied too (YaRN).
    """

    frequencies: Tensor
    scale: float = 1.0

    @classmethod
    def of_base(cls, base: float, width: int) -> "Rotary":
        """The usual frequencies, `base^(-2 i / width)`."""
        return cls(base ** -(torch.arange(0, width - width % 2, 2).float() / width))

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 `[..., pairs]` for positions `[...]`."""
        angles = positions.float()[..., None] * self.frequencies.to(positions.device)
        return angles.cos(), angles.sin()

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [..., width] turned by `positions` [...], without the scale."""
        return turned(x, *self.tables(positions))


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`x` [..., width] with each pair turned; the tables are `[..., pairs]`, numbers beyond the pairs stay."""
    pairs = cosine.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], -1)
