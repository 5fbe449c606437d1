"""ASP: N:M by magnitude, the mask frozen, trained again (Mishra et al. 2021, arXiv:2104.08378)."""

from dataclasses import dataclass

from torch import Tensor

from sparity.registry import register
from sparity.stages.kinds import Trained
from sparity.training.fine_tune.steps import next_token_loss, train_blocks
from sparity.training.sparse_training.methods.base import NOfMethod, Task


@register("sparse_training.method", "asp")
@dataclass(frozen=True)
class ASP(NOfMethod):
    """The largest weights of each group stay, chosen once before the first step; the others stay zero."""

    def train(self, task: Task) -> Trained:
        """See `Method.train`."""
        masks = self.largest_of(task)
        task.write_zeros(masks)
        if not task.steps:
            return Trained()

        def loss(ids: Tensor, step: int) -> Tensor:
            return next_token_loss(task.model, ids)

        course = train_blocks(
            task.model, masks, task.tokens, task.work, loss, steps=task.steps, rate=task.rate, batch=task.batch
        )
        task.write_zeros(masks)
        return Trained(curves={"loss": course.losses})
