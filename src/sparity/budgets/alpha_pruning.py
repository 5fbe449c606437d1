"""AlphaPruning: blocks whose spectra have heavier tails keep more (Lu et al. 2024, arXiv:2410.10912)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparity.budgets.base import Budget, Objective, Site, scale_to_sparsity
from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.registry import register

BINS = 100  # of the histogram of logarithms whose peak is where a tail may begin
NEAR, FAR = 0.95, 1.5  # of the peak: between them the beginning of the tail is sought
LIGHTEST = 1 + 1 / math.log(1.001)


@register("budget", "alpha_pruning")
@dataclass(frozen=True)
class AlphaPruning(Budget):
    """A matrix's alpha is the exponent of a power law through the upper tail of its squared singular values.

    A small alpha is a heavy tail, which well-trained matrices have. Alphas are stretched to 1 - `epsilon` to
    1 + `epsilon`, and sparsities are proportional to them. `tail` says where the upper tail begins: at the `middle` of
    the values (Hill's estimator), or near the `peak` of their histogram, where the power law fits best. With `per:
    block` the matrices of a block share the mean of their alphas. No data is read, only weights.
    """

    epsilon: float = 0.3
    tail: Literal["peak", "middle"] = "peak"
    per: Literal["block", "layer"] = "block"

    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise InvalidInput(f"alpha_pruning: epsilon {self.epsilon} must lie in [0, 1)")

    def observe(self, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> dict[str, float]:
        """The alpha of each matrix, or the mean of the block's."""
        found = {name: tail_exponent(weight, self.tail) for name, weight in weights.items()}
        if self.per == "block":
            found = dict.fromkeys(found, sum(found.values()) / len(found))
        return found

    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        alphas = [site.evidence for site in sites]
        span = (max(alphas) - min(alphas)) or 1.0
        shape = [1 - self.epsilon + 2 * self.epsilon * (alpha - min(alphas)) / span for alpha in alphas]
        return scale_to_sparsity(sites, shape, sparsity)


def tail_exponent(weight: Tensor, tail: Literal["peak", "middle"]) -> float:
    """alpha = 1 + n / sum of log(value / least value) over the n squared singular values of the tail.

    Values of 0 are no part of it. A matrix of fewer than two others, or of equal ones, has the lightest tail that there
    is here: that of values a thousandth above the least.
    """
    side = weight.detach().double().cpu()
    gram = side @ side.T if side.shape[0] <= side.shape[1] else side.T @ side
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    values = values[values > values[-1] * torch.finfo(torch.float32).eps ** 2].sort().values
    if len(values) < 2:
        return LIGHTEST
    logs = values.log()
    sums = logs.flip(0).cumsum(0).flip(0)  # of each value and all above it
    counts = torch.arange(len(values), 0, -1, dtype=torch.float64)
    alphas = (1 + counts / (sums - counts * logs)).nan_to_num(LIGHTEST, LIGHTEST, LIGHTEST).clamp_max(LIGHTEST)
    if tail == "middle":
        return float(alphas[len(values) // 2])
    return float(alphas[_best_start(values, alphas)])


def _best_start(values: Tensor, alphas: Tensor) -> int:
    """Near the peak of the histogram, the start from which the power law is nearest to the values (Kolmogorov)."""
    logs = values.log10().float()
    low, high = float(logs[0]), float(logs[-1])
    counts = torch.histc(logs, BINS, low, high)
    peak = 10 ** float(torch.linspace(low, high, BINS + 1)[int(counts.argmax())])
    starts = [i for i in range(len(values) - 1) if NEAR * peak <= values[i] <= FAR * peak] or [int(len(values) // 2)]
    distances = []
    for start in starts:
        above = values[start:]
        expected = 1 - (above / above[0]) ** (1 - alphas[start])
        seen = torch.arange(len(above), dtype=torch.float64) / len(above)
        distances.append(float((expected - seen).abs().max()))
    return starts[min(range(len(starts)), key=distances.__getitem__)]
