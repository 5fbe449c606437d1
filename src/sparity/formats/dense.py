"""Dense: every weight is stored; what the others are compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.formats.base import Format, Layout
from sparity.formats.storage.packed import Packed
from sparity.registry import register


@register("format", "dense")
@dataclass(frozen=True)
class Dense(Format):
    """Store every weight, row after row."""

    def layout(self, rows: int, columns: int, stored: torch.dtype) -> Layout:
        """See `Format.layout`."""
        return {"values": (stored, (rows, columns))}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`."""
        return {"values": values.clone()}

    def decode(self, packed: Packed) -> Tensor:
        """See `Format.decode`."""
        return packed.tensors["values"].clone()

    def count(self, values: Tensor) -> int:
        """All weights."""
        return values.numel()

    def check_content(self, packed: Packed) -> None:
        """Any content will do."""
