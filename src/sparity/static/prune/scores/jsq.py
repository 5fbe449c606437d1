"""JSQ: Wanda on clamped inputs, and how far apart an output's values lie without a weight (Guo et al., ICML 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.scores.base import Score


@register("prune.score", "jsq")
@dataclass(frozen=True)
class JSQ(Score):
    """|w| * input norm + rho * range over tokens of the output without w. Scores compare within an output row.

    A weight that holds an output's extremes apart goes sooner, so that what is left is easier to quantise. Of the
    inputs the share `clamp` that is largest in size counts as no larger than the smallest of them; 0 clamps nothing.
    `rho` weighs the range; with 0 and nothing clamped it is Wanda. The range is that of tokens over the root of the
    number of sequences: as wide as that of the sequences' mean where tokens are independent. Weights that read a dead
    channel score 0.
    """

    rho: float = 2.1
    clamp: float = 0.01

    needs: ClassVar[tuple[str, ...]] = ("column_norm", "inputs")
    compare_within: ClassVar[CompareWithin] = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.rho < float("inf"):
            raise InvalidInput(f"rho {self.rho}: the weight of the range must be finite and not negative")
        if not 0 <= self.clamp < 1:
            raise InvalidInput(f"clamp {self.clamp}: it is the share of the inputs that is clamped, in [0, 1)")

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        weight, inputs = weight.float(), statistics["inputs"]  # [tokens, in]
        limit = limit_of(inputs, self.clamp)
        clamped = inputs.clamp(-limit, limit)
        norm = statistics.column_norm * shrinkage(inputs, clamped)  # [in]
        scores = weight.abs() * norm
        if self.rho:
            scores = scores + self.rho / statistics.sequences**0.5 * ranges_without(weight, clamped)
        return torch.where(statistics.column_norm > 0, scores, 0.0)


def limit_of(inputs: Tensor, share: float) -> float:
    """The size of the smallest input among the share `share` of the largest ones; infinite where that holds none."""
    count = int(share * inputs.numel())
    return float(inputs.abs().flatten().kthvalue(inputs.numel() - count + 1).values) if count else float("inf")


def shrinkage(inputs: Tensor, clamped: Tensor) -> Tensor:
    """By what clamping multiplies the norm of each channel of a sample `[tokens, in]`: `[in]`, 1 where all are zero."""
    before, after = (x.norm(dim=0) for x in (inputs, clamped))
    return torch.where(before > 0, after / before, 1.0)


def ranges_without(weight: Tensor, inputs: Tensor) -> Tensor:
    """Largest minus smallest value of each output over tokens, one weight at a time set to zero: `[out, in]`.

    A weight moves no output by more than its largest input allows, so only tokens within twice the most that any of
    a row's weights can do of the row's extremes are looked at.

    Args:
        weight: `[out, in]`.
        inputs: `[tokens, in]`.
    """
    outputs, found = inputs @ weight.T, torch.empty_like(weight)
    reach = 2 * (weight.abs() * inputs.abs().amax(0)).amax(1)  # [out]
    for row, (values, parts, far) in enumerate(zip(outputs.T, weight, reach, strict=True)):
        high, low = values >= values.max() - far, values <= values.min() + far
        most = (values[high, None] - inputs[high] * parts).amax(0)
        least = (values[low, None] - inputs[low] * parts).amin(0)
        found[row] = most - least
    return found
