"""Plan, strategy 2: magnitude times the norm of the column of the last projection that it meets."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.dynamic.activations.methods.plan_quantile import at_or_above
from sparity.dynamic.activations.methods.thresholds import Thresholds
from sparity.dynamic.activations.places import Where
from sparity.dynamic.activations.quantiles import divided
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.registry import register


@register("activations.method", "plan_importance")
@dataclass(frozen=True)
class PlanImportance(RuleMethod):
    """Channel i of a token counts where |h_i| ||W[:, i]|| is at or above a quantile of these products.

    Attributes:
        quantile: `token`, of the token's own products, linearly interpolated; `static`, of those of all channels and
            calibration tokens: one threshold per channel, nothing to sort while the model runs.
    """

    quantile: Literal["token", "static"] = "token"
    where: ClassVar[Where] = "hidden"

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        if self.quantile == "static":
            return Thresholds(importance="weight_norm").rule(seen, sparsity)
        norms = seen.column_norms
        unit = divided(torch.ones_like(norms), norms)
        return SkipRule(unit, scale="top", kept=at_or_above(len(norms), sparsity))
