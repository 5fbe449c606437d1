"""Thresholds on activations, freely composed: how much a channel matters, around what, and who sets the limit."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.dynamic.activations.quantiles import densest, divided, quantile, threshold_for
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.errors import InvalidInput
from sparity.registry import register

Importance = Literal["plain", "weight_norm", "partner"]
Centre = Literal["zero", "mean", "median", "mode"]
Limit = Literal["static", "rms", "top", "statistical"]
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
        if self.statistics == {"histogram"} and seen.sample is None:
            return SkipRule(torch.tensor(threshold_for(seen.statistics, sparsity)[0]))
        centre = self._centre(seen)
        weighing = self._importance(seen)  # [in] or []
        size = seen.values if centre is None else seen.values - centre
        scores = size.abs() * weighing  # [tokens, in]
        if self.limit == "static":
            return SkipRule(divided(quantile(scores, sparsity), weighing), centre)
        if self.limit == "rms":
            rms = seen.values.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(TINIEST)
            return SkipRule(divided(quantile(scores / rms, sparsity), weighing), centre, "rms")
        unit = divided(torch.tensor(1.0), weighing)
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


class Composed(RuleMethod):
    """A published method that is one choice of the parts of `Thresholds`."""

    @property
    @abstractmethod
    def parts(self) -> Thresholds:
        """The choice."""

    @property
    def statistics(self) -> frozenset[str]:
        """See `Method.statistics`."""
        return self.parts.statistics

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        return self.parts.rule(seen, sparsity)
