"""Low ranks beside the weights of a model, and what the loss thinks of the weights by its gradients alone."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparity.models import Projection
from sparity.training.fine_tune.computed_weights import computed_weights
from sparity.training.fine_tune.masked_low_rank import MaskedLowRank


@dataclass(frozen=True)
class Adapted:
    """A projection whose stored weight a layer of `computed_weights` adds a low rank to."""

    projection: Projection
    layer: MaskedLowRank

    @property
    def stored(self) -> Tensor:
        """The stored weight without the low rank, in its own layout."""
        computed: Any = self.projection.module.parametrizations
        stored: Tensor = computed[self.projection.parameter].original.data
        return stored

    def salience(self) -> Tensor:
        """What the loss would change by without each weight, |dW (W + scale B A)|, in the stored layout."""
        first, second = self.layer.first, self.layer.second
        with torch.no_grad():
            slope = merged_gradient(first, second, _slope(first), _slope(second))
            merged: Tensor = self.layer(self.stored)
            return (slope * merged).abs()


@contextmanager
def low_ranks(projections: Sequence[Projection], rank: int, scale: float, seed: int) -> Iterator[dict[str, Adapted]]:
    """Within the context scale B A is added to every weight; then it is merged. What is given is by projection."""
    adapted: dict[str, Adapted] = {}
    drawn = torch.Generator().manual_seed(seed)

    def build(weight: Tensor, parts: tuple[Projection, ...]) -> MaskedLowRank:
        layer = MaskedLowRank(weight, rank, scale, drawn)
        order_by_norm(layer.first.data, weight)
        adapted.update((part.name, Adapted(part, layer)) for part in parts)
        return layer

    with computed_weights(projections, build):
        yield adapted


def stored_with(projections: Sequence[Projection], roles: Collection[str]) -> list[Projection]:
    """The projections of some roles, and all that are stored in one parameter with one of them."""
    stored = {projection.stored for projection in projections if projection.role in roles}
    return [projection for projection in projections if projection.stored in stored]


def order_by_norm(first: Tensor, weight: Tensor) -> None:
    """Give A's columns to a weight's `[..., out, in]` by the order of their norms, in place.

    So a model with its parts in another order is given the same A in that order.
    """
    places = weight.double().square().sum(-2).argsort(dim=-1, stable=True).argsort(-1)
    first.copy_(first.gather(-1, places.unsqueeze(-2).expand_as(first)))


def merged_gradient(first: Tensor, second: Tensor, first_slope: Tensor, second_slope: Tensor) -> Tensor:
    """The change of B A in a step of gradient descent of rate 1, dB A + B dA - dB dA, `[..., out, in]`.

    Args:
        first: A, `[..., rank, in]`.
        second: B, `[..., out, rank]`.
        first_slope: dA, the gradient of the loss by A.
        second_slope: dB, likewise.
    """
    return second_slope @ first + (second - second_slope) @ first_slope


def _slope(parameter: nn.Parameter) -> Tensor:
    """The gradient; zeros where no token has reached the parameter."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
