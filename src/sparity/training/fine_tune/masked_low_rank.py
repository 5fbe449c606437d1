"""A low rank that is trained in place of a weight, as far as the weight is not zero."""

from typing import Any

import torch
from torch import Tensor, nn


class MaskedLowRank(nn.Module):
    """Adds scale B A to a weight `[..., out, in]` where that is not zero; B is zero at first."""

    def __init__(self, weight: Tensor, rank: int, scale: float, drawn: torch.Generator) -> None:
        super().__init__()
        *experts, rows, columns = weight.shape
        first: Any = torch.randn(*experts, rank, columns, generator=drawn) / columns**0.5
        self.first = nn.Parameter(first.to(weight.device))
        self.second = nn.Parameter(torch.zeros(*experts, rows, rank, device=weight.device))
        self.mask, self.scale = weight != 0, scale

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with what was trained."""
        return weight + self.scale * (self.second @ self.first) * self.mask
