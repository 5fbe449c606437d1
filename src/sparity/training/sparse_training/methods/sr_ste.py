"""SR-STE: N:M masks that are chosen anew in every step (Zhou et al. 2021, arXiv:2102.04010)."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models import Projection
from sparity.models.float32 import in_float32
from sparity.registry import register
from sparity.stages.kinds import Trained
from sparity.training.fine_tune.computed_weights import computed_weights
from sparity.training.fine_tune.steps import Schedule, block_parameters, descend
from sparity.training.sparse_training.methods.base import NOfMethod, Task


@register("sparse_training.method", "sr_ste")
@dataclass(frozen=True)
class SrSte(NOfMethod):
    """Dense weights are trained through the mask of their largest; those outside it are pulled towards zero.

    Attributes:
        decay: of what lies outside the mask, added to the gradient as decay (1 - M) W.
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < float("inf"):
            raise InvalidInput(f"sr_ste: decay {self.decay} must be 0 or more")

    def train(self, task: Task) -> Trained:
        """See `Method.train`."""
        if not task.steps:
            task.write_zeros(self.largest_of(task))
            return Trained()
        with in_float32(task.model), computed_weights(task.projections, partial(self._layer, task)) as layers:

            def after() -> None:
                for layer in layers:
                    layer.zero()

            trained = block_parameters(task.model)
            course = descend(trained, task.loss, task.work, Schedule(task.steps, task.rate), after)
        return Trained(curves={"loss": course.losses})

    def _layer(self, task: Task, weight: Tensor, parts: tuple[Projection, ...]) -> "LargestOnly":
        return LargestOnly(self, task, parts)


class LargestOnly(nn.Module):
    """Shows the largest of each group of a weight in its stored layout, and lets gradients through to all."""

    def __init__(self, method: SrSte, task: Task, parts: tuple[Projection, ...]) -> None:
        super().__init__()
        self.method, self.task, self.parts = method, task, parts

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros."""
        mask = torch.ones_like(weight, dtype=torch.bool)
        for part in self.parts:
            given = self.task.masks[part.name]
            dense = part.name in self.task.dense
            part.shown(mask).copy_(given if dense else self.method.largest(part.shown(weight), given))
        found: Tensor = _Refined.apply(weight, mask, self.method.decay)  # type: ignore[no-untyped-call]
        return found

    def zero(self) -> None:
        """Zeros that must stay are zero again in the dense weights."""
        for part in self.parts:
            stored: Any = part.module
            dense = stored.parametrizations[part.parameter].original.data
            part.shown(dense).masked_fill_(~self.task.masks[part.name], 0.0)


class _Refined(torch.autograd.Function):
    """M W forwards; dW' + decay (1 - M) W backwards."""

    @staticmethod
    def forward(context: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        context.save_for_backward(weight, mask)
        context.decay = decay
        return weight.masked_fill(~mask, 0.0)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = context.saved_tensors
        return gradients[0] + context.decay * weight.masked_fill(mask, 0.0), None, None
