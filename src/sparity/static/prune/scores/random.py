"""Random: the control that every other score must beat."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.registry import register
from sparity.static.prune.scores.base import Score


@register("prune.score", "random")
@dataclass(frozen=True)
class Random(Score):
    """Uniform random scores, the same for the same weight and `seed`, different between layers."""

    seed: int = 0

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        first_row = weight[:1].float().cpu().numpy().tobytes()
        seed = zlib.crc32(str(self.seed).encode(), zlib.crc32(first_row))
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
