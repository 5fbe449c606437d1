"""Bonsai: parts by a regression of the loss of random sub-models (Kolawole et al. 2024, arXiv:2402.05406)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.structure.methods.base import Choice
from sparity.static.structure.ranked import Ranked
from sparity.static.structure.subject import Subject
from sparity.static.structure.submodels import SubModels, draw, priors, regression, submodels
from sparity.static.structure.units import largest, left_of, stacked


@register("structure.method", "bonsai")
@dataclass(frozen=True)
class Bonsai(Ranked):
    """Remove the units that a linear model of the loss misses least, in rounds of `step`, by forward passes alone.

    In each round `masks` sub-models go without as many units as the round removes, drawn from twice as many whose
    outputs are smallest; half of them are the other halves of the draws. `dimension` is `mlp_channels` or the heads.
    The score of a unit is its weight in a first round in which all may go.
    """

    masks: int = 200
    step: float = 0.05
    seed: int = 0

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        self._check()
        with submodels(subject, self.dimension) as (models, outputs):
            order = [prior.argsort(stable=True) for prior in priors(models, outputs)]
            goes = [len(units) - left_of(len(units), self.step) or min(1, len(units) - 1) for units in order]
            weights = self._weights(models, order, goes, torch.Generator().manual_seed(self.seed))
        return {self.dimension: stacked([row.float() for row in weights])}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        self._check()
        generator = torch.Generator().manual_seed(self.seed)
        with submodels(subject, self.dimension) as (models, outputs):
            left = [left_of(len(mask), sparsity, self.multiple_of) for mask in models.masks]
            steps = [max(int(len(mask) * self.step), 1) for mask in models.masks]
            while any(int(mask.sum()) > end for mask, end in zip(models.masks, left, strict=True)):
                goes = [
                    min(step, int(mask.sum()) - end) for mask, step, end in zip(models.masks, steps, left, strict=True)
                ]
                self._remove(models, priors(models, outputs), goes, generator)
            kept = [mask.nonzero().flatten().tolist() for mask in models.masks]
        return {self.dimension: kept}

    def _remove(self, models: SubModels, prior: list[Tensor], goes: list[int], generator: torch.Generator) -> None:
        """One round: switch off in every block as many units as go."""
        order = []
        for mask, size, count in zip(models.masks, prior, goes, strict=True):
            working = mask.nonzero().flatten()
            order.append(working[size[working].argsort(stable=True)][: 2 * count])
        weights = self._weights(models, order, goes, generator)
        for index, (units, row) in enumerate(zip(order, weights, strict=True)):
            stay = set(largest(row[units], len(units) - goes[index]).tolist())
            models.masks[index][[int(unit) for place, unit in enumerate(units) if place not in stay]] = 0

    def _weights(
        self, models: SubModels, order: list[Tensor], goes: list[int], generator: torch.Generator
    ) -> list[Tensor]:
        """Of each block what each unit adds to the negative loss, `[size]`; 0 for units that are not drawn from.

        Candidates are drawn by their places in `order`, so that equal models in another order get equal weights.
        """
        before = [mask.clone() for mask in models.masks]
        places = {index: torch.arange(len(units)) for index, units in enumerate(order)}
        counts = dict(enumerate(goes))
        rows: list[Tensor] = []
        values: list[float] = []
        other: dict[int, Tensor] | None = None
        while len(rows) < self.masks:
            gone = other or draw(places, counts, generator)
            paired = other is None and all(len(order[i]) == 2 * counts[i] for i in places)
            other = {i: _rest(places[i], gone[i]) for i in places} if paired else None
            row = []
            for index, units in enumerate(order):
                here = torch.ones(len(units))
                here[gone[index]] = 0
                row.append(here)
                models.masks[index] = before[index].clone()
                models.masks[index][units[gone[index]]] = 0
            rows.append(torch.cat(row))
            values.append(-models.loss())
        models.masks[:] = before
        found = torch.split(regression(torch.stack(rows), torch.tensor(values)), [len(units) for units in order])
        weights = [torch.zeros(len(mask), dtype=torch.float64) for mask in before]
        for row_of, units, part in zip(weights, order, found, strict=True):
            row_of[units] = part
        return weights

    def _check(self) -> None:
        if self.masks < 2 or not 0 < self.step < 1:
            raise InvalidInput(f"bonsai: `masks` must be 2 or more and `step` in (0, 1), not {self.masks}, {self.step}")


def _rest(places: Tensor, gone: Tensor) -> Tensor:
    """The places that are not gone."""
    here = torch.ones(len(places), dtype=torch.bool)
    here[gone] = False
    return places[here]
