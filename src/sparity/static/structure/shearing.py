"""Training of masks together with the weights, until the parts that stay have the sizes that were asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparity.errors import NumericalError
from sparity.static.structure.constraints import Axis, lagrangian
from sparity.static.structure.masked import Masks, Place, masked

BETAS = (0.9, 0.95)  # of AdamW
MOST = 1.0  # the norm that all gradients together are scaled down to
RISE, LAST = 0.1, 0.1  # the share of the steps over which rates rise, and the share of them that is left at the end
GROWTH = 0.2  # the share of the steps over which the targets of the constraints grow from 0


@dataclass(frozen=True)
class Training:
    """How masks and weights are trained.

    Attributes:
        steps: how many.
        rate: AdamW's learning rate of the weights; 0 leaves them as they are.
        mask_rate: the one of the masks, and of the multipliers, which climb.
        batch: sequences per step, taken in their order and from the start again.
        seed: of the masks that are drawn.
    """

    steps: int
    rate: float
    mask_rate: float
    batch: int
    seed: int

    def schedule(self, step: int) -> float:
        """The share of the rates in a step, from 0: a straight rise, then half a cosine."""
        rise = math.ceil(self.steps * RISE)
        if step < rise:
            return (step + 1) / rise
        return LAST + (1 - LAST) * (1 + math.cos(math.pi * (step - rise) / max(self.steps - rise, 1))) / 2

    def grown(self, step: int) -> float:
        """The share of the constraints' targets in a step, from 0."""
        return min(1.0, step / (self.steps * GROWTH))


def shear(model: Any, places: Sequence[Place], axes: Sequence[Axis], tokens: Tensor, training: Training) -> list[float]:
    """Train the masks of the axes, and the model's weights with them, in place; the loss of every step, in nats.

    Args:
        model: a transformers causal language model in float32.
        places: where the masks act in it.
        axes: what is masked, and how much is to be left.
        tokens: token ids `[samples, length]`.
        training: how.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    weights = list(model.parameters()) if training.rate else []
    model.requires_grad_(bool(training.rate))
    optimiser = _optimiser(weights, axes, training)
    rates = [group["lr"] for group in optimiser.param_groups]
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    generator, masks, losses = torch.Generator().manual_seed(training.seed), dict[str, Tensor](), list[float]()
    with torch.inference_mode(False), torch.enable_grad(), masked(places, lambda: masks):
        for step in range(training.steps):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * training.schedule(step)
            masks.update({axis.name: axis.draw(generator) for axis in axes})
            chosen = torch.arange(step * training.batch, (step + 1) * training.batch) % len(tokens)
            loss = next_token_loss(model, tokens[chosen])
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise NumericalError(f"sheared, step {step + 1}: the loss is {losses[-1]}; lower `rate`")
            optimiser.zero_grad()
            (loss + lagrangian(axes, training.grown(step))).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, MOST)
            optimiser.step()
            for axis in axes:
                axis.clamp()
    model.requires_grad_(False)
    return losses


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    """The mean cross-entropy of the next token, `[]`."""
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(device))


def settle(axes: Sequence[Axis]) -> Masks:
    """The masks of all axes without chance."""
    return {axis.name: axis.settle() for axis in axes}


def _optimiser(weights: list[nn.Parameter], axes: Sequence[Axis], training: Training) -> torch.optim.Optimizer:
    """AdamW without decay, in three groups; the multipliers climb."""
    multipliers = [parameter for axis in axes for parameter in (axis.linear, axis.squared)]
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": training.rate},
        {"params": [axis.log_alpha for axis in axes], "lr": training.mask_rate},
        {"params": multipliers, "lr": training.mask_rate, "maximize": True},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS, weight_decay=0.0)
