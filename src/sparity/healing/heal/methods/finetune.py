"""Fine-tuning with the mask frozen: more text, and every zero stays (Sun et al. 2024, arXiv:2306.11695, section 5)."""

from dataclasses import dataclass

from torch import Tensor

from sparity.healing.heal.methods.base import Healed, Task, Training
from sparity.registry import register
from sparity.training.fine_tune.steps import next_token_loss, train_blocks


@register("heal.method", "finetune")
@dataclass(frozen=True)
class Finetune(Training):
    """The mean cross-entropy of the next token is made smaller; after every step what is masked is zero again.

    The weights of the blocks are trained; embedding, last norm and head stay.
    """

    def heal(self, task: Task) -> Healed:
        """See `Method.heal`."""
        if not self.steps:
            return Healed()

        def loss(ids: Tensor, step: int) -> Tensor:
            return next_token_loss(task.model, ids)

        return self.healed(
            train_blocks(
                task.model, task.masks, task.tokens, task.work, loss,
                steps=self.steps, rate=self.rate, batch=self.batch, stops=True,
            )
        )  # fmt: skip
