"""Same: values are stored as they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.formats.encodings.base import Encoding, SideTensors
from sparity.registry import register


@register("encoding", "same")
@dataclass(frozen=True)
class Same(Encoding):
    """Store each value in the weight's own type; every bit comes back, NaN, infinity and -0.0 too."""

    exact: ClassVar[bool] = True

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """See `Encoding.stored`."""
        return dtype

    def side_tensors(self, rows: int, columns: int) -> SideTensors:
        """None."""
        return {}

    def encode(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weight itself."""
        return weight, {}

    def decode(self, values: Tensor, sides: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The values themselves."""
        return values

    def largest_error(self, weight: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros(weight.shape)

    def check(self, what: str, values: Tensor, sides: Mapping[str, Tensor]) -> None:
        """Any content will do."""
