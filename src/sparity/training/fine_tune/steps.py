"""Steps of AdamW, on the weights of the blocks or on any others, that a killed run goes on with at the same bits."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparity.errors import NumericalError
from sparity.models.attached_runtime import input_sites
from sparity.models.families.base import family_of
from sparity.models.float32 import in_float32
from sparity.stages.kinds import Workspace

Loss = Callable[[Tensor, int], Tensor]  # token ids [batch, length], the number of the step -> []
FLOATS = 3  # numbers per weight that a checkpoint holds: it, and the two moments of its gradient
MOMENTS = ("exp_avg", "exp_avg_sq")
LOSSES = "sparity.losses"  # of a checkpoint, beside the weights
TAKEN = "sparity.taken"  # of a checkpoint: the steps since the moments were zero, where a training began at a later one
DIVERGED = 2.0  # times the first loss, and a nat more than it at least: a training that has come to no good


@dataclass(frozen=True)
class Schedule:
    """How a training goes.

    Attributes:
        steps: how many.
        rate: AdamW's learning rate at the start; it falls to 0 along half a cosine.
        every: a checkpoint is kept after so many steps, and after the last.
        stops: whether a loss that grows out of bounds ends the training at its last checkpoint; otherwise one that is
            not finite is an error.
    """

    steps: int
    rate: float
    every: int = 25
    stops: bool = False


@dataclass
class Course:
    """How a training went.

    Attributes:
        losses: step, from 1 -> loss.
        stopped: the step whose loss ended the training; None where it came to its end.
    """

    losses: dict[int, float] = field(default_factory=dict)
    stopped: int | None = None


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
    stops: bool = False,
) -> Course:
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
        stops: see `Schedule`.

    Raises:
        NumericalError: the loss is NaN or infinite, unless that only stops the training.
    """
    with in_float32(model):
        trained = block_parameters(model)
        every_one = [projection for site in input_sites(model) for projection in site.projections]
        masked = [(each, masks[each.name].to(each.weight.device)) for each in every_one if each.name in masks]

        def zero() -> None:
            for projection, mask in masked:
                projection.weight.mul_(mask)

        def of_step(step: int) -> Tensor:
            return loss(tokens[places(step, batch, len(tokens))], step)

        return descend(trained, of_step, work, Schedule(steps, rate, every, stops), after=zero)


def block_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of a model's blocks by their names: all but embedding, last norm and head."""
    prefix = f"{family_of(model.config).blocks}."
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(prefix)}


def descend(
    trained: Mapping[str, nn.Parameter],
    loss: Callable[[int], Tensor],
    work: Workspace,
    schedule: Schedule,
    after: Callable[[], None] = lambda: None,
    before: Callable[[int], None] = lambda step: None,
) -> Course:
    """Steps of AdamW without decay on some parameters, in place; they need gradients only meanwhile.

    Args:
        trained: parameters in float32, by the names under which their checkpoints hold them.
        loss: the loss of a step, from 0.
        work: keeps the checkpoints.
        schedule: how many steps, and how large.
        after: called behind every step.
        before: called with the number of a step, from 0, when its gradients are there and the parameters are as they
            were.

    Raises:
        NumericalError: see `Schedule.stops`.
    """
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained.values(), schedule.rate, weight_decay=0.0)
    course = Course()
    if schedule.stops and work.last() is None:
        work.save(0, _kept(trained, optimiser, course))
    for step in range(_restored(trained, optimiser, course, work), schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate * (1 + math.cos(math.pi * step / schedule.steps)) / 2
        optimiser.zero_grad()
        found = loss(step)
        value = float(found.detach())
        if schedule.stops and _has_diverged(course, value):
            _restored(trained, optimiser, course, work)
            course.stopped = step + 1
            break
        if not math.isfinite(value):
            raise NumericalError(f"step {step + 1}: the loss is {value}; lower the learning rate")
        course.losses[step + 1] = value
        found.backward()  # type: ignore[no-untyped-call]
        before(step)
        optimiser.step()
        after()
        if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
            work.save(step + 1, _kept(trained, optimiser, course))
        work.progress(step + 1, schedule.steps)
    return course


def places(step: int, batch: int, count: int) -> Tensor:
    """Which of `count` sequences a step is given, `[batch]`: in their order, and from the start again."""
    return torch.arange(step * batch, (step + 1) * batch) % count


def _has_diverged(course: Course, value: float) -> bool:
    first = course.losses.get(1, value)
    return not math.isfinite(value) or value > max(DIVERGED * first, first + 1)


def _kept(trained: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, course: Course) -> dict[str, Tensor]:
    moments = {
        f"{part}.{name}": optimiser.state[parameter][part]
        for name, parameter in trained.items()
        for part in MOMENTS
        if parameter in optimiser.state
    }
    weights = {f"weight.{name}": parameter.data for name, parameter in trained.items()}
    losses = {LOSSES: torch.tensor(list(course.losses.values()), dtype=torch.float64)}
    for state in list(optimiser.state.values())[:1]:  # all have taken as many
        losses[TAKEN] = torch.as_tensor(state["step"])
    return {name: tensor.contiguous() for name, tensor in {**weights, **moments, **losses}.items()}


def _restored(
    trained: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, course: Course, work: Workspace
) -> int:
    """The step to go on with; weights, moments and losses are put back."""
    last = work.last()
    if last is None:
        return 0
    step, tensors = last
    taken = tensors.get(TAKEN, torch.tensor(float(step)))
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"weight.{name}"])
        moments = {part: tensors.get(f"{part}.{name}") for part in MOMENTS}
        if all(moment is not None for moment in moments.values()):
            optimiser.state[parameter] = {"step": taken.clone(), **moments}
    course.losses = dict(enumerate(tensors[LOSSES].tolist(), 1))
    return step


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    """The mean cross-entropy of the next token, `[]`."""
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
    found: Tensor = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(device))
    return found
