"""AWQ: columns of large inputs are scaled up before rounding (Lin et al. 2024, arXiv:2306.00978)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.quantize.methods.base import (
    Method,
    Quantized,
    Task,
    fit_groups,
    round_to,
    row_errors,
    scaled_nearest,
)

SMALLEST = 1e-4  # of a power of a channel's mean size
CLIPS = 20
MOST_CLIPPED = 0.5


@register("quantize.method", "awq")
@dataclass(frozen=True)
class AWQ(Method):
    """Multiply each column with a power of its input's mean size, round, divide again; the best power is searched.

    The powers are 0, 1/steps ... (steps - 1)/steps; the best is the one whose output on calibration inputs is closest.
    Power 0 is rounding to nearest. With `clip` the range of every group is then narrowed where that brings its own
    output closer, row by row, as long as the whole output does not suffer. Scales change no mask: a zero stays one.
    """

    steps: int = 20
    clip: bool = False

    needs: ClassVar[tuple[str, ...]] = ("gram", "mean_absolute")
    never_worse: ClassVar[bool] = True
    scales_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidInput(f"steps {self.steps}: at least one power is tried")

    @property
    def products(self) -> float:
        """One per power."""
        return float(self.steps)

    def quantize(self, task: Task) -> Quantized:
        """See `Method.quantize`."""
        gram, sizes = task.statistics.gram, task.statistics["mean_absolute"]
        tried = (scaled_nearest(task, scales_of(sizes, step / self.steps)) for step in range(self.steps))
        best = min(tried, key=lambda found: float(row_errors(task.weight - found.weight, gram).sum()))
        return _clipped(task, best, gram) if self.clip else best


def scales_of(sizes: Tensor, power: float) -> Tensor:
    """`[in]`: mean sizes of the inputs `[in]` to a power, so that the smallest times the largest is 1."""
    scales = sizes.pow(power).clamp(min=SMALLEST)
    return scales / (scales.max() * scales.min()).sqrt()


def _clipped(task: Task, found: Quantized, gram: Tensor) -> Quantized:
    """`found` with the ranges of its groups narrowed, in the rows whose output that brings closer."""
    scales = found.input_scales if found.input_scales is not None else torch.ones(task.weight.shape[1])
    weight = task.weight * scales
    grouped = weight.view(len(weight), -1, task.group)  # [out, groups, group]
    blocks = _blocks_of(gram / scales / scales[:, None], task.group)  # [groups, group, group]
    largest = grouped.abs().amax(2, keepdim=True)
    best, limits = torch.full(grouped.shape[:2], torch.inf), largest.clone()
    for step in range(int(MOST_CLIPPED * CLIPS)):
        limit = largest * (1 - step / CLIPS)
        within = torch.maximum(torch.minimum(grouped, limit), -limit).view(weight.shape)
        fitted = fit_groups(task.grid, within, task.group)
        _, values = round_to(task.grid, fitted, within, task.group)
        change = grouped - values.view(grouped.shape)
        errors = torch.einsum("ogi,gij,ogj->og", change, blocks, change)
        better = errors < best
        best, limits[better] = torch.where(better, errors, best), limit[better]
    within = torch.maximum(torch.minimum(grouped, limits), -limits).view(weight.shape)
    fitted = fit_groups(task.grid, within, task.group)
    codes, values = round_to(task.grid, fitted, within, task.group)
    values = values / scales
    closer = row_errors(task.weight - values, gram) < row_errors(task.weight - found.weight, gram)
    rows = closer[:, None]
    return Quantized(
        torch.where(rows, values, found.weight),
        torch.where(rows, codes, found.codes),
        torch.where(rows, fitted.scales, found.scales),
        torch.where(rows, fitted.zeros, found.zeros),
        found.grids,
        found.input_scales,
    )


def _blocks_of(gram: Tensor, group: int) -> Tensor:
    """`[groups, group, group]`: the squares along the diagonal of `gram` [in, in]."""
    return torch.stack([gram[start : start + group, start : start + group] for start in range(0, len(gram), group)])
