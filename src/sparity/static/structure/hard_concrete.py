"""Hard concrete masks: numbers in [0, 1] that are often exactly 0 or 1, and yet have gradients.

Louizos et al. 2018, arXiv:1712.01312, as used by Xia et al. 2024, arXiv:2310.06694.
"""

import math

import torch
from torch import Tensor

from sparity.static.structure.units import largest

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1  # a concrete number in (0, 1) is stretched to this range, then clipped to [0, 1]
LIMIT = math.log(100)  # log alpha stays within its positive and negative
SETTLED = 0.8  # how far a mask that is not drawn lies between its median and 1, in units of log alpha / temperature
NEAREST = 1e-6  # of a uniform number, and of a probability, to 0 and 1


def draw(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """The masks `[...]` at these quantiles: clip(sigmoid((log u - log(1 - u) + log alpha) / b) * 1.2 - 0.1, 0, 1)."""
    u = uniform.clamp(NEAREST, 1 - NEAREST)
    concrete = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def probability(log_alpha: Tensor) -> Tensor:
    """How probable it is that each mask is not 0: sigmoid(log alpha - b log(0.1 / 1.1)), the expected L0 norm."""
    closed = torch.sigmoid(TEMPERATURE * math.log(-LOW / HIGH) - log_alpha)
    return 1 - closed.clamp(NEAREST, 1 - NEAREST)


def typical(log_alpha: Tensor) -> Tensor:
    """Masks that are not drawn, and of which none is 0, `[...]`: sigmoid(0.8 log alpha / b)."""
    return torch.sigmoid(log_alpha / TEMPERATURE * SETTLED)


def settled(log_alpha: Tensor, count: int) -> Tensor:
    """The masks without chance `[rows, size]`: each row's `count` largest at sigmoid(0.8 log alpha / b), others 0."""
    kept = torch.zeros_like(log_alpha)
    for row, values in zip(kept, log_alpha, strict=True):
        row[largest(values, count).to(row.device)] = 1
    return typical(log_alpha) * kept
