"""Statistical top-k: mean plus standard deviations of a token's own activations (You et al. 2025, arXiv:2506.06644)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.dynamic.activations.methods.thresholds import Thresholds
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.errors import InvalidInput
from sparity.registry import register


@register("activations.method", "statistical_topk")
@dataclass(frozen=True)
class StatisticalTopk(RuleMethod):
    """Channel i of a token counts where its number passes mean + z deviations of the token's own numbers.

    As published, x_i > mean(x) + z std(x), signed, z the normal distribution's quantile: the rule of Gemma 3n, for a
    gate's outputs before its activation function. At the places of a model both signs count: |x_i| > mean|x| + z std|x|
    with the z by which calibration tokens skip the sparsity asked for.

    Attributes:
        reference: which of the two. None: as published in masks and fits of activations by themselves, magnitudes at a
            place of a model, where True is refused: a model of such layers has the rule itself.
    """

    reference: bool | None = None

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        return Thresholds(limit="statistical").rule(seen, sparsity)

    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """See `Method.fit`; of the published rule `signed_deviations`, float64 `[]`.

        Raises:
            InvalidInput: `reference` at a place of a model.
        """
        if self.reference is False or (self.reference is None and seen.roles):
            return super().fit(seen, sparsity)
        if seen.roles:
            raise InvalidInput(
                f"{seen.statistics.site}: statistical_topk with `reference` looks at a gate before its activation "
                "function, where a model has no place to skip: leave `reference` out, or use sparity.activation_mask"
            )
        z = torch.erfinv(2 * torch.tensor(sparsity) - 1) * math.sqrt(2)  # float32, as torch.distributions computes it
        return {"signed_deviations": z.double()}

    def mask(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Method.mask`; the published rule is computed in the type of x."""
        if "signed_deviations" not in tensors:
            return super().mask(tensors, x)
        z = tensors["signed_deviations"].to(x)
        limit = x.mean(-1, keepdim=True) + x.std(-1, correction=0, keepdim=True) * z
        return ~(x <= limit)
