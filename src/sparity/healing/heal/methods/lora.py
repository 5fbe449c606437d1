"""LoRA inside the mask: a low rank is trained in place of the weights, then merged (Hu et al. 2021, arXiv:2106.09685).

What is added is masked in every step, so that the merged weights compute what was trained and keep their zeros.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from sparity.errors import InvalidInput
from sparity.healing.heal.low_rank import PARTS
from sparity.healing.heal.methods.base import Healed, Task, Training
from sparity.models import Decoder, Projection
from sparity.models.attached_runtime import input_sites
from sparity.models.float32 import in_float32
from sparity.registry import register
from sparity.stages.allocation import projections
from sparity.training.fine_tune.computed_weights import computed_weights
from sparity.training.fine_tune.masked_low_rank import MaskedLowRank
from sparity.training.fine_tune.steps import Schedule, descend, next_token_loss, places


@register("heal.method", "lora")
@dataclass(frozen=True)
class LoRA(Training):
    """W' = W + (alpha / rank) B A within the mask; A begins at random, B at zero, and only they are trained.

    Attributes:
        rank: of B A.
        alpha: the scale of what is added, over the rank.
        seed: of the numbers that A begins with.
    """

    rate: float = 1e-3
    rank: int = 8
    alpha: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not 0 < self.alpha < float("inf"):
            raise InvalidInput("lora: rank and alpha must be positive")

    @property
    def words(self) -> str:
        """See `Method.words`."""
        return f"lora, rank {self.rank}, {self.steps} steps"

    def trained(self, model: Decoder) -> int:
        """See `Training.trained`."""
        return sum(self.rank * sum(projection.weight.shape) for _, projection in projections(model))

    def heal(self, task: Task) -> Healed:
        """See `Method.heal`."""
        if not self.steps:
            return Healed()
        drawn = torch.Generator().manual_seed(self.seed)
        every = [projection for site in input_sites(task.model) for projection in site.projections]
        with in_float32(task.model), computed_weights(every, partial(self._low_rank, drawn)) as layers:
            trained = {
                f"{number}.{part}": getattr(layer, part) for number, layer in enumerate(layers) for part in PARTS
            }

            def loss(step: int) -> Tensor:
                ids = task.tokens[places(step, self.batch, len(task.tokens))]
                with parametrize.cached():
                    return next_token_loss(task.model, ids)

            return self.healed(descend(trained, loss, task.work, Schedule(self.steps, self.rate, stops=True)))

    def _low_rank(self, drawn: torch.Generator, weight: Tensor, parts: tuple[Projection, ...]) -> MaskedLowRank:
        return MaskedLowRank(weight, self.rank, self.alpha / self.rank, drawn)
