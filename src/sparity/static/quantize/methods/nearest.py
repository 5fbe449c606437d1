"""Nearest: every weight goes to the nearest value of its group's grid (symmetric or with a zero point)."""

from dataclasses import dataclass
from typing import ClassVar

from sparity.registry import register
from sparity.static.quantize.methods.base import Method, Quantized, Task, nearest


@register("quantize.method", "nearest")
@dataclass(frozen=True)
class Nearest(Method):
    """Round to nearest; no calibration text is read."""

    never_worse: ClassVar[bool] = True

    def quantize(self, task: Task) -> Quantized:
        """See `Method.quantize`."""
        return nearest(task)
