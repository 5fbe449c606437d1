"""SCAP: magnitude around the mode of a layer's inputs (Chua et al. 2024, arXiv:2412.07174)."""

from dataclasses import dataclass
from typing import Literal

import torch

from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.dynamic.activations.quantiles import densest, interpolated_quantile
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.registry import register

POINTS, NARROWING = 2000, 0.5  # of the authors' density estimate


@register("activations.method", "scap")
@dataclass(frozen=True)
class Scap(RuleMethod):
    """Channel i counts where |x_i - m| > t, the quantile of |x - m| over all channels and calibration tokens.

    A channel that does not count is m, whose product with the weight is a constant: a bias.

    Attributes:
        centre: m, one number for all channels of a projection. `mode`, the densest point; `median`; `zero`, no centre.
        guard: in a stage, leave the centres of the whole model out where the dense model is nearer without them, by KL
            on the last fourth of the calibration sequences.
    """

    centre: Literal["mode", "median", "zero"] = "mode"
    guard: bool = False

    @property
    def stand_in(self) -> "Scap | None":
        """See `Method.stand_in`: the same without a centre."""
        return Scap("zero") if self.guard and self.centre != "zero" else None

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        values = seen.values  # [tokens, in]
        if self.centre == "zero":
            return SkipRule(interpolated_quantile(values.abs(), sparsity))
        middle = densest(values, POINTS, NARROWING, tails=0.0) if self.centre == "mode" else float(values.median())
        centre = torch.full_like(values[0], middle)
        return SkipRule(interpolated_quantile((values - centre).abs(), sparsity), centre)
