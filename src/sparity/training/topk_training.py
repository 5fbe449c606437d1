"""Top-K training: each token's largest channels alone before every layer, gradients as if all were there.

As in Q-Sparse (Wang et al. 2024, arXiv:2407.10969).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites
from sparity.registry import register
from sparity.sections import Number
from sparity.stages.base import Decision, ModelEvidence
from sparity.stages.kinds import Trained, Workspace
from sparity.training.fine_tune.options import FineTune
from sparity.training.fine_tune.steps import next_token_loss, train_blocks


@register("stage", "topk_training")
class TopkTraining(FineTune):
    """A fine-tune through top-K masks with a straight-through estimator."""

    sparsity: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.4, description="the share of a token's channels that is left out before every projection, in [0, 1)"
    )

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        return f"top-K training, {100 * self.sparsity:g} %, {self.steps} steps"

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """What is trained with: `{"left_out": share, "steps": n}`.

        Raises:
            InvalidInput: experts that share a module.
        """
        for index in range(len(model)):
            for site in model.sites(index):
                if any(projection.expert is not None for projection in site.projections):
                    raise InvalidInput(
                        f"topk_training: {site.name} is read by one of several experts in one module, whose inputs "
                        "cannot be masked: leave the stage out for this model"
                    )
        return {"left_out": self.sparsity, "steps": self.steps}

    def train(self, model: nn.Module, masks: Mapping[str, Tensor], tokens: Tensor, work: Workspace) -> Trained:
        """See `ModelStage.train`."""
        if not self.steps:
            return Trained()

        def loss(ids: Tensor, step: int) -> Tensor:
            return next_token_loss(model, ids)

        with masked_inputs(model, self.sparsity):
            course = train_blocks(model, masks, tokens, work, loss, steps=self.steps, rate=self.rate, batch=self.batch)
        return Trained(curves={"loss": course.losses})


def top(x: Tensor, sparsity: float) -> Tensor:
    """`x` [..., in] with 0 for all but the in - int(in sparsity) largest of each token, the first of equal ones.

    Its gradient is that of `x` itself: the straight-through estimator.
    """
    channels = x.shape[-1]
    kept = max(channels - int(sparsity * channels + 1e-9), 1)
    order = x.detach().abs().argsort(dim=-1, descending=True, stable=True)[..., :kept]
    masked = torch.zeros_like(x).scatter(-1, order, x.detach().gather(-1, order))
    return x + (masked - x.detach())


@contextmanager
def masked_inputs(model: nn.Module, sparsity: float) -> Iterator[None]:
    """Within the context every projection of the blocks reads the top channels of each token."""

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (top(arguments[0], sparsity), *arguments[1:])

    modules = dict.fromkeys(projection.module for site in input_sites(model) for projection in site.projections)
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before).remove)
        yield
