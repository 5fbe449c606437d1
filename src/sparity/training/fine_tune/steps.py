"""Steps of AdamW on the weights of the blocks, in float32, that a killed run goes on with at the same bits."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparity.errors import NumericalError
from sparity.models.attached_runtime import input_sites
from sparity.models.families.base import family_of
from sparity.stages.kinds import Workspace

Loss = Callable[[Tensor, int], Tensor]  # token ids [batch, length], the number of the step -> []
FLOATS = 3  # numbers per weight that a checkpoint holds: it, and the two moments of its gradient


def train_blocks(
    model: Any,
    masks: Mapping[str, Tensor],
    tokens: Tensor,
    work: Workspace,
    loss: Loss,
    *,
    steps: int,
    rate: float,
    batch: int,
    every: int = 25,
) -> None:
    """Change the weights of a model's blocks in place; embedding, last norm and head stay.

    Args:
        model: a transformers causal language model. It is trained in float32, and is of its own type again afterwards.
        masks: projection -> bool `[out, in]`, True where a weight may be other than zero.
        tokens: token ids `[samples, length]`, taken in their order and from the start again.
        work: keeps weights and moments, each `every` steps and after the last.
        loss: what is made smaller.
        steps: how many.
        rate: the learning rate, which falls to 0 along half a cosine.
        batch: sequences per step.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            _train(model, masks, tokens, work, loss, steps, rate, batch, every)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False).data = parameter.data.to(types[name])
            parameter.grad = None


def _train(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    tokens: Tensor,
    work: Workspace,
    loss: Loss,
    steps: int,
    rate: float,
    batch: int,
    every: int,
) -> None:
    prefix = f"{family_of(model.config).blocks}."
    trained = {name: parameter for name, parameter in model.named_parameters() if name.startswith(prefix)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimiser = torch.optim.AdamW(trained.values(), rate, weight_decay=0.0)
    begun = _restored(trained, optimiser, work)
    every_one = [projection for site in input_sites(model) for projection in site.projections]
    masked = [(each, masks[each.name].to(each.weight.device)) for each in every_one if each.name in masks]
    for step in range(begun, steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimiser.zero_grad()
        found = loss(_batch(tokens, step, batch), step)
        if not bool(found.isfinite()):
            raise NumericalError(f"step {step + 1}: the loss is {float(found.detach())}; lower the learning rate")
        found.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        for projection, mask in masked:
            projection.weight.mul_(mask)
        if (step + 1) % every == 0 or step + 1 == steps:
            work.save(step + 1, _kept(trained, optimiser))
        work.progress(step + 1, steps)


def _batch(tokens: Tensor, step: int, batch: int) -> Tensor:
    places = torch.arange(step * batch, (step + 1) * batch) % len(tokens)
    return tokens[places]


def _kept(trained: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = {
        f"{part}.{name}": optimiser.state[parameter][part]
        for name, parameter in trained.items()
        for part in ("exp_avg", "exp_avg_sq")
        if parameter in optimiser.state
    }
    weights = {f"weight.{name}": parameter.data for name, parameter in trained.items()}
    return {name: tensor.contiguous() for name, tensor in {**weights, **moments}.items()}


def _restored(trained: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, work: Workspace) -> int:
    """The step to go on with; weights and moments are put back."""
    last = work.last()
    if last is None:
        return 0
    step, tensors = last
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"weight.{name}"])
        moments = {part: tensors.get(f"{part}.{name}") for part in ("exp_avg", "exp_avg_sq")}
        if all(moment is not None for moment in moments.values()):
            optimiser.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    """The mean cross-entropy of the next token, `[]`."""
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
    found: Tensor = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(device))
    return found
