"""Iterative magnitude pruning with rewinding: a lottery ticket (Frankle and Carbin 2019, arXiv:1803.03635).

Rewinding to a step that is not the first: Frankle et al. 2020, arXiv:1912.05671.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparity import registry
from sparity.errors import InvalidInput
from sparity.models.float32 import in_float32
from sparity.registry import register
from sparity.stages.kinds import Trained
from sparity.training.fine_tune.steps import FLOATS, LOSSES, Schedule, block_parameters, descend
from sparity.training.sparse_training.methods.base import Method, Task
from sparity.training.sparse_training.rounds import Round, weights_in

WIDTH = 0.02  # of random weights, where the configuration names none


@register("sparse_training.method", "lottery")
@dataclass(frozen=True)
class Lottery(Method):
    """Train, prune the smallest, put those that stay back to an early step; after the last round train once more.

    Attributes:
        sparsity: the share of weights to remove in all.
        rounds: of pruning; each leaves the same share of what there was.
        rewind: the step whose weights the ticket begins with; 0 is before the first.
        ticket: rewound to that step; kept: as the training left it; random: matrices drawn anew within the mask.
        start: given: the weights of the model; random: its matrices are drawn before the first step.
        within: the smallest of each layer, or of the whole model.
        seed: of what is drawn.
    """

    sparsity: float = 0.5
    rounds: int = 3
    rewind: int = 0
    ticket: Literal["rewound", "kept", "random"] = "rewound"
    start: Literal["given", "random"] = "given"
    within: Literal["layer", "model"] = "layer"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InvalidInput(f"lottery: sparsity {self.sparsity} must be in [0, 1)")
        if self.rounds < 1 or self.rewind < 0:
            raise InvalidInput("lottery: rounds must be 1 or more, rewind 0 or more")

    @property
    def pattern(self) -> Any:
        """See `Method.pattern`."""
        return registry.create("prune.pattern", "unstructured", {"count": "exact"})

    @property
    def share(self) -> float:
        """See `Method.share`."""
        return self.sparsity

    @property
    def words(self) -> str:
        """See `Method.words`."""
        return f"lottery ({self.ticket}), {100 * self.sparsity:g} % in {self.rounds} rounds"

    def total(self, steps: int) -> int:
        """See `Method.total`."""
        return (self.rounds + 1) * steps - self.rounds * self.rewind if steps else 0

    def numbers(self, weights: int) -> float:
        """See `Method.numbers`: with the weights that tickets are put back to, twice."""
        return weights * (FLOATS + 2) / FLOATS

    def declines(self, steps: int) -> str | None:
        """See `Method.declines`."""
        if self.rewind and self.rewind >= steps:
            return f"rewind {self.rewind} must come before the last of {steps} steps"
        return None

    def share_after(self, number: int) -> float:
        """The share that is zero after round `number`, from 1: 1 - (1 - s)^(number / rounds)."""
        return self.sparsity if number == self.rounds else 1 - (1 - self.sparsity) ** (number / self.rounds)

    def train(self, task: Task) -> Trained:
        """See `Method.train`."""
        with in_float32(task.model):
            trained = block_parameters(task.model)
            if self.start == "random":
                self._draw(task, 0)
            state = Round.begun(task.work, task.steps, task.masks, weights_in(trained))
            while True:
                if task.steps:
                    self._course(task, trained, state)
                if state.number == self.rounds:
                    break
                masks = self._pruned(task, state)
                state = replace(state, number=state.number + 1, masks=masks, begin=None, resumed=None)
                self._put_back(task, trained, state)
            task.write_zeros(state.masks)
        curves = {f"round {number}": course for number, course in enumerate(state.courses(), 1)}
        return Trained(curves=curves)

    def _course(self, task: Task, trained: dict[str, Any], state: Round) -> None:
        """Train the weights that stay, from where the round begins."""

        def loss(step: int) -> Tensor:
            if state.number == 0 and step == self.rewind:
                state.rewound.update(weights_in(trained))
            return task.loss(step)

        def after() -> None:
            task.write_zeros(state.masks)

        course = descend(trained, loss, state, Schedule(task.steps, task.rate), after)
        state.losses[state.number * task.steps :] = list(course.losses.values())

    def _pruned(self, task: Task, state: Round) -> dict[str, Tensor]:
        """The masks after one more round; what was zero before goes first."""
        share, chosen = self.share_after(state.number + 1), task.chosen
        sizes = [p.weight.abs().masked_fill(~state.masks[p.name], -1.0) for p in chosen]
        if self.within == "layer":
            keeps = [self.pattern.keep(each, share, "layer") for each in sizes]
        else:
            flat = self.pattern.keep(torch.cat([each.flatten() for each in sizes])[None], share, "layer")[0]
            parts = flat.split([each.numel() for each in sizes])
            keeps = [part.view(each.shape) for part, each in zip(parts, sizes, strict=True)]
        pairs = zip(chosen, keeps, strict=True)
        return {**state.masks, **{p.name: torch.logical_and(keep, state.masks[p.name]) for p, keep in pairs}}

    def _put_back(self, task: Task, trained: dict[str, Any], state: Round) -> None:
        """The weights with which a round begins, in the model and in the round."""
        if self.ticket != "kept":
            for name, parameter in trained.items():
                parameter.data.copy_(state.rewound[f"weight.{name}"])
        if self.ticket == "random":
            self._draw(task, state.number)
        task.write_zeros(state.masks)
        losses = torch.tensor(state.losses[: self.rewind], dtype=torch.float64)
        state.begin = self.rewind, {**weights_in(trained), LOSSES: losses}

    def _draw(self, task: Task, number: int) -> None:
        """Normal numbers for all matrices that become sparse."""
        drawn = torch.Generator().manual_seed(self.seed * (self.rounds + 1) + number)
        width = float(getattr(task.model.config, "initializer_range", WIDTH))
        for projection in task.chosen:
            shape = projection.weight.shape
            values = torch.randn(shape, generator=drawn) * width
            projection.write(values.masked_fill(~task.masks[projection.name].to(values.device), 0.0))
