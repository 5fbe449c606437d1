"""Training of masks together with weights, until as much of a model stays as was asked for."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparity.errors import NumericalError
from sparity.static.structure.constraints import Axis, Constraint, lagrangian
from sparity.static.structure.hard_concrete import typical
from sparity.static.structure.masked import Masks, Place, masked

BETAS = (0.9, 0.95)  # of AdamW
MOST = 1.0  # the norm that all gradients together are scaled down to
RISE, LAST = 0.1, 0.1  # the share of the steps over which rates rise, and the share of them that is left at the end


@dataclass(frozen=True)
class Training:
    """How masks and weights are trained.

    Attributes:
        steps: how many.
        rate: AdamW's learning rate of the weights; 0 leaves them as they are.
        mask_rate: the one of the masks, and of the multipliers, which climb.
        batch: sequences per step, taken in their order and from the start again.
        seed: of the masks that are drawn.
        growth: the share of the steps over which the targets of the constraints grow from 0.
    """

    steps: int
    rate: float
    mask_rate: float
    batch: int
    seed: int
    growth: float = 0.2

    def schedule(self, step: int) -> float:
        """The share of the rates in a step, from 0: a straight rise, then half a cosine."""
        rise = math.ceil(self.steps * RISE)
        if step < rise:
            return (step + 1) / rise
        return LAST + (1 - LAST) * (1 + math.cos(math.pi * (step - rise) / max(self.steps - rise, 1))) / 2

    def grown(self, step: int) -> float:
        """The share of the constraints' targets in a step, from 0."""
        return min(1.0, step / (self.steps * self.growth))


def shear(model: Any, places: Sequence[Place], axes: Sequence[Axis], tokens: Tensor, training: Training) -> list[float]:
    """`train_masks` with all weights of the model, until each axis has what it is to keep."""
    return train_masks(model, list(model.parameters()), places, axes, axes, tokens, training)


def train_masks(
    model: Any,
    weights: Sequence[nn.Parameter],
    places: Sequence[Place],
    axes: Sequence[Axis],
    constraints: Sequence[Constraint],
    tokens: Tensor,
    training: Training,
) -> list[float]:
    """Train the masks of the axes, and some weights with them, in place; the loss of every step, in nats.

    Args:
        model: a transformers causal language model in float32.
        weights: those of its parameters that are trained.
        places: where the masks act in it.
        axes: what is masked.
        constraints: what the masks are to come to.
        tokens: token ids `[samples, length]`.
        training: how.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    model.requires_grad_(False)
    weights = weights if training.rate else []
    for weight in weights:
        weight.requires_grad_(True)
    optimiser = _optimiser(weights, axes, constraints, training)
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
                raise NumericalError(f"step {step + 1} of the masks: the loss is {losses[-1]}; lower `rate`")
            optimiser.zero_grad()
            (loss + lagrangian(constraints, training.grown(step))).backward()  # type: ignore[no-untyped-call]
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


def settle_kept(axes: Iterable[Axis], kept: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Tensor]:
    """The masks of axes without chance, 0 but for the units that each row keeps."""
    found = {}
    for axis in axes:
        stays = torch.zeros(axis.rows, axis.size)
        for row, units in zip(stays, kept[axis.name], strict=True):
            row[units] = 1
        found[axis.name] = typical(axis.log_alpha.detach()) * stays
    return found


def _optimiser(
    weights: Sequence[nn.Parameter], axes: Sequence[Axis], constraints: Sequence[Constraint], training: Training
) -> torch.optim.Optimizer:
    """AdamW without decay, in three groups; the multipliers climb."""
    multipliers = [parameter for each in constraints for parameter in (each.linear, each.squared)]
    groups: list[dict[str, Any]] = [
        {"params": list(weights), "lr": training.rate},
        {"params": [axis.log_alpha for axis in axes], "lr": training.mask_rate},
        {"params": multipliers, "lr": training.mask_rate, "maximize": True},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS, weight_decay=0.0)
