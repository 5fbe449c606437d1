"""Distillation: the dense model's predictions are the target, its likeliest tokens kept on disk (arXiv:2407.14679).

Muralidharan et al. 2024, after Hinton et al. 2015, arXiv:1503.02531.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.healing.heal.methods.base import Healed, Task, Training
from sparity.healing.heal.teacher import BYTES, TopK, cosine_distance, outputs
from sparity.models import Decoder
from sparity.products.float32 import float32_products
from sparity.registry import register
from sparity.stages.base import Estimate, Workload
from sparity.training.fine_tune.steps import places, train_blocks


@register("heal.method", "distillation")
@dataclass(frozen=True)
class Distillation(Training):
    """KL(dense || model) of the next token is made smaller within the mask, and the distance of hidden states if asked.

    The dense model runs over the text once, before the first step; with `hidden` it runs in every step.

    Attributes:
        top: likeliest tokens that are kept of each prediction; the others count as one.
        hidden: weight of the cosine distance between the outputs of blocks, beside a KL scaled to the same size.
    """

    top: int = 64
    hidden: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1 or not 0 <= self.hidden < float("inf"):
            raise InvalidInput("distillation: top must be 1 or more, hidden 0 or more")

    @property
    def compares(self) -> bool:
        """See `Method.compares`: hidden states, which a rewriting may put in another order."""
        return self.hidden > 0

    def estimate(self, model: Decoder, work: Workload) -> Estimate:
        """See `Method.estimate`."""
        found = super().estimate(model, work)
        kept = BYTES * work.tokens * min(self.top, int(model.config.vocab_size))
        return Estimate(flops=found.flops, memory=found.memory, disk={**found.disk, "the teacher's tokens": kept})

    def heal(self, task: Task) -> Healed:
        """See `Method.heal`."""
        if not self.steps:
            return Healed()
        if self.hidden and task.dense.config.hidden_size != task.model.config.hidden_size:  # type: ignore[union-attr]
            raise InvalidInput("distillation: the dense model has another hidden size: leave `hidden` out")
        model, dense, count = task.model, task.dense, len(task.tokens)
        teacher = TopK.gather(dense, task.tokens, self.top, task.work.folder, task.work.progress)

        def loss(ids: Tensor, step: int) -> Tensor:
            if not self.hidden:
                return teacher.divergence(_logits(model, ids), places(step, self.batch, count))
            with outputs(dense, task.blocks) as wanted, torch.no_grad(), float32_products():
                _logits(dense, ids)
            with outputs(model, range(len(task.blocks))) as found:
                of_tokens = teacher.divergence(_logits(model, ids), places(step, self.batch, count))
            distance = cosine_distance(found, wanted)
            scale = (of_tokens / distance.clamp_min(torch.finfo(torch.float32).eps)).detach()
            return of_tokens + self.hidden * scale * distance

        return self.healed(
            train_blocks(
                model, task.masks, task.tokens, task.work, loss,
                steps=self.steps, rate=self.rate, batch=self.batch, stops=True,
            )
        )  # fmt: skip


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Of all tokens but each sequence's last, `[batch, length - 1, vocabulary]`."""
    device = next(model.parameters()).device
    found: Tensor = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1]
    return found
