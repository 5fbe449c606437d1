"""Learned masks: training finds the best N:M pattern of each group (MaskLLM, Fang et al. 2024, arXiv:2409.17481)."""

import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparity.errors import InvalidInput
from sparity.models import Projection
from sparity.models.float32 import in_float32
from sparity.registry import register
from sparity.stages.kinds import Trained
from sparity.training.fine_tune.computed_weights import computed_weights
from sparity.training.fine_tune.steps import Schedule, descend
from sparity.training.sparse_training.methods.base import NOfMethod, Task

TEMPERATURES = (4.0, 0.05)  # of the softmax, from the first step to the last
SCALES = (100.0, 500.0)  # of the numbers per pattern, likewise
SPREAD = 0.01  # of those numbers at the start
PRIME = 1_000_003  # keeps the seeds of steps and weights apart
FEWEST = 1e-12  # under the logarithm


@register("sparse_training.method", "learned_mask")
@dataclass(frozen=True)
class LearnedMask(NOfMethod):
    """Weights stay as they are; each group learns a number per pattern, and patterns are drawn by Gumbel softmax.

    Attributes:
        speed: the learning rate of those numbers, in the stage's.
        prior: how much the pattern of the largest weights is ahead at the start, in spreads of the numbers.
        size: weight of the squared size of what is kept, which the training makes larger; it falls to 0.
        seed: of the numbers at the start and of what is drawn.
    """

    speed: float = 10.0
    prior: float = 3.0
    size: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.speed < float("inf") or not 0 <= self.prior < float("inf") or not 0 <= self.size < float("inf"):
            raise InvalidInput("learned_mask: speed must be positive, prior and size 0 or more")

    @property
    def patterns(self) -> Tensor:
        """Every way to keep `kept` of `of`, float32 `[patterns, of]`."""
        ways = list(itertools.combinations(range(self.of), self.kept))
        return torch.zeros(len(ways), self.of).scatter_(1, torch.tensor(ways), 1.0)

    def numbers(self, weights: int) -> float:
        """See `Method.numbers`."""
        return weights * len(self.patterns) / self.of

    def train(self, task: Task) -> Trained:
        """See `Method.train`."""
        losses = dict[int, float]()
        with in_float32(task.model), computed_weights(task.projections, partial(self._layer, task)) as layers:
            for number, layer in enumerate(layers):
                layer.begin(number)
            stored = dict.fromkeys((projection.module, projection.parameter) for projection in task.projections)

            def loss(step: int) -> Tensor:
                for layer in layers:
                    layer.step = step
                with parametrize.cached():
                    found = task.loss(step)
                    left = self.size * (1 - step / task.steps)
                    if not left:
                        return found
                    sizes = [getattr(module, name).square().sum() for module, name in stored]
                    return found - left * torch.stack(sizes).sum()

            if task.steps:
                gates = {
                    f"{n}.{name}": gate for n, layer in enumerate(layers) for name, gate in layer.named_parameters()
                }
                course = descend(gates, loss, task.work, Schedule(task.steps, task.rate * self.speed))
                losses = course.losses
            for layer in layers:
                layer.step = None
        return Trained(curves={"loss": losses} if losses else {})

    def _layer(self, task: Task, weight: Tensor, parts: tuple[Projection, ...]) -> "Drawn":
        return Drawn(self, task, parts)


class Drawn(nn.Module):
    """Multiplies a weight in its stored layout with patterns that are drawn, or with the likeliest ones.

    Attributes:
        gates: one per projection that becomes sparse, `[out, in / of, patterns]`.
        step: the step whose drawing counts; None for the likeliest patterns.
    """

    def __init__(self, method: LearnedMask, task: Task, parts: tuple[Projection, ...]) -> None:
        super().__init__()
        self.method, self.task, self.parts = method, task, parts
        self.step: int | None = None
        self.number = 0
        self.gates = nn.ParameterList()

    def begin(self, number: int) -> None:
        """Numbers for every pattern: drawn, with those ahead that keep the largest weights."""
        self.number, patterns = number, self.method.patterns
        for place, part in enumerate(self.parts):
            if part.name in self.task.dense:
                continue
            weight = part.shown(part.module.parametrizations[part.parameter].original.data)  # type: ignore[union-attr, index]
            largest = self.method.largest(weight, torch.ones_like(weight, dtype=torch.bool))
            common = largest.float().reshape(len(weight), -1, self.method.of) @ patterns.T.to(weight)
            numbers = torch.randn(common.shape, generator=self._generator(place)).to(weight) * SPREAD
            ahead = (common - self.method.kept / 2) * SPREAD * self.method.prior
            self.gates.append(nn.Parameter(numbers + ahead))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight times its patterns."""
        mask, patterns, gates = torch.ones_like(weight), self.method.patterns.to(weight), iter(self.gates)
        for place, part in enumerate(self.parts):
            given = self.task.masks[part.name]
            if part.name in self.task.dense or not len(self.gates):
                part.shown(mask).copy_(given)
                continue
            shares = self._shares(next(gates), place) @ patterns
            part.shown(mask).copy_(shares.flatten(1) * given)
        return torch.where(mask == 0, 0.0, weight * mask)

    def _shares(self, gate: Tensor, place: int) -> Tensor:
        """How much of each pattern there is, `[out, in / of, patterns]`."""
        if self.step is None:
            return nn.functional.one_hot(gate.argmax(-1), gate.shape[-1]).to(gate)
        way = self.step / max(self.task.steps - 1, 1)
        temperature, scale = (first + way * (last - first) for first, last in (TEMPERATURES, SCALES))
        noise = torch.rand(gate.shape, generator=self._generator(place, self.step + 1)).to(gate)
        gumbel = -(-(noise + FEWEST).log() + FEWEST).log()
        return ((scale * gate + gumbel) / temperature).softmax(-1)

    def _generator(self, place: int, step: int = 0) -> torch.Generator:
        seed = ((self.method.seed * PRIME + step) * PRIME + self.number) * PRIME + place
        return torch.Generator().manual_seed(seed % 2**63)
