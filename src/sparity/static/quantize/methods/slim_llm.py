"""SLiM-LLM: groups of columns get a bit more or less by their salience (Huang et al. 2024, arXiv:2405.14917)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration.statistics import DAMPING
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.matrices.settling import settle_columns
from sparity.static.quantize.column_rounding import ColumnRounding
from sparity.static.quantize.grids.base import Fitted, Grid
from sparity.static.quantize.grids.integers import Integers
from sparity.static.quantize.methods.base import Method, Quantized, Task, fit_groups, round_to

REACH, STEPS = 0.1, 50  # how far a range is stretched and narrowed, and in how many steps each
NORM = 2.4  # of a range's error
FLOOR = 1e-6  # of a probability


@dataclass(frozen=True)
class _Salience:
    factor: Tensor  # [in, in]
    dead: Tensor  # [in]

    def of(self, weight: Tensor, columns: slice) -> Tensor:
        """Salience of the weights `[out, width]` of some columns: what rounding them costs when others may adapt."""
        scored = (weight / self.factor.diagonal()[columns]).square()
        return torch.where(self.dead[columns], 0.0, scored)


@register("quantize.method", "slim_llm")
@dataclass(frozen=True)
class SlimLLM(Method):
    """The k least salient groups get one bit less, the k most salient one more; then GPTQ, with calibrated ranges.

    k is the one, from 0 up, whose outputs on calibration inputs have the least KL divergence from the dense ones. A
    group's range is stretched or narrowed by up to a tenth where its error is less, in which weights more than `sigma`
    standard deviations above the mean salience count `salience_weight` times. `damping` is the share of the Hessian's
    mean diagonal that is added to it. Groups are the column blocks of GPTQ.
    """

    damping: float = DAMPING
    sigma: float = 3.0
    salience_weight: float = 1.0

    needs: ClassVar[tuple[str, ...]] = ("gram", "inputs")
    mixes_bits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise InvalidInput(f"damping {self.damping}: it must lie in [0, 1]")
        if self.sigma < 0 or self.salience_weight <= 0:
            raise InvalidInput("slim_llm: sigma must not be negative, and salience_weight must be above 0")

    @property
    def products(self) -> float:
        """The triangle of the factor; the search multiplies with a sample of inputs."""
        return 2.0

    def check(self, grid: Grid, group: int | None) -> None:
        """See `Method.check`."""
        _neighbours(grid)

    def quantize(self, task: Task) -> Quantized:
        """See `Method.quantize`."""
        lower, given, higher = _neighbours(task.grid)
        salience = _Salience(*task.statistics.inverse_factor(self.damping))
        spans = [slice(start, start + task.group) for start in range(0, task.weight.shape[1], task.group)]
        by_group = torch.stack([salience.of(task.weight[:, span], span).sum() for span in spans])
        order = by_group.argsort(stable=True).tolist()
        count = mixed_groups(task, order, spans, (lower, given, higher))
        grids = [given] * task.groups
        for place in range(count):
            grids[order[place]], grids[order[-1 - place]] = lower, higher
        columns = task.weight.T.contiguous()

        def fit(place: int, grid: Grid, weight: Tensor) -> Fitted:
            return self._calibrated(grid, weight, salience.of(weight, spans[place]))

        rounding = ColumnRounding(columns, task.keep.T.contiguous(), grids, task.group, fit)
        settle_columns(columns, salience.factor, rounding, task.group)
        return Quantized(columns.T, rounding.codes.T.contiguous(), rounding.scales, rounding.zeros, tuple(grids))

    def _calibrated(self, grid: Grid, weight: Tensor, salience: Tensor) -> Fitted:
        """The grid of `weight` [out, group] whose range was stretched or narrowed to where its error is least."""
        salient = salience > salience.mean() + self.sigma * salience.std(correction=0)
        counts = torch.where(salient, self.salience_weight, 1.0)
        best = grid.fit(weight)
        least = self._error(grid, best, weight, counts)
        scales, zeros = best.scales.clone(), best.zeros.clone()
        for direction in (REACH, -REACH):
            for step in range(1, STEPS + 1):
                found = grid.fit(weight * (1 + direction * step / STEPS))
                error = self._error(grid, found, weight, counts)
                better = error < least
                least = torch.where(better, error, least)
                scales[better], zeros[better] = found.scales[better], found.zeros[better]
        return Fitted(scales, zeros)

    def _error(self, grid: Grid, fitted: Fitted, weight: Tensor, counts: Tensor) -> Tensor:
        values = grid.nearest(weight, fitted.scales[:, None], fitted.zeros[:, None])
        return ((weight - values).abs().pow(NORM) * counts).sum(1)


def mixed_groups(task: Task, order: list[int], spans: list[slice], grids: tuple[Grid, Grid, Grid]) -> int:
    """How many of the least and of the most salient groups change their bits, 0 to half of all.

    Args:
        task: the matrix.
        order: the groups, the least salient first.
        spans: the columns of each.
        grids: with one bit less, the given bits, one bit more.
    """
    lower, given, higher = (_rounded(task, grid) for grid in grids)
    inputs = task.statistics["inputs"]  # [tokens, in]
    dense, outputs = inputs @ task.weight.T, inputs @ given.T
    best, least = 0, _divergence(outputs, dense)
    for count in range(1, task.groups // 2 + 1):
        for place, changed in ((order[count - 1], lower), (order[-count], higher)):
            span = spans[place]
            outputs = outputs + inputs[:, span] @ (changed[:, span] - given[:, span]).T
        divergence = _divergence(outputs, dense)
        if divergence < least:
            best, least = count, divergence
    return best


def _divergence(outputs: Tensor, dense: Tensor) -> float:
    """KL of the outputs `[tokens, out]`, as probabilities, from the dense ones, per token."""
    found, expected = (logits.softmax(1).clamp(min=FLOOR) for logits in (outputs, dense))
    return float((found * (found.log() - expected.log())).sum(1).mean())


def _rounded(task: Task, grid: Grid) -> Tensor:
    return round_to(grid, fit_groups(grid, task.weight, task.group), task.weight, task.group)[1]


def _neighbours(grid: Grid) -> tuple[Grid, Grid, Grid]:
    if not isinstance(grid, Integers) or not 3 <= grid.width <= 7:
        raise InvalidInput(
            f"slim_llm gives groups one bit less or more: it needs integers of 3 to 7 bits, not {grid.words}"
        )
    return replace(grid, width=grid.width - 1), grid, replace(grid, width=grid.width + 1)
