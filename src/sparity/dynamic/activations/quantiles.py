"""Where a share of numbers lies: exact quantiles, those of a histogram, and the densest point."""

import math

import torch
from torch import Tensor

from sparity.calibration import Statistics

ROUNDING = 1e-9  # of a share of a whole number


def threshold_for(statistics: Statistics, sparsity: float) -> tuple[float, float]:
    """The least threshold, at the upper end of a bin of the histogram, that skips a share of the inputs; what it skips.

    Bins are under 1 % wide. In bfloat16, whose numbers are the bins' lower ends, it is the exact quantile.
    """
    if sparsity == 0:
        return 0.0, 0.0
    least = torch.tensor(statistics.magnitude_at(sparsity)).view(torch.int32)
    number = int(least) >> 16
    greatest = float(torch.tensor(int(least) | 0xFFFF, dtype=torch.int32).view(torch.float32))
    counts = statistics.histogram
    return greatest, int(counts[: number + 1].sum()) / int(counts.sum())


def quantile(scores: Tensor, share: float) -> Tensor:
    """The least of the scores, `[]`, at or below which at least a share of them lies, in (0, 1]."""
    flat = scores.flatten()
    return flat.kthvalue(max(math.ceil(share * len(flat) - ROUNDING), 1)).values


def interpolated_quantile(scores: Tensor, share: float) -> Tensor:
    """The quantile of the scores, `[]`, linear between the two nearest of them; of any number of scores."""
    flat = scores.flatten()
    place = share * (len(flat) - 1)
    low = math.floor(place + ROUNDING)
    below = flat.kthvalue(low + 1).values
    if place - low < ROUNDING:
        return below
    above = flat.kthvalue(low + 2).values
    return torch.lerp(below.double(), above.double(), place - low).to(flat.dtype)


def just_below(limit: Tensor) -> Tensor:
    """The float32 before each limit, not under 0: what passes it is at the limit or above; infinity stays."""
    return torch.where(limit.isinf(), limit, torch.nextafter(limit, torch.zeros_like(limit)))


def divided(limit: Tensor, weighing: Tensor) -> Tensor:
    """The threshold of each channel, where its score is its size times its weighing; one of no weight never counts."""
    return (limit / weighing).nan_to_num(torch.inf, torch.inf)


def densest(values: Tensor, points: int = 512, narrowing: float = 1.0, tails: float = 0.005) -> float:
    """Where a Gaussian kernel estimate of the density of all numbers is largest.

    Args:
        values: of any shape.
        points: at which the density is estimated, at equal distances.
        narrowing: what Scott's bandwidth is multiplied with.
        tails: the share of the numbers at either end that the points do not reach.
    """
    flat = values.flatten().double()
    spread = float(flat.std()) if len(flat) > 1 else 0.0
    if not spread > 0:
        return float(flat[0])
    ends = (max(math.ceil(tails * len(flat)), 1), min(math.ceil((1 - tails) * len(flat)), len(flat)))
    low, high = (float(flat.kthvalue(end).values) for end in ends)
    if not high > low:
        return low
    width = (high - low) / points
    counts = torch.histc(flat, points, low, high)
    sigma = narrowing * spread * len(flat) ** -0.2 / width  # in points
    reach = min(math.ceil(6 * sigma), points)
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64, device=flat.device)
    kernel = torch.exp(-(steps**2) / (2 * sigma**2))
    density = torch.nn.functional.conv1d(counts[None, None], kernel[None, None], padding=reach)
    return low + (int(density.argmax()) + 0.5) * width
