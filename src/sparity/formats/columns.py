"""Columns: every weight is stored, input channel after input channel, so that channels can be left out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.formats.base import Format, Layout
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.values import bits
from sparity.registry import register


@register("format", "columns")
@dataclass(frozen=True)
class Columns(Format):
    """Store the transposed weight: inputs that are zero at run time then cost nothing."""

    by_channel = True

    def layout(self, rows: int, columns: int, stored: torch.dtype) -> Layout:
        """See `Format.layout`."""
        return {"values": (stored, (columns, rows))}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`."""
        return {"values": bits(values).T.clone(memory_format=torch.contiguous_format).view(values.dtype)}

    def decode(self, packed: Packed) -> Tensor:
        """See `Format.decode`."""
        values = packed.tensors["values"]
        return bits(values).T.clone(memory_format=torch.contiguous_format).view(values.dtype)

    def count(self, values: Tensor) -> int:
        """All weights."""
        return values.numel()

    def check_content(self, packed: Packed) -> None:
        """Any content will do."""
