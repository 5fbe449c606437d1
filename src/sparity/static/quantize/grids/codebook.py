"""Codebook: any sorted list of values, scaled to the largest weight of a group."""

from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.quantize.grids.base import Fitted, Grid, ScaleType, usable_scales

MOST = 256


@register("quantize.grid", "codebook")
@dataclass(frozen=True)
class Codebook(Grid):
    """entries[code] * scale, where the scale maps the largest weight of a group to the largest entry.

    `entries` rise from the first to the last and hold 0; there are 2 to 256 of them. Of two entries at the same
    distance the lower is taken. `scale_type` is as for integers.
    """

    entries: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5)
    scale_type: ScaleType = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", check_entries(self.entries))

    @property
    def bits(self) -> int:
        """See `Grid.bits`."""
        return (len(self.entries) - 1).bit_length()

    @property
    def words(self) -> str:
        """See `Grid.words`."""
        return f"a codebook of {len(self.entries)} entries"

    def fit(self, groups: Tensor) -> Fitted:
        """See `Grid.fit`."""
        largest = groups.abs().amax(1)
        reach = max(abs(entry) for entry in self.entries)
        scales = usable_scales(largest / reach, largest == 0, self.scale_type)
        return Fitted(scales, torch.zeros_like(scales))

    def codes(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """See `Grid.codes`."""
        between = [(low + high) / 2 for low, high in pairwise(self.entries)]
        return torch.bucketize((weight / scales).contiguous(), torch.tensor(between, device=weight.device)).short()

    def values(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """See `Grid.values`."""
        return torch.tensor(self.entries, device=codes.device)[codes.int()] * scales


def check_entries(entries: object) -> tuple[float, ...]:
    """The entries of a codebook as numbers.

    Raises:
        InvalidInput: no list of numbers, fewer than two or more than 256, not rising, or without 0.
    """
    listed = list(entries) if isinstance(entries, list | tuple) else []
    if not all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in listed):
        listed = []
    if not 2 <= len(listed) <= MOST or not all(isfinite(entry) for entry in listed):
        raise InvalidInput(f"a codebook has 2 to {MOST} entries, all of them finite numbers; got {entries!r}")
    if not all(low < high for low, high in pairwise(listed)) or 0 not in listed:
        raise InvalidInput("the entries of a codebook rise from the first to the last, and 0 is one of them")
    return tuple(float(entry) for entry in listed)
