"""The loss of a model without some of its units, and which units it misses: forward passes alone."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models import Block
from sparity.models.dimensions import CHANNELS, Dimension
from sparity.static.structure.forward import Forward, forward
from sparity.static.structure.subject import Subject

RIDGES = tuple(10.0**power for power in range(-4, 3))  # shares of the mean eigenvalue


@dataclass
class SubModels:
    """A model in memory whose units can be switched off: `masks` by block, float32 `[size]`, 1 for one that works."""

    passes: Forward
    masks: list[Tensor]
    sums: list[Tensor] = field(default_factory=list)  # of squared inputs by block, while they are counted

    def loss(self) -> float:
        """The mean cross-entropy over the text, in nats."""
        return self.passes.loss(self.passes.run(self.passes.first, range(len(self.passes.blocks))))


@contextmanager
def submodels(subject: Subject, dimension: str) -> Iterator[tuple[SubModels, list[tuple[Any, int]]]]:
    """A model with one dimension that can be switched off, and of each block the projection behind it, with a width.

    Raises:
        InvalidInput: a dimension that a block does not have, or experts.
    """
    with forward(subject) as passes, ExitStack() as hooks:
        found = SubModels(passes, [])
        outputs = []
        for index, block in enumerate(passes.blocks):
            output, width, size = _behind(subject, block, dimension)
            found.masks.append(torch.ones(size))
            outputs.append((output, width))

            def switch(module: Any, given: tuple[Tensor, ...], index: int = index, width: int = width) -> Any:
                x = given[0]
                if found.sums:
                    found.sums[index] += x.detach().float().square().flatten(0, -2).sum(0).cpu()
                return (x * found.masks[index].repeat_interleave(width).to(x), *given[1:])

            hooks.callback(output.module.register_forward_pre_hook(switch).remove)
        yield found, outputs


def _behind(subject: Subject, block: Block, dimension: str) -> tuple[Any, int, int]:
    """The projection that reads a block's units, how many inputs each unit gives it, and how many units there are."""
    if any(projection.expert is not None for projection in block.projections):
        raise InvalidInput(f"{block.name}: bonsai has no rule for experts: use reap, or minitron")
    units: Dimension = subject.heads(block)
    if dimension == CHANNELS:
        units = next(each for each in subject.dimensions(block) if each.name == CHANNELS)
    if units.name != dimension:
        raise InvalidInput(f'bonsai cuts {CHANNELS} or {units.name} of this model, not "{dimension}"')
    cut = next(cut for cut in units.cuts if cut.axis == "columns")
    output = next(projection for projection in block.projections if projection.name == cut.projection)
    return output, cut.width, units.size


def priors(models: SubModels, outputs: list[tuple[Any, int]]) -> list[Tensor]:
    """Of each block's units the size of what they add: sum of |weight| |input|, `[size]`; Wanda's, unit by unit."""
    models.sums = [torch.zeros(len(mask) * width) for mask, (_, width) in zip(models.masks, outputs, strict=True)]
    models.loss()
    sums, models.sums = models.sums, []
    return [
        (square.sqrt() * output.weight.float().abs().sum(0).cpu()).view(-1, width).sum(1)
        for square, (output, width) in zip(sums, outputs, strict=True)
    ]


def regression(kept: Tensor, values: Tensor) -> Tensor:
    """What each unit adds to `values` [models], by ridge regression on `kept` [models, units] of 0 and 1, float64.

    The ridge is the one of `RIDGES` with the least error of each model predicted from the others.
    """
    x, y = kept.double(), values.double()
    x, y = x - x.mean(0), y - y.mean()
    gram = x @ x.T
    eigenvalues, vectors = torch.linalg.eigh(gram)
    scale = eigenvalues.clamp_min(0).mean()
    if not scale or not y.any():
        return torch.zeros(x.shape[1], dtype=torch.float64)
    best: tuple[float, Tensor] | None = None
    for ridge in RIDGES:
        inverse = (vectors / (eigenvalues.clamp_min(0) + ridge * scale)) @ vectors.T
        dual = inverse @ y
        error = float((dual / inverse.diagonal()).square().sum())  # leave one out, in closed form
        if best is None or error < best[0]:
            best = error, dual
    assert best is not None
    return x.T @ best[1]


def draw(candidates: Mapping[int, Tensor], gone: Mapping[int, int], generator: torch.Generator) -> dict[int, Tensor]:
    """Of each block the units that one model goes without: `gone` of its candidates, at random."""
    return {
        index: units[torch.randperm(len(units), generator=generator)[: gone[index]]]
        for index, units in candidates.items()
    }
