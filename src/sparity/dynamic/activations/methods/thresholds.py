"""Thresholds on activations, freely composed: how much a channel matters, around what, and who sets the limit."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.errors import InvalidInput
from sparity.registry import register

Importance = Literal["plain", "weight_norm", "partner"]
Centre = Literal["zero", "mean", "median", "mode"]
Limit = Literal["static", "rms", "top", "statistical"]
POINTS = 512  # at which the density of a channel's activations is estimated
TINIEST = torch.finfo(torch.float32).tiny


@register("activations.method", "thresholds")
@dataclass(frozen=True)
class Thresholds(RuleMethod):
    """Channel i counts where |x_i - m_i| c_i passes a limit.

    Attributes:
        importance: c. `plain` 1, `weight_norm` the norm of the weight's column to the power `power`, `partner` the mean
            of what the activation is multiplied with, in magnitude.
        centre: m. `zero`; `mean` or `median` of each channel; `mode`, the densest point of all of a place's numbers.
        limit: `static`, a quantile over all channels and calibration tokens; `rms`, the same as a multiple of the
            token's rms; `top`, for each token the same number of channels; `statistical`, mean plus standard deviations
            of the token's own scores.
    """

    importance: Importance = "plain"
    power: float = 1.0
    centre: Centre = "zero"
    limit: Limit = "static"

    def __post_init__(self) -> None:
        if not math.isfinite(self.power):
            raise InvalidInput(f"{self.name}: power {self.power} must be a finite number")

    @property
    def statistics(self) -> frozenset[str]:
        """See `Method.statistics`; a histogram counts all tokens, where it is enough."""
        plain = (self.importance, self.centre, self.limit) == ("plain", "zero", "static")
        return frozenset({"histogram" if plain else "inputs"})

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        if self.statistics == {"histogram"}:
            return SkipRule(torch.tensor(threshold_for(seen.statistics, sparsity)[0]))
        centre = self._centre(seen)
        weighing = self._importance(seen)  # [in] or []
        size = seen.values if centre is None else seen.values - centre
        scores = size.abs() * weighing  # [tokens, in]
        if self.limit == "static":
            return SkipRule(_divided(quantile(scores, sparsity), weighing), centre)
        if self.limit == "rms":
            rms = seen.values.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(TINIEST)
            return SkipRule(_divided(quantile(scores / rms, sparsity), weighing), centre, "rms")
        unit = _divided(torch.tensor(1.0), weighing)
        if self.limit == "top":
            return SkipRule(unit, centre, "top", kept=self.kept(scores.shape[-1], sparsity))
        spread = scores.std(-1, correction=0, keepdim=True).clamp_min(TINIEST)
        deviations = quantile((scores - scores.mean(-1, keepdim=True)) / spread, sparsity)
        return SkipRule(unit, centre, "statistical", deviations=float(deviations))

    def kept(self, channels: int, sparsity: float) -> int:
        """How many channels of a token count with the limit `top`."""
        return max(channels - int(sparsity * channels + 1e-9), 1)

    def _centre(self, seen: Seen) -> Tensor | None:
        if self.centre == "zero":
            return None
        if self.centre == "mode":
            return torch.full_like(seen.values[0], densest(seen.values))
        return seen.values.mean(0) if self.centre == "mean" else seen.values.median(0).values

    def _importance(self, seen: Seen) -> Tensor:
        if self.importance == "plain":
            return torch.ones((), device=seen.values.device)
        if self.importance == "weight_norm":
            return seen.column_norms**self.power
        if seen.partner is None:
            raise InvalidInput(
                f"{seen.statistics.site}: importance `partner` needs what the activations are multiplied with: use it "
                "at `sites: gate_output`, or give it (`partner`)"
            )
        return seen.partner.float().abs().mean(0)


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
    return flat.kthvalue(max(math.ceil(share * len(flat) - 1e-9), 1)).values


def densest(values: Tensor) -> float:
    """Where a Gaussian kernel estimate of the density of all numbers is largest, bandwidth by Scott's rule."""
    flat = values.flatten().double()
    spread = float(flat.std())
    if not spread > 0:
        return float(flat[0])
    low, high = (float(flat.kthvalue(max(math.ceil(q * len(flat)), 1)).values) for q in (0.005, 0.995))
    counts = torch.histc(flat.clamp(low, high), POINTS, low, high) if high > low else torch.ones(1)
    if len(counts) == 1:
        return low
    width = (high - low) / POINTS
    sigma = spread * len(flat) ** -0.2 / width  # in bins
    places = torch.arange(POINTS, dtype=torch.float64)
    kernel = torch.exp(-((places[:, None] - places) ** 2) / (2 * sigma**2))
    return low + (int((kernel @ counts).argmax()) + 0.5) * width


def _divided(limit: Tensor, weighing: Tensor) -> Tensor:
    """The threshold of each channel; a channel that nothing comes of never counts."""
    return (limit / weighing).nan_to_num(torch.inf, torch.inf)
