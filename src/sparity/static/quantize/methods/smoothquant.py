"""SmoothQuant: large inputs are made smaller at their weights' expense (Xiao et al. 2023, arXiv:2211.10438)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.quantize.methods.base import Method, Quantized, Task, scaled_nearest

SMALLEST = 1e-5


@register("quantize.method", "smoothquant")
@dataclass(frozen=True)
class SmoothQuant(Method):
    """Multiply each column with max|x|^alpha / max|w|^(1 - alpha), round to nearest, divide again.

    The inputs, divided by the same numbers, have fewer outliers, which is what the method is for: it helps where they
    are quantised too. Scales change no mask: a zero stays one. The scale of a channel that never fired
    is 1.
    """

    alpha: float = 0.5

    needs: ClassVar[tuple[str, ...]] = ("max_absolute",)
    scales_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InvalidInput(f"alpha {self.alpha}: it must lie in [0, 1]")

    def quantize(self, task: Task) -> Quantized:
        """See `Method.quantize`."""
        return scaled_nearest(task, smoothing(task.weight, task.statistics["max_absolute"], self.alpha))


def smoothing(weight: Tensor, largest_inputs: Tensor, alpha: float) -> Tensor:
    """`[in]`: the scales of the columns of `weight` [out, in], from the largest sizes of its inputs `[in]`."""
    largest_weights = weight.abs().amax(0).clamp(min=SMALLEST)
    scales = (largest_inputs.pow(alpha) / largest_weights.pow(1 - alpha)).clamp(min=SMALLEST)
    return torch.where(largest_inputs > 0, scales, 1.0)
