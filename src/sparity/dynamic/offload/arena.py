"""The memory that units are read into: taken once, so that a limit is kept whatever a model does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Arena:
    """`slots` slots for one record each, cut into parts: what products read lies together, part by part.

    Attributes:
        parts: `[slots, width]` each, in the order in which a record holds them.
        views: the bytes of each.
        part_bytes: of one slot of each.
    """

    def __init__(self, slots: int, widths: Sequence[int], dtype: torch.dtype) -> None:
        self.parts = [torch.empty(slots, width, dtype=dtype) for width in widths]
        bytes_of: list[Any] = [part.view(-1).view(torch.uint8).numpy() for part in self.parts]
        self.views = [memoryview(each) for each in bytes_of]
        self.part_bytes = [width * dtype.itemsize for width in widths]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(part.nbytes for part in self.parts)

    def room(self, slot: int) -> list[memoryview]:
        """Where the parts of a record go."""
        return [view[slot * size : (slot + 1) * size] for view, size in zip(self.views, self.part_bytes, strict=True)]

    def of(self, slot: int) -> list[Tensor]:
        """The parts of the record in a slot, each `[width]`."""
        return [part[slot] for part in self.parts]
