"""Plan, strategy 1 with a predictor: a static threshold, scaled by what a light model reads off the token."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.activations.method_data import InputChange, in_front, skips_nothing
from sparity.dynamic.activations.methods.base import Method, Seen
from sparity.dynamic.activations.places import Kind, Place, Where
from sparity.dynamic.activations.quantiles import quantile
from sparity.dynamic.activations.token_scale import features, largest_scales, token_scale
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import InvalidInput, NumericalError
from sparity.registry import register

TINIEST = torch.finfo(torch.float32).tiny
LEAST_SPREAD = 1e-6  # of a feature: less says nothing


@register("activations.method", "plan_predictor")
@dataclass(frozen=True)
class PlanPredictor(Method):
    """Channel i counts where |h_i| > alpha(h) T: a linear model of mean, deviation, maximum and entropy gives alpha.

    Attributes:
        ridge: what keeps the model's coefficients small, per token.
    """

    ridge: float = 0.01
    where: ClassVar[Where] = "hidden"
    takes: ClassVar[tuple[Kind, ...]] = ("input", "hidden")

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < torch.inf:
            raise InvalidInput(f"{self.name}: ridge {self.ridge} must be a finite number, not negative")

    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """See `Method.fit`.

        The plan's search gives each token the largest scale whose output error, as a share of the output, stays within
        a bound; the bound is the one that makes the tokens skip `sparsity` on average. The logarithms of the scales are
        regressed, and the threshold is then set so that the predictions skip what was asked for.
        """
        x = seen.values
        if not bool(x.isfinite().all()):
            raise NumericalError(
                f"{seen.statistics.site}: a predictor cannot be trained on NaN or infinite activations"
            )
        base = quantile(x.abs(), sparsity)
        base = base if bool(base) else x.abs().max().clamp_min(TINIEST)
        labels, searched = largest_scales(x, base, seen.weight, sparsity)
        known = features(searched, base)  # [tokens, 4]
        centre, spread = known.mean(0), known.std(0, correction=0).clamp_min(LEAST_SPREAD)
        known = (known - centre) / spread
        target = labels.double().log2()
        penalty = self.ridge * len(known) * torch.eye(known.shape[1], dtype=torch.float64, device=x.device)
        weights = torch.linalg.solve(known.T @ known + penalty, known.T @ (target - target.mean()))
        found = {
            "threshold": base.float(),
            "base": base.float(),
            "weights": torch.cat([weights, target.mean()[None]]).float(),
            "centre_of_features": centre.float(),
            "spread_of_features": spread.float(),
            "width": torch.tensor(x.shape[-1]),
        }
        scale = token_scale(found, x.shape[-1], "samples").scale(x)
        return found | {"threshold": quantile(x.abs() / scale, sparsity).float()}

    @contextmanager
    def attach(self, place: Place, tensors: Mapping[str, Tensor], tokens: SparseTokens) -> Iterator[None]:
        """See `Method.attach`."""
        if skips_nothing(tensors):
            yield
            return
        with in_front(place.module, InputChange(token_scale(tensors, place.columns, place.name), tokens)):
            yield

    def mask(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Method.mask`."""
        if skips_nothing(tensors):
            return torch.ones_like(x, dtype=torch.bool)
        return token_scale(tensors, x.shape[-1], "x").keep(x)
