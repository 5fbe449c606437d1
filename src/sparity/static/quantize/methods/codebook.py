"""Codebook: the values a matrix shares are found by k-means (Deep Compression, Han et al. 2016, arXiv:1510.00149)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.quantize.grids.base import Grid
from sparity.static.quantize.grids.codebook import Codebook
from sparity.static.quantize.grids.integers import Integers
from sparity.static.quantize.methods.base import Method, Quantized, Task


@register("quantize.method", "codebook")
@dataclass(frozen=True)
class SharedCodebook(Method):
    """k-means over the weights of one matrix: 2^bits shared values, one of which is 0, and no scales.

    The values begin at equal distances from the smallest to the largest weight, the one nearest to 0 at 0, where it
    stays. A round gives every weight that is kept to the nearest value, of two equally near the lower, and moves each
    value to the mean of its weights; one without weights stays. The rounds end when no weight changes its value, or
    after `iterations`. No calibration text is read.
    """

    iterations: int = 300

    fits_codebook: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise InvalidInput(f"iterations {self.iterations}: it must not be negative; 0 keeps equal distances")

    def check(self, grid: Grid, group: int | None) -> None:
        """See `Method.check`."""
        if not isinstance(grid, Integers) or grid != Integers(grid.width):
            raise InvalidInput(
                f"codebook finds the values of each matrix itself, not those of {grid.words}: give `bits`, and leave "
                "grid, its options and symmetric out"
            )
        if group is not None:
            raise InvalidInput(
                f"group {group}: one codebook without scales serves a whole matrix; leave group out, or choose the "
                "grid codebook, whose entries are scaled to each group"
            )

    def quantize(self, task: Task) -> Quantized:
        """See `Method.quantize`."""
        weight = task.weight
        book = Codebook(shared_values(weight[task.keep], task.grid.bits, self.iterations))
        scales = torch.ones(len(weight), 1, device=weight.device)
        zeros = torch.zeros_like(scales)
        codes = book.codes(weight, scales, zeros)
        values = book.values(codes, scales, zeros)
        return Quantized(values, codes, scales, zeros, (book,), codebook=torch.tensor(book.entries))


def shared_values(weights: Tensor, bits: int, iterations: int) -> tuple[float, ...]:
    """The rising values that `weights` [kept], float32, share, as Python numbers, 0 among them.

    There are 2^bits; fewer where neighbours are too near for float32 to tell apart, never less than two.
    """
    ordered = np.sort(weights.cpu().numpy())
    low, high = (min(ordered[0], 0.0), max(ordered[-1], 0.0)) if ordered.size else (0.0, 0.0)
    if low == high:  # nothing but zeros
        low, high = -1.0, 1.0
    values = np.linspace(low, high, 2**bits)
    fixed = int(np.abs(values).argmin())
    values[fixed] = 0.0
    sums, ends = np.zeros(ordered.size + 1), None
    np.cumsum(ordered, dtype=np.float64, out=sums[1:])
    for _ in range(iterations):
        between = ((values[1:] + values[:-1]) / 2).astype(np.float32)
        found = np.concatenate([[0], ordered.searchsorted(between, side="right"), [ordered.size]])
        if ends is not None and np.array_equal(ends, found):
            break
        ends, counts = found, np.diff(found)
        means = np.diff(sums[found]) / counts.clip(min=1)
        values = np.where(counts > 0, means, values)
        values[fixed] = 0.0
    return tuple(float(value) for value in np.unique(values.astype(np.float32)))
